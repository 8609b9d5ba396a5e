"""A judgement of this machine, line by line: what is there, whether it serves, and what to do where it does not.

Facts come from `machine.py` (the system) and from a process that tries torch, the libraries and the kernels
(`model/checkup.py`); what a run would choose comes from `spec/resolve.py`, memory from `memory.py`. Loads no torch itself.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from kivnun.plan.bases import known_base
from kivnun.plan.machine import Disk, Machine, read_machine, version_of
from kivnun.plan.memory import COMPUTE_BYTES, Shape, step_memory
from kivnun.plan.time import REFERENCE_FLOPS
from kivnun.spec import LoraSpec, ResolveFacts, resolve
from kivnun.spec.read import validate

State = Literal["ok", "note", "problem"]

STAGES = ("torch", "libraries", "kernels", "triton", "speed")  # of model/checkup.py
TIMEOUT_S = 300  # compiling the kernels takes most of it, once
HUB_TIMEOUT_S = 5
LEAST_DISK, SMALL_DISK = 16 * 2**20, 5 * 2**30
LEAST_MEMORY = 256 * 2**20
ROWS_OF = 512  # tokens of the longest row that the defaults are shown for
SHOWN_BASES = ("kivnun/tiny-phi", "microsoft/Phi-4-mini-instruct")
PINS = Path(__file__).parents[2] / "constraints.txt"  # in a checkout; an installed package has the bounds of its metadata
# By extra: the library that it brings, and what it is for.
EXTRAS = {
    "data": ("datasets", "Parquet and Hugging Face data sets; other files need neither"),
    "deepspeed": (
        "deepspeed",
        "state divided among processes (compute.zero_stage 1 to 3); without it zero_stage 0 divides rows alone",
    ),
    "harness": ("lm_eval", "kivnun harness"),
    "serve": ("uvicorn", "kivnun serve-run"),
    "service": ("fastapi", "kivnun serve, the hosted service; its client commands keys and jobs need nothing"),
    "tensorboard": ("tensorboardX", "kivnun tune --tensorboard"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. `state` is "problem" where no run is possible before it is mended; `do` says what to do about it."""

    name: str
    state: State
    found: str
    do: str = ""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a run of LoRA on a base takes here when nothing is said, and the memory that a step of it needs."""

    base: str
    device: str
    precision: str
    threads: int
    micro_batch_tokens: int
    kernels: str
    packed_weights: bool
    step_bytes: float
    fits: bool


@dataclass(frozen=True, slots=True)
class Checkup:
    findings: tuple[Finding, ...]
    defaults: tuple[Defaults, ...]

    @property
    def ok(self) -> bool:
        return all(finding.state != "problem" for finding in self.findings)


def check_up(folder: Path, *, network: bool = False) -> Checkup:
    """Return the judgement, seen from `folder`. Takes some seconds, in which torch is tried in a process of its own."""
    machine, tried = read_machine(folder), try_out()
    findings = (
        *_of_the_system(machine),
        *_of_torch(machine, tried),
        *_of_versions(),
        *_of_extras(),
        *_of_kernels(tried),
        *_of_speed(machine, tried),
        _of_the_hub(network),
    )
    ready = not any("error" in tried.get(stage, {"error": ""}) for stage in ("torch", "kernels"))
    return Checkup(findings, tuple(_defaults(base, machine, tried) for base in SHOWN_BASES) if ready else ())


def try_out(stages: Sequence[str] = STAGES) -> dict[str, dict[str, Any]]:
    """Return what each stage of `model/checkup.py` found, by its name; a stage that the process did not outlive has an `error`."""
    found: dict[str, dict[str, Any]] = {}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kivnun.model.checkup", *stages], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        said, status = done.stdout, done.returncode
        end = f"was ended by signal {-status}" if status < 0 else _last_line(done.stderr) or f"ended with status {status}"
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        status, end = 1, f"did not end in {TIMEOUT_S} s"
    for line in said.splitlines():
        if line.startswith('{"stage"'):
            stage = json.loads(line)
            found[stage.pop("stage")] = stage
    if status != 0:
        broken = next((stage for stage in stages if stage not in found), None)
        if broken is not None:
            found[broken] = {"error": f"the process that tried it {end}"}
    return found


# --- the system --------------------------------------------------------------------------------------------------------------


def _of_the_system(machine: Machine) -> Iterator[Finding]:
    right = sys.version_info >= (3, 11) and sys.maxsize > 2**32
    yield Finding("Python", "ok" if right else "problem", machine.python, "" if right else "install Python 3.11 or newer, 64 bit")
    yield Finding("system", "ok", machine.system)
    cpu = machine.cpu
    yield Finding("processor", "ok", f"{cpu.model}; {', '.join(cpu.features) or 'no wide instructions known'}")
    yield _cores(machine)
    yield _memory(machine)
    yield from (_disk(disk) for disk in machine.disks)


def _cores(machine: Machine) -> Finding:
    cpu = machine.cpu
    found = f"{cpu.allowed} of {cpu.present} may be used"
    if cpu.quota is not None and cpu.quota < cpu.allowed:
        whole = max(1, int(cpu.quota))
        found += f", for {cpu.quota:g} cores' time (control group)"
        return Finding("cores", "note", found, f"set compute.threads to {whole}: more threads wait for one another")
    return Finding("cores", "ok", found)


def _memory(machine: Machine) -> Finding:
    memory = machine.memory
    found = f"{_gib(memory.for_a_run)} free of {_gib(memory.total)}"
    if memory.limit is not None:
        found += f", limited to {_gib(memory.limit)} (control group)"
    if memory.for_a_run < LEAST_MEMORY:
        return Finding("memory", "problem", found, "end other programs, or give the container more")
    return Finding("memory", "ok" if memory.limit is None else "note", found)


def _disk(disk: Disk) -> Finding:
    name, found = f"disk: {disk.what}", f"{_gib(disk.free)} free in {disk.path}"
    here = disk.what == "this folder"  # a run goes there
    if not disk.writable:
        do = "work in another folder, or mend its permissions" if here else "set XDG_CACHE_HOME to a folder that can be written"
        return Finding(name, "problem" if here else "note", f"{disk.path} cannot be written", do)
    if disk.free < SMALL_DISK:
        state: State = "problem" if here and disk.free < LEAST_DISK else "note"
        return Finding(name, state, found, "make room: a base of 3.8 B parameters takes 7.7 GB, its runs more")
    return Finding(name, "ok", found)


# --- torch, GPUs, versions ---------------------------------------------------------------------------------------------------


def _of_torch(machine: Machine, tried: Mapping[str, dict[str, Any]]) -> Iterator[Finding]:
    torch = tried.get("torch", {})
    if "error" in torch:
        yield Finding(
            "torch works", "problem", torch["error"], "install it again: `make setup` in the repository, or pip install torch"
        )
        yield _driver_alone(machine)
        return
    built = f"built for CUDA {torch['built_for_cuda']}" if torch["built_for_cuda"] else "built for the CPU"
    yield Finding("torch works", "ok", f"{torch['version']}, {built}")
    libraries = tried.get("libraries", {})
    if "error" in libraries:
        yield Finding("libraries work", "problem", libraries["error"], "install the pinned versions again: `make setup`")
    yield _gpus(machine, torch)


def _gpus(machine: Machine, torch: Mapping[str, Any]) -> Finding:
    if torch["gpus"]:
        names = ", ".join(f"{gpu['name']} ({_gib(gpu['memory_bytes'])})" for gpu in torch["gpus"])
        if not torch["bf16"]:
            return Finding("GPU", "note", names, "it does not compute in bf16: set base.precision to fp32, or take a newer one")
        return Finding("GPU", "ok", names)
    driver = machine.driver
    if driver is None:
        return Finding("GPU", "ok", "none (there is no nvidia-smi): runs use the CPU")
    if driver.problem is not None:
        return Finding("GPU", "note", driver.problem, "install or mend the NVIDIA driver; until then runs use the CPU")
    if not driver.gpus:
        return Finding("GPU", "ok", "none that the driver knows: runs use the CPU")
    seen = f"the driver has {driver.gpus[0][0]}, torch sees none"
    if not torch["built_for_cuda"]:
        return Finding("GPU", "note", seen, "install a torch that is built for CUDA; the one here is for the CPU")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return Finding("GPU", "note", f"{seen}; CUDA_VISIBLE_DEVICES is {hidden!r}", "unset it, or name a GPU in it")
    do = f"the driver ({driver.gpus[0][2]}) may be too old for CUDA {torch['built_for_cuda']}: bring it up to date"
    return Finding("GPU", "note", seen, do)


def _driver_alone(machine: Machine) -> Finding:
    driver = machine.driver
    names = "none" if driver is None or not driver.gpus else ", ".join(name for name, _, _ in driver.gpus)
    return Finding("GPU", "note", f"the driver has {names}", "torch has to be mended first")


def _of_versions() -> Iterator[Finding]:
    pins = pinned()
    for name, wanted in required().items():
        found = version_of(name)
        if found is None:
            yield Finding(name, "problem", "not installed", f"pip install '{wanted}'")
            continue
        pin = pins.get(_plain(name))
        if not _satisfies(wanted, found):
            yield Finding(name, "problem", f"{found}, {wanted.specifier} is needed", f"pip install '{wanted}'")
        elif pin is not None and _public(found) != pin:
            yield Finding(name, "note", f"{found}; tested with {pin}", f"pip install {name}=={pin}, should anything be odd")
        else:
            yield Finding(name, "ok", found if pin is None else f"{found}, as pinned")


def required() -> dict[str, Requirement]:
    """Return what the package needs at least, by name; nothing where it is not installed but run from its sources."""
    try:
        lines = importlib.metadata.requires("kivnun") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found: dict[str, Requirement] = {}
    for line in lines:
        try:
            wanted = Requirement(line)
        except InvalidRequirement:
            continue
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            found[wanted.name] = wanted
    return found


def pinned() -> dict[str, str]:
    """Return the versions that the tests ran with, by name, where the sources are here."""
    try:
        lines = PINS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = [line.split("#")[0].split(";")[0].strip().partition("==") for line in lines]
    return {_plain(name): version for name, _, version in pairs if version}


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def _public(version: str) -> str:
    return version.partition("+")[0]


def _satisfies(wanted: Requirement, found: str) -> bool:
    try:
        return wanted.specifier.contains(Version(_public(found)), prereleases=True)
    except InvalidVersion:
        return True  # a build of one's own: who made it knows what it is


def _of_extras() -> Iterator[Finding]:
    for name, (library, purpose) in EXTRAS.items():
        found = version_of(library)
        do = f"pip install 'kivnun[{name}]', if it is wanted" if found is None else ""
        yield Finding(f"extra: {name}", "ok", f"{library} {found or 'is not installed'}; for {purpose}", do)


# --- kernels, speed, hub -----------------------------------------------------------------------------------------------------


def _of_kernels(tried: Mapping[str, dict[str, Any]]) -> Iterator[Finding]:
    native = tried.get("kernels")
    if native is None:
        return
    if native.get("compiler"):
        yield Finding("C compiler", "ok", native["compiler"])
    reason = native.get("error") or native["reason"]
    if reason is not None:
        do = "install a C compiler (gcc or clang) for more speed on a CPU; without it torch computes"
        yield Finding("kernels in C", "note", str(reason), do)
    else:
        packs = f", packed products in {' and '.join(native['packs'])}" if native["packs"] else ", no packed products"
        yield Finding("kernels in C", "ok", f"built, and right{packs}")
    triton = tried.get("triton")
    if triton is None:
        return
    reason = triton.get("error") or triton["reason"]
    if reason is None:
        yield Finding("kernels in Triton", "ok", "run, and are right")
    elif reason == "there is no CUDA device":
        yield Finding("kernels in Triton", "ok", f"not used: {reason}")
    else:
        yield Finding("kernels in Triton", "note", str(reason), "install triton as torch asks for it; without it torch computes")


def _of_speed(machine: Machine, tried: Mapping[str, dict[str, Any]]) -> Iterator[Finding]:
    speed = tried.get("speed", {"error": ""})
    if "error" in speed:
        return
    for precision, flops in speed.items():
        times = flops / REFERENCE_FLOPS[COMPUTE_BYTES[precision]]
        found = f"{flops / 1e9:,.0f} GFLOP/s on {machine.cpu.allowed} cores, {times:.2g} times one core of the reference"
        slow = precision == "bf16" and flops < speed["fp32"]
        do = "slower than fp32 here: set base.precision to fp32 where there is memory for it" if slow else ""
        yield Finding(f"speed in {precision}", "note" if slow else "ok", found, do)


def _of_the_hub(network: bool) -> Finding:
    if not network:
        return Finding("hub", "ok", "not asked: `kivnun doctor --network` does")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Finding("hub", "note", "HF_HUB_OFFLINE is set: only what is in the cache is used", "unset it to download")
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    began = time.monotonic()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_TIMEOUT_S):
            pass
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Finding("hub", "note", f"{address} is not reached: {reason}", "look at the network or the proxy, or use folders")
    return Finding("hub", "ok", f"{address} answers, in {time.monotonic() - began:.1f} s")


# --- what a run would take ---------------------------------------------------------------------------------------------------


def _defaults(name: str, machine: Machine, tried: Mapping[str, dict[str, Any]]) -> Defaults:
    base, native, triton = known_base(name), tried["kernels"], tried.get("triton", {"reason": "it was not tried"})
    on_gpu = bool(tried["torch"]["gpus"])
    facts = ResolveFacts(
        objective_kind="supervised",
        max_seq_len=base.sizes.longest,
        longest_row=ROWS_OF,
        base_parameters=base.sizes.numbers,
        device="cuda" if on_gpu else "cpu",
        threads=machine.cpu.allowed,
        data_format="messages",
        no_native_reason=native["reason"],
        no_triton_reason=triton.get("error") or triton["reason"],
        memory_bytes=machine.memory.total,
        packs=frozenset(native.get("packs", ())),
    )
    spec, _ = resolve(validate({"version": 1, "base": name, "data": {"train": "rows.jsonl"}}), facts)
    compute, precision = spec.compute, spec.base.precision
    tokens, threads = compute.micro_batch_tokens or 0, compute.threads or 0
    step = step_memory(base.sizes, LoraSpec(), Shape(precision, tokens, facts.device)).peak
    packed = bool(getattr(compute, "packed_weights", False))
    taken = step + (2 * COMPUTE_BYTES[precision] * base.sizes.linear_numbers if packed else 0)
    there = tried["torch"]["gpus"][0]["memory_bytes"] if on_gpu else machine.memory.for_a_run
    return Defaults(name, facts.device, precision, threads, tokens, compute.kernels, packed, taken, taken <= there)


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
