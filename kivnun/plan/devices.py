"""What a run may compute on: this machine's CPU or GPU, or a GPU by its name, with its memory and what it computes a second.

Next: `time.py`, which says how much of that training comes to.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from kivnun.errors import SpecError

GIB = 2**30
GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Device:
    """One device, or several of a kind. `memory_bytes` is what one of them has for a run; `flops` the dense bfloat16 peak of a GPU;
    `cores` those of a CPU."""

    name: str
    kind: Literal["cpu", "cuda"]
    memory_bytes: float
    cores: int = 0
    flops: float | None = None
    count: int = 1


# Memory in GiB and dense bfloat16 peaks without sparsity, from NVIDIA's data sheets.
GPUS = {
    "h200": ("H200", 141, 989e12),
    "h100": ("H100", 80, 989e12),
    "a100-80gb": ("A100 80GB", 80, 312e12),
    "a100-40gb": ("A100 40GB", 40, 312e12),
    "l40s": ("L40S", 48, 362e12),
    "a10": ("A10", 24, 125e12),
    "l4": ("L4", 24, 121e12),
    "rtx-4090": ("RTX 4090", 24, 165e12),
    "rtx-3090": ("RTX 3090", 24, 71e12),
}
CONTEXT_BYTES = 1.0 * GIB  # that CUDA, its libraries and the allocator's gaps take of a GPU
LEFT_TO_OTHERS = 0.2  # of a machine's memory, which other programs need


def find_device(name: str, memory_gib: float | None = None, count: int = 1) -> Device:
    """Return the device of that name: "cpu" and "cuda" are this machine's. `memory_gib` says how much a run may take of each.

    Raises SpecError for a name that is not known, and where this machine has no such device.
    """
    if name == "cpu":
        memory = machine_memory() * (1 - LEFT_TO_OTHERS) if memory_gib is None else memory_gib * GIB
        return Device("this machine's CPU", "cpu", memory, _cores(), None, count)
    if name == "cuda":
        label, memory = _own_gpu()
        whole = memory if memory_gib is None else memory_gib * GIB
        return Device(label, "cuda", whole - CONTEXT_BYTES, 0, known_flops(label), count)
    if name not in GPUS:
        near = get_close_matches(name.lower(), GPUS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SpecError(f"--device {name!r} is not known", hint=f"{hint}there are cpu, cuda (this machine's), {', '.join(GPUS)}")
    label, memory, flops = GPUS[name]
    return Device(label, "cuda", (memory if memory_gib is None else memory_gib) * GIB - CONTEXT_BYTES, 0, flops, count)


def this_machine(count: int = 1) -> Device:
    """Return this machine's CPU with all of its memory: what a run here may take at the very most; `count` such machines."""
    return Device("this machine's CPU", "cpu", machine_memory(), _cores(), None, count)


def known_flops(label: str) -> float | None:
    """Return the dense bfloat16 peak of a GPU by what its driver calls it; None: not known."""
    return next((flops for word, _, flops in GPUS.values() if word.split()[0] in label), None)


def machine_memory() -> float:
    """Return this machine's memory in bytes, or what its control group allows where that is less."""
    return min([float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), *_group_limits()])


def _group_limits() -> Iterator[float]:
    """Yield the limits of this process's control groups (version 2, then 1), from its own up to the outermost that it sees."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
            _, controllers, path = line.split(":", 2)
            root, name = {"": (GROUPS, "memory.max"), "memory": (GROUPS / "memory", "memory.limit_in_bytes")}.get(
                controllers, (None, "")
            )
            if root is not None:
                own = root / path.lstrip("/")
                yield from _limits([folder / name for folder in (own, *own.parents) if folder.is_relative_to(root)])


def _limits(files: Iterable[Path]) -> Iterator[float]:
    for file in files:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: there is no limit
            yield float(int(file.read_text(encoding="ascii")))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_gpu() -> bool:
    """Return whether this machine's driver knows an NVIDIA GPU."""
    try:
        _own_gpu()
    except SpecError:
        return False
    return True


def _own_gpu() -> tuple[str, float]:
    """Return the first GPU's name and memory, as the driver tells. Loads no torch."""
    tool = shutil.which("nvidia-smi")
    command = [tool or "nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False) if tool else None
    if found is None or found.returncode or "," not in found.stdout:
        raise SpecError(
            "--device cuda: no NVIDIA GPU was found on this machine",
            hint=f"name the one that the run will have: {', '.join(GPUS)}; or take cpu",
        )
    label, _, mib = found.stdout.splitlines()[0].rpartition(",")
    return label.strip(), float(mib) * 2**20
