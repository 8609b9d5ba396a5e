"""The whole table, from an empty folder to matrix.json and matrix.html; what is done already is taken as it is.

    data -> bases scored -> sweeps -> scores -> cost -> sharded runs -> bytes -> counts -> 54 cells -> page

Next: `plan.py` (which runs), `cells.py`, `sharding.py`, `resources.py` (the cells), `page.py`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from kivnun.artifacts import atomic_write
from kivnun.errors import RunFolderError
from kivnun.matrix import resources
from kivnun.matrix.cells import cost_cells, score_runs, scored, task_cells
from kivnun.matrix.machine import machine_facts
from kivnun.matrix.page import render
from kivnun.matrix.plan import FULL, QUICK, Scale, base_jobs, confirm_jobs, cost_jobs, score_jobs, sweep_jobs
from kivnun.matrix.sharding import do_all_sharded, equality_cells, sharded_cost_cells, sharded_names
from kivnun.matrix.table import TECHNIQUES, Cell
from kivnun.matrix.work import do_all

VERSION = 1
BASE = "kivnun/tiny-phi"


class Screen(Protocol):
    """Hears how far the work is: `stage` begins a part of so many units, `done` ends one of them."""

    def stage(self, title: str, units: int) -> None: ...

    def done(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Sharding:
    """What is asked of several processes: ZeRO stages and numbers of processes."""

    stages: tuple[int, ...]
    counts: tuple[int, ...]


def make_matrix(output: Path, *, quick: bool, prices: Mapping[str, float], screen: Screen, command: list[str]) -> dict[str, Any]:
    """Measure what is not measured yet in `output`, write matrix.json and matrix.html there, and return what matrix.json holds.

    Raises RunFolderError where the folder holds a table of the other scale or of other code for data.
    """
    scale = QUICK if quick else FULL
    sharding = Sharding((2, 3), (2,)) if quick else Sharding((1, 2, 3), (2,))
    _claim(output, quick)
    screen.stage("data", len(scale.tasks))
    for scenario in scale.scenarios:
        if not (output / "data" / scenario.name / "overlap.json").is_file():
            scenario.write(output / "data" / scenario.name)
        screen.done(scenario.name)
    stages: list[tuple[str, Callable[[], list[Any]]]] = [
        ("bases", lambda: base_jobs(scale)),
        ("learning rates", lambda: sweep_jobs(scale)),
        ("rates again", lambda: confirm_jobs(output, scale)),
        ("scores", lambda: score_jobs(output, scale)),
        ("cost", lambda: cost_jobs(output, scale)),
    ]
    for title, jobs_of in stages:
        jobs = jobs_of()
        screen.stage(title, len(jobs))
        do_all(output, jobs, screen.done)
    runs = sharded_names(scale.tasks, sharding.stages, sharding.counts)
    screen.stage("several processes", len(runs))
    do_all_sharded(output, runs, screen.done)
    measured = resources.measure(output, quick=quick, screen=screen)

    rows: dict[int, list[str]] = {}
    for scenario in scale.scenarios:
        rows.setdefault(scenario.table_row, []).append(scenario.name)
    cells = [
        *task_cells(output, scale),
        *equality_cells(output, rows, sharding.counts, sharding.stages),
        *cost_cells(output, scale, prices),
        *sharded_cost_cells(output, scale.tasks, sharding.counts, sharding.stages),
        *measured.cells,
    ]
    cells.sort(key=lambda cell: (cell.row, TECHNIQUES.index(cell.technique)))
    return _write(output, scale, quick, cells, measured, prices, command)


def _claim(output: Path, quick: bool) -> None:
    """Take the folder, or go on in it."""
    mark = output / "scale.json"
    said = {"version": VERSION, "quick": quick}
    if mark.is_file():
        before = json.loads(mark.read_text(encoding="utf-8"))
        if before != said:
            kind = "a quick" if before.get("quick") else "a full"
            raise RunFolderError(f"{output} holds {kind} table of version {before.get('version')}", hint="choose another --output")
        return
    if output.is_dir() and any(output.iterdir()):
        raise RunFolderError(f"{output} exists already and holds no table", hint="choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    atomic_write(mark, json.dumps(said) + "\n")


def _write(
    output: Path,
    scale: Scale,
    quick: bool,
    cells: list[Cell],
    measured: resources.Measured,
    prices: Mapping[str, float],
    command: list[str],
) -> dict[str, Any]:
    facts = machine_facts()
    scores = [_score_table(output, scale, scenario) for scenario in scale.scenarios]
    held = {
        "version": VERSION,
        "scale": "quick" if quick else "full",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": shlex.join(command),
        "base": BASE,
        "seeds": scale.seeds,
        "sweep": scale.sweep,
        "prices": dict(prices),
        "machine": facts,
        "cells": [cell.as_json() for cell in cells],
        "scores": scores,
        "resources": measured.record,
    }
    atomic_write(output / "matrix.json", json.dumps(held, indent=1, ensure_ascii=False) + "\n")
    said = {
        **{name: held[name] for name in ("date", "command", "base", "seeds", "sweep")},
        "scale": "quick look" if quick else f"{scale.seeds} seeds, learning rates chosen",
        "machine": " · ".join(f"{name}: {value}" for name, value in facts.items()),
        "base_parameters": measured.base_parameters,
    }
    atomic_write(output / "matrix.html", render(said, cells, scores, measured.sections))
    return held


def _score_table(output: Path, scale: Scale, scenario: Any) -> dict[str, Any]:
    methods = {method: scored(output, scale, scenario, method) for method in scale.methods}
    first = next(iter(methods.values()))
    return {
        "task": scenario.name,
        "row": scenario.table_row,
        "title": scenario.title,
        "metric": scenario.main_metric,
        "higher_is_better": scenario.higher_is_better,
        "base": first["base"],
        "train_seconds_cpu": {m: sum(d.cpu_s for d in score_runs(output, scale, scenario.name, m)) / scale.seeds for m in methods},
        "methods": methods,
    }
