"""Settings of this process that must be made before numeric libraries load: the allocator's thresholds and the thread count.

Only the command line (and later the workers) call these, never an import of the package: a program that uses Kivnun as a
library owns its process.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

# glibc's names for mallopt(3), from malloc.h.
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> bool:
    """Make glibc reuse freed memory instead of handing it back to the kernel; return whether all thresholds were taken.

    By default every tensor of more than a few MiB is mapped, page-faulted in and unmapped again at each step: measured at up
    to 44 % of a step's CPU time in a virtual machine. The price is 7 to 20 % more resident memory. Does nothing elsewhere
    than on Linux with glibc, or where the user set an allocator of their own (LD_PRELOAD) or glibc's variables.
    """
    return _set_thresholds(((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1), (M_TOP_PAD, 64 << 20)))


def give_back_memory() -> bool:
    """Make glibc hand freed memory back to the kernel at once; return whether all thresholds were taken.

    For processes that divide state: they gather and free tensors all the time, and by default glibc stops mapping them one by one
    and keeps the holes, which hides most of what dividing saves (docs/concepts/zero.md). Does nothing where `keep_freed_memory`
    would do nothing.
    """
    return _set_thresholds(((M_MMAP_THRESHOLD, 1 << 18), (M_TRIM_THRESHOLD, 1 << 18)))


def _set_thresholds(wanted: tuple[tuple[int, int], ...]) -> bool:
    own_choice = ("LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
    if not sys.platform.startswith("linux") or any(os.environ.get(name) for name in own_choice):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl and other C libraries have no mallopt
        return False
    taken = [mallopt(name, value) for name, value in wanted]
    return all(answer == 1 for answer in taken)


def keep_deepspeed_quiet() -> None:
    """Tell DeepSpeed that there is no GPU, where there is none: it would say so on stdout, which is for data, as soon as
    transformers saves a model, since that imports it wherever it is installed."""
    if not any(Path(place).exists() for place in ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/nvidia-uvm")):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def set_threads(threads: int | None) -> None:
    """Give OpenMP and MKL their thread count, when the spec names one; they read it once, when torch is imported."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
