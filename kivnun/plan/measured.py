"""The measured table as the advisor reads it: what each method got on each task, what it cost, what a step of it took.

`measured.json` comes with the package, made of the committed table by `scripts/measured_table.py`; a `matrix.json` that `kivnun
matrix` wrote is read as well. Next: `advise.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kivnun.errors import SpecError

SHIPPED = Path(__file__).parent / "measured.json"


@dataclass(frozen=True, slots=True)
class Score:
    """What a method got on a task. `gain` is over the base and `to_full` over full tuning, both positive where better, with 95 %
    intervals."""

    score: float
    gain: float
    gain_interval: tuple[float, float]
    to_full: float
    to_full_interval: tuple[float, float]
    learning_rate: float


@dataclass(frozen=True, slots=True)
class Task:
    """A task's metric, the base's score, and every method's."""

    name: str
    row: int
    title: str
    metric: str
    higher_is_better: bool
    base: float
    methods: Mapping[str, Score]


@dataclass(frozen=True, slots=True)
class MeasuredTable:
    """The table: its tasks, and each method's CPU seconds of a step over LoRA's."""

    date: str
    command: str
    base: str
    scale: str
    seeds: int
    machine: str
    tasks: Mapping[str, Task]
    slower: Mapping[str, float]


def slim(matrix: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a matrix.json what the advisor reads, figures as they stand there."""
    kept = tuple(Score.__dataclass_fields__)
    steps = {name: its["cpu_s"] for cell in matrix["resources"]["memory"].values() for name, its in cell["figures"].items()}
    return {
        **{name: matrix[name] for name in ("version", "scale", "date", "command", "base", "seeds", "machine")},
        "tasks": [
            {
                **{name: table[name] for name in ("task", "row", "title", "metric", "higher_is_better", "base")},
                "methods": {name: {key: its[key] for key in kept} for name, its in table["methods"].items()},
            }
            for table in matrix["scores"]
        ],
        "step_cpu_s": steps,
    }


def read_table(path: Path | None = None) -> MeasuredTable:
    """Return the table in a `matrix.json` (or a slim one), by default the one that comes with the package. Raises SpecError."""
    try:
        held = json.loads((path or SHIPPED).read_text(encoding="utf-8"))
        held = held if "step_cpu_s" in held else slim(held)
        return _table(held)
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}", hint="give the matrix.json of kivnun matrix") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(f"{path} is no matrix.json: {error!r}", hint="give the matrix.json of kivnun matrix") from error


def _table(held: Mapping[str, Any]) -> MeasuredTable:
    tasks = {
        it["task"]: Task(
            it["task"],
            it["row"],
            it["title"],
            it["metric"],
            it["higher_is_better"],
            it["base"],
            {name: score_of(found) for name, found in it["methods"].items()},
        )
        for it in held["tasks"]
    }
    step = held["step_cpu_s"]
    return MeasuredTable(
        held["date"],
        held["command"],
        held["base"],
        held["scale"],
        held["seeds"],
        ", ".join(f"{value}" for value in held["machine"].values()),
        tasks,
        {name: seconds / step["lora"] for name, seconds in step.items()},
    )


def told_apart(score: Score, best: Score) -> bool:
    """Return whether a score is behind the best one by more than what is left open: neither interval of the difference to full
    tuning reaches the other's figure."""
    return score.to_full_interval[1] <= best.to_full and best.to_full_interval[0] >= score.to_full


def score_of(found: Mapping[str, Any]) -> Score:
    """Return a method's score as `matrix.json` holds it."""
    low, high = found["gain_interval"]
    to_low, to_high = found["to_full_interval"]
    return Score(found["score"], found["gain"], (low, high), found["to_full"], (to_low, to_high), found["learning_rate"])
