"""Bytes of a process when N of them divide a run: launches the cases and fits the law a + b / N.

Next: `law_worker.py` (what is measured).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kivnun.matrix.law_cases import MODELS, Case

MIB = 2**20
# What the command line sets from within where state is divided (docs/concepts/zero.md); glibc reads these from outside.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18), "MALLOC_TRIM_THRESHOLD_": str(1 << 18)}


@dataclass(frozen=True, slots=True)
class Law:
    """Memory of a process in MiB as a function of the number of processes: `fixed + divided / N`, off by `residual` at most."""

    fixed: float
    divided: float
    residual: float

    def at(self, count: int) -> float:
        return self.fixed + self.divided / count


def fit(peaks: dict[int, float]) -> Law:
    """Return the law nearest to the peaks (MiB by number of processes), in least squares."""
    inverse = [1 / count for count in peaks]
    mean_x, mean_y = sum(inverse) / len(inverse), sum(peaks.values()) / len(peaks)
    pairs = list(zip(inverse, peaks.values(), strict=True))
    divided = sum((x - mean_x) * (y - mean_y) for x, y in pairs) / sum((x - mean_x) ** 2 for x in inverse)
    fixed = mean_y - divided * mean_x
    return Law(fixed, divided, max(abs(fixed + divided * x - y) for x, y in pairs))


def write_model(folder: Path, name: str) -> Path:
    """Save the model once, in a process of its own, so that this one loads no torch."""
    place = folder / name
    if not (place / "config.json").is_file():
        subprocess.run([sys.executable, "-m", "kivnun.matrix.law_model", str(place), name], check=True, env=_environment())
    return place


def launch(case: Case, folder: Path, out: Path) -> dict[str, Any]:
    """Run a case and return what its processes measured. Raises CalledProcessError with what they said."""
    worker = ["-m", "kivnun.matrix.law_worker", str(write_model(folder, case.model)), json.dumps(asdict(case)), str(out)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.processes), *worker]
    subprocess.run(command, check=True, env=_environment(), capture_output=True, text=True, timeout=900)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def peak_mib(measured: dict[str, Any], what: str = "peak") -> float:
    """Return the most that any of the processes took, or of another of its figures."""
    return max(its[what] for its in measured["processes"]) / MIB


def weights_mib(model: str) -> float:
    """Return the size of a model's weights in float32."""
    return 4 * MODELS[model].parameters / MIB


def laws(measured: Sequence[tuple[Case, dict[str, Any]]], what: str = "peak") -> dict[str, tuple[dict[int, float], Law | None]]:
    """Return, by group, the peaks (or another figure) by number of processes, and their law where there are two or more."""
    groups: dict[str, dict[int, float]] = {}
    for case, its in measured:
        groups.setdefault(case.group, {})[case.processes] = peak_mib(its, what)
    return {group: (peaks, fit(peaks) if len(peaks) > 1 else None) for group, peaks in groups.items()}


def _environment() -> dict[str, str]:
    return {**os.environ, **GIVE_BACK, "OMP_NUM_THREADS": "1"}
