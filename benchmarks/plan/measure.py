"""Starts the processes of cases, one case after the other, and keeps what each took. Loads no torch: the kernel counts a process's
peak from before it was started, when it is still as large as the one that starts it.

Next: `worker.py` (what is measured), `report.py` (what is made of it).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.plan.cases import Case
from kivnun.artifacts import atomic_write

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
TIMEOUT_S = 600  # of one case


@dataclass(frozen=True, slots=True)
class FoundOnce:
    """What a planner finds out once on a machine: how fast a core is by precision (each of two: "fp32 x 2"), and the bytes of a
    process at rest."""

    speed: dict[str, float]
    idle: float


@dataclass
class Record:
    """A file of what was measured: `points` by a case's name, each with the case and what its processes told; `more` is what was
    made of it."""

    file: Path
    found_once: FoundOnce
    points: dict[str, dict[str, Any]] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Record | None:
        """Return the record in a file; None where there is none."""
        if not file.is_file():
            return None
        held = json.loads(file.read_text(encoding="utf-8"))
        return cls(file, FoundOnce(**held["found_once"]), held["points"])

    def has(self, case: Case) -> bool:
        return self.points.get(case.name, {}).get("case") == asdict(case)

    def save(self) -> None:
        """Write all, a point a line."""
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(point)}" for name, point in self.points.items())
        told = {"found_once": asdict(self.found_once), **self.more}
        rest = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in told.items())
        atomic_write(self.file, f'{{\n{rest} "points": {{\n{lines}\n }}\n}}\n')


def measure(cases: Sequence[Case], record: Record, models: Path, tell: Callable[[str], None]) -> None:
    """Measure the cases that the record lacks, and write each as it is known."""
    for case in cases:
        if not record.has(case):
            record.points[case.name] = {"case": asdict(case), **run(case, _model(case.model, models))}
            record.save()
        tell(case.name)


def run(case: Case, model: Path) -> dict[str, Any]:
    """Return what the processes of a case measured."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "measured.json"
        worker = ["-m", "benchmarks.plan.worker", str(model), json.dumps(asdict(case)), str(out)]
        together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.processes)]
        command = [sys.executable, *(together if case.processes > 1 else []), *worker]
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode:
            raise SystemExit(f"{case.name} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
        return json.loads(out.read_text(encoding="utf-8"))


def _model(name: str, models: Path) -> Path:
    """Return the folder of a model, which a process of its own writes where it is not there yet."""
    folder = models / name
    if not (folder / "config.json").is_file():
        subprocess.run([sys.executable, "-m", "benchmarks.plan.models", str(folder), name], check=True, env=_environment())
    return folder


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return kept | ENVIRONMENT
