"""What this machine is, as the system tells it: processor, cores and memory that this process may use, disks, GPUs, versions.

Nothing here imports torch or asks a GPU for anything; `root` is where /proc and /sys are looked for, which tests set elsewhere.
Next: `checkup.py`, which judges it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
NO_LIMIT = 1 << 60  # cgroups of version 1 say "no limit" with a number near 2^63
# What decides which kernels compute: names of /proc/cpuinfo, and what people call them.
FEATURES = {
    "avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_tile": "AMX", "amx_bf16": "AMX BF16",
    "asimd": "NEON", "bf16": "NEON BF16", "sve": "SVE",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor. `allowed` counts the cores this process may run on, `quota` is the share of time it is given, in cores."""

    model: str
    features: tuple[str, ...]
    present: int
    allowed: int
    quota: float | None


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `limit` is the least that a control group allows, `in_use` what is taken of that."""

    total: int
    available: int | None
    limit: int | None
    in_use: int | None

    @property
    def for_a_run(self) -> int:
        """Return what a run could take now."""
        free = self.total if self.available is None else self.available
        return free if self.limit is None else min(free, max(0, self.limit - (self.in_use or 0)))


@dataclass(frozen=True, slots=True)
class Disk:
    what: str
    path: Path
    free: int
    writable: bool


@dataclass(frozen=True, slots=True)
class Driver:
    """What the NVIDIA driver says: (name, bytes, driver's version) of each GPU; `problem` where its tool fails."""

    gpus: tuple[tuple[str, int, str], ...]
    problem: str | None


@dataclass(frozen=True, slots=True)
class Machine:
    python: str
    system: str
    cpu: Cpu
    memory: Memory
    disks: tuple[Disk, ...]
    driver: Driver | None  # None: there is no nvidia-smi


def read_machine(folder: Path, root: Path = ROOT) -> Machine:
    """Return what this machine is, seen from a process that works in `folder`. Raises nothing: what is not told is left open."""
    python = f"{platform.python_version()} ({platform.python_implementation()}, {platform.architecture()[0]})"
    system = f"{platform.system()} {platform.release()} on {platform.machine()}"
    disks = (_disk("this folder", folder), _disk("downloads", hub_cache()), _disk("kernels", kernel_cache()))
    return Machine(python, system, read_cpu(root), read_memory(root), disks, read_driver())


def read_cpu(root: Path = ROOT) -> Cpu:
    first: dict[str, str] = {}
    for line in _text(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        first.setdefault(name.strip().lower(), value.strip())
    flags = set((first.get("flags") or first.get("features") or "").split())
    features = tuple(word for flag, word in FEATURES.items() if flag in flags)
    if not flags and platform.machine() in ("arm64", "aarch64"):
        features = ("NEON",)  # every 64-bit ARM processor has it
    model = first.get("model name") or _mac_model() or platform.processor() or platform.machine() or "unknown"
    present = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else present
    return Cpu(model, features, present, allowed, _quota(root))


def read_memory(root: Path = ROOT) -> Memory:
    lines = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE))
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = int(lines["MemTotal"]) * 1024 if "MemTotal" in lines else pages
    available = int(lines["MemAvailable"]) * 1024 if "MemAvailable" in lines else None
    found: list[tuple[int, int]] = []
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        for group in _groups(root, "memory"):
            said = _text(group / limit).strip()
            if said.isdecimal() and int(said) < min(total, NO_LIMIT):
                now = _text(group / used).strip()
                found.append((int(said), int(now) if now.isdecimal() else 0))
    limit, in_use = min(found, default=(None, None), key=lambda pair: pair[0] - pair[1])
    return Memory(total, available, limit, in_use)


def read_driver() -> Driver | None:
    """Return what `nvidia-smi` says; None where there is no such tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Driver((), f"nvidia-smi does not run: {error}")
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    if done.returncode != 0 or any(len(row) != 3 or not row[1].isdecimal() for row in rows):
        said = (done.stdout + done.stderr).strip().splitlines()
        return Driver((), f"nvidia-smi fails: {said[0] if said else f'status {done.returncode}'}")
    return Driver(tuple((name, int(mib) * 2**20, version) for name, mib, version in rows), None)


def hub_cache() -> Path:
    """Return where the hub's client keeps downloads."""
    home = os.environ.get("HF_HOME") or str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def kernel_cache() -> Path:
    """Return where compiled kernels are kept, as `model/kernels/native.py` chooses it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kivnun" / "kernels"


def version_of(package: str) -> str | None:
    """Return the installed version of a package, from its metadata: nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _disk(what: str, path: Path) -> Disk:
    existing = next((place for place in (path, *path.absolute().parents) if place.exists()), Path(path.anchor or "."))
    try:
        free = shutil.disk_usage(existing).free
    except OSError:
        free = 0
    return Disk(what, path, free, os.access(existing, os.W_OK | os.X_OK))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups, of version 2 and of a controller of version 1, from its own outwards."""
    place = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names and controller not in names.split(","):
            continue
        top = place / controller if names else place
        steps = [step for step in path.split("/") if step and step != ".."]
        yield from (top.joinpath(*steps[:count]) for count in range(len(steps), -1, -1))


def _quota(root: Path) -> float | None:
    """Return how many cores' time the control groups give, the least of them; None without a limit."""
    found: list[float] = []
    for group in _groups(root, "cpu"):
        words = _text(group / "cpu.max").split()
        if not words:
            words = [_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def _mac_model() -> str | None:
    if platform.system() != "Darwin":
        return None
    try:
        said = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() or None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
