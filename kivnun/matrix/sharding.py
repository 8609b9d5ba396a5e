"""The columns that say where numbers lie, DeepSpeed and ZeRO: the same losses as one process, what it costs, and bytes per process.

A run of several processes is the command line's own, so that what is measured is what a user gets. Next: `law.py` (bytes).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from kivnun.artifacts import atomic_write, make_folder
from kivnun.errors import KivnunError
from kivnun.events import StepDone, read_events
from kivnun.matrix.jobs import Job, spec_tree
from kivnun.matrix.methods import METHODS, SHARDED
from kivnun.matrix.plan import objective_of
from kivnun.matrix.statistics import mean_interval, ratio_interval
from kivnun.matrix.table import Cell, judged

STEPS = 6
WARM_STEPS = 2  # whose seconds do not count: buffers are made in them
TOLERANCE = 1e-5  # of a loss, relative: another order of sums
TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Sharded:
    """A few steps of full tuning on a task, by one process (stage None) or divided over several."""

    task: str
    stage: int | None
    processes: int
    losses: list[float]
    step_s: list[float]

    @property
    def name(self) -> str:
        return _name(self.task, self.stage, self.processes)


def _name(task: str, stage: int | None, processes: int) -> str:
    return f"sharded/{task}/{'one-process' if stage is None else f'stage-{stage}-of-{processes}'}"


def sharded_names(tasks: Sequence[str], stages: Sequence[int], counts: Sequence[int]) -> list[tuple[str, int | None, int]]:
    """Return (task, stage, processes) of every run there is to do, the unsharded one of each task first."""
    found: list[tuple[str, int | None, int]] = []
    for task in tasks:
        found.append((task, None, 1))
        found += [(task, stage, count) for stage in stages for count in counts]
    return found


def do_sharded(folder: Path, task: str, stage: int | None, processes: int) -> None:
    """Do one of these runs and keep what it said; one that is there already is left. Raises KivnunError when it failed."""
    name = _name(task, stage, processes)
    path = folder / "runs" / f"{name}.json"
    if path.is_file():
        return
    work = folder / "work" / name.replace("/", "_")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    spec = work / "spec.yaml"
    spec.write_text(yaml.safe_dump(_tree(folder, task, stage, processes), allow_unicode=True), encoding="utf-8")
    command = [sys.executable, "-m", "kivnun", "tune", str(spec), "--output", str(work / "run"), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise KivnunError(f"{name} failed: {done.stderr.strip()[-600:]}", hint="run the command again: what is done is kept")
    steps = [event for event in read_events(work / "run" / "events.jsonl") if isinstance(event, StepDone)]
    result = Sharded(task, stage, processes, [event.loss for event in steps], [event.seconds for event in steps])
    make_folder(path.parent)
    atomic_write(path, json.dumps(asdict(result)) + "\n")
    shutil.rmtree(work, ignore_errors=True)


def _tree(folder: Path, task: str, stage: int | None, processes: int) -> dict[str, Any]:
    rate = METHODS["full"].usual_rate(objective_of(task))
    tree = spec_tree(folder, Job("score", task, "full", rate))
    tree["data"]["validation"] = None
    tree["evaluation"] = {"samples": 0, "forgetting": None}
    tree["schedule"] = {**{k: v for k, v in tree["schedule"].items() if k not in ("epochs", "steps")}, "steps": STEPS}
    if stage is not None:
        tree["compute"] = {"kind": "multi_process", "device": "cpu", "threads": 1, "processes": processes, "zero_stage": stage}
    return tree


def read_sharded(folder: Path, task: str, stage: int | None, processes: int) -> Sharded:
    path = folder / "runs" / f"{_name(task, stage, processes)}.json"
    return Sharded(**json.loads(path.read_text(encoding="utf-8")))


def equality_cells(folder: Path, rows: dict[int, list[str]], counts: Sequence[int], stages: Sequence[int]) -> list[Cell]:
    """Return the cells of rows 1 to 5: how far the losses of a sharded run are from those of one process."""
    cells: list[Cell] = []
    for row, tasks in rows.items():
        for technique, its in SHARDED.items():
            runs = [read_sharded(folder, task, stage, n) for task in tasks for stage in its if stage in stages for n in counts]
            apart = {run.name: _apart(run, read_sharded(folder, run.task, None, 1)) for run in runs}
            worst = max(apart.values())
            measured = {
                "largest_relative_difference_of_a_loss": worst,
                "allowed": TOLERANCE,
                "equal": worst <= TOLERANCE,
                "steps": STEPS,
                "stages": sorted({run.stage for run in runs if run.stage is not None}),
                "processes": sorted({run.processes for run in runs}),
            }
            baseline = {"unsharded": "the same run by one process, from the same weights"}
            names = (*apart, *(_name(task, None, 1) for task in tasks))
            cells.append(Cell(row, technique, measured, baseline, None, "not_applicable", names))
    return cells


def _apart(run: Sharded, one: Sharded) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(run.losses, one.losses, strict=True))


def sharded_cost_cells(folder: Path, tasks: Sequence[str], counts: Sequence[int], stages: Sequence[int]) -> list[Cell]:
    """Return the cells of row 6: core-seconds of a step over all processes, as a ratio to one process. The losses are the same, so
    that the cost to a fixed loss is the cost of a step."""
    cells: list[Cell] = []
    for technique, its in SHARDED.items():
        found: dict[str, dict[str, Any]] = {}
        names: list[str] = []
        for stage in (stage for stage in its if stage in stages):
            for count in counts:
                runs = [(read_sharded(folder, task, stage, count), read_sharded(folder, task, None, 1)) for task in tasks]
                ratios = [_core_seconds(run) / _core_seconds(one) for run, one in runs]
                interval = ratio_interval(ratios)
                mean = float(np.exp(np.mean(np.log(ratios))))
                found[f"stage {stage}, {count} processes"] = {"ratio_to_one_process": mean, "ratio_interval": list(interval)}
                names += [part.name for pair in runs for part in pair]
        best = min(found.values(), key=lambda it: it["ratio_to_one_process"])
        low, high = best["ratio_interval"]
        effect = mean_interval(1 - high, 1 - low)
        measured = {**found, "of": "core-seconds of a step, all processes together, over several tasks on one machine"}
        baseline = {"unsharded": "one process"}
        cells.append(Cell(6, technique, measured, baseline, effect, judged(6, technique, effect), tuple(dict.fromkeys(names))))
    return cells


def _core_seconds(run: Sharded) -> float:
    return float(np.median(run.step_s[WARM_STEPS:])) * run.processes


OnDone = Callable[[str], None]


def do_all_sharded(folder: Path, runs: Sequence[tuple[str, int | None, int]], on_done: OnDone) -> None:
    """Do the runs one after the other: each takes the whole machine."""
    for task, stage, processes in runs:
        do_sharded(folder, task, stage, processes)
        on_done(_name(task, stage, processes))
