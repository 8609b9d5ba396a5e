"""The pointwise and attention kernels of the hot path: one set of operations, in torch and, for the CPU, in C.

`choose` picks a set when a base is loaded, by what is there and right, never by how fast it turns out to be; it stays the same for
the whole run and is part of the run's numeric environment. Next: `reference.py` (what each operation computes).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from kivnun.errors import ConfigError
from kivnun.model.kernels.native import CannotBuild, NativeKernels, build
from kivnun.model.kernels.reference import Angles, TorchKernels

__all__ = ["Angles", "Kernels", "KernelChoice", "choose"]

Kernels: TypeAlias = TorchKernels | NativeKernels
