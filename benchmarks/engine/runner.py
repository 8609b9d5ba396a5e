"""Starts each case as a process of its own, one after the other, in rounds in which the sides take turns.

A round's cases run within the same minutes, so that a noisy machine disturbs all of them; ratios are taken per round. Whoever
computes something else than the others ends the benchmark at once. Next: `summary.py` (what is made of the runs).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engine.cases import ONE_PROCESS, Case, to_json

MODULES = {"ours": "benchmarks.engine.ours", "trl": "benchmarks.engine.peers"}
ROOT = Path(__file__).parents[2]
TIMEOUT_S = 3600

# How far apart the first step's loss and gradient norm may be, relative; both sides start from the same numbers.
FIRST_LOSS = {"fp32": 1e-5, "bf16": 1e-3}
FIRST_NORM = {"fp32": 1e-4, "bf16": 2e-2}


class ProcessFailed(RuntimeError):
    """A process ended without a result; the message is the last line of what it said."""


class DifferentMathematics(RuntimeError):
    """Two sides that should compute the same do not: any comparison of their speed would be worthless."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one process measured of itself, step by step, the first step included."""

    tokens: list[int]
    cpu_s: list[float]
    wall_s: list[float]
    loss: list[float]
    grad_norm: list[float]
    rss_before_bytes: int
    rss_peak_bytes: int
    versions: dict[str, str]
    linear_bytes: int | None = None
    keeps_freed_memory: bool | None = None  # ours: whether the allocator took its thresholds

    def rate(self, clock: str) -> float:
        """Return tokens per second of "cpu_s" or "wall_s", the first step left out."""
        return sum(self.tokens[1:]) / sum({"cpu_s": self.cpu_s, "wall_s": self.wall_s}[clock][1:])


@dataclass(frozen=True, slots=True)
class Failed:
    """A case that could not run, and why."""

    reason: str


@dataclass(slots=True)
class Results:
    """All runs by (group, name) and round, the floor's rates (operations per second) by model, what went wrong, and how many
    processes of others wanted the processor when the first case began."""

    runs: dict[tuple[str, str], dict[int, Run]] = field(default_factory=dict)
    floors: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)
    load: float = 0.0

    def of(self, group: str, name: str) -> dict[int, Run]:
        return self.runs.get((group, name), {})

    def add(self, case: Case, round_number: int, run: Run) -> None:
        self.runs.setdefault((case.group, case.name), {})[round_number] = run

    def add_floor(self, model: str, rates: dict[str, float]) -> None:
        """Keep the best rate seen: a disturbed moment makes the floor look slower than it is, never faster."""
        known = self.floors.setdefault(model, {})
        for precision, rate in rates.items():
            known[precision] = max(rate, known.get(precision, 0.0))


def turns(cases: Sequence[Case]) -> Iterator[tuple[int, list[Case]]]:
    """Yield (round, cases of one process) group by group, every round of a group in the order of its cases."""
    for group in dict.fromkeys(case.group for case in cases):
        members = [case for case in cases if case.group == group]
        for number in range(max(case.rounds for case in members)):
            due = [case for case in members if number < case.rounds]
            yield from [(number, due)] if group == ONE_PROCESS else [(number, [case]) for case in due]


def run_all(
    cases: Sequence[Case],
    start: Callable[[list[Case]], list[Run | Failed]],
    floor: Callable[[str], dict[str, float]],
    on_progress: Callable[[str], None] = lambda _: None,
) -> Results:
    """Return the results of all cases. Raises DifferentMathematics as soon as two sides disagree at the first step.

    A case that cannot run is recorded with its reason and not tried again. The floor is measured at the start of each round.
    """
    results = Results(load=os.getloadavg()[0])
    measured: set[tuple[str, int]] = set()
    for number, due in turns(cases):
        first = due[0]
        if first.group in ("main", "wide") and (first.model, number) not in measured:
            measured.add((first.model, number))
            on_progress(f"{first.group}: floor")
            results.add_floor(first.model, floor(first.model))
        able = [case for case in due if (case.group, case.name) not in results.failures]
        on_progress(f"{first.group}: {' '.join(case.name for case in able) if len(able) < 3 else f'{len(able)} in turns'}")
        for case, outcome in zip(able, start(able) if able else [], strict=True):
            if isinstance(outcome, Failed):
                results.failures[case.group, case.name] = outcome.reason
                continue
            results.add(case, number, outcome)
            check_first_step(cases, results, case, outcome)
    return results


def check_first_step(cases: Sequence[Case], results: Results, case: Case, run: Run) -> None:
    """Raise DifferentMathematics unless the run starts with the loss and the norm of every other such run on the same work."""
    if not case.same_mathematics:
        return
    for other in cases:
        same_work = (other.model, other.rows, other.precision) == (case.model, case.rows, case.precision)
        if not (same_work and other.same_mathematics):
            continue
        for reference in results.of(other.group, other.name).values():
            _refuse_difference(case, run, other, reference)


def _refuse_difference(case: Case, run: Run, other: Case, reference: Run) -> None:
    steps = min(len(run.tokens), len(reference.tokens))
    if run.tokens[:steps] != reference.tokens[:steps]:
        raise DifferentMathematics(f"{case.name} saw {run.tokens} tokens, {other.name} {reference.tokens}")
    for what, mine, theirs, limit in (
        ("loss", run.loss[0], reference.loss[0], FIRST_LOSS[case.precision]),
        ("gradient norm", run.grad_norm[0], reference.grad_norm[0], FIRST_NORM[case.precision]),
    ):
        if not abs(mine - theirs) <= limit * abs(theirs):
            text = f"{case.group}/{case.name} begins with {what} {mine!r}, {other.group}/{other.name} with {theirs!r}"
            raise DifferentMathematics(f"{text}: more than {limit} apart, so they do not compute the same")


def start_process(cases: list[Case], work: Path) -> list[Run | Failed]:
    """Return what each of the cases came to in a process of their own."""
    first = cases[0]
    try:
        said = _last_line([MODULES[first.side], to_json(cases, str(work))], first.environment)
    except ProcessFailed as failure:
        return [Failed(str(failure)) for _ in cases]
    return [Failed(run["failed"]) if "failed" in run else Run(**run) for run in said]


def measure_floor(model: str, threads: int = 1) -> dict[str, float]:
    count = str(threads)
    return _last_line(["benchmarks.engine.floor", model, count], {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count})


def write_workloads(work: Path, models: Sequence[str]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    _run(["benchmarks.engine.workload", str(work), *models], {})


def _last_line(arguments: Sequence[str], environment: dict[str, str]) -> Any:
    return json.loads(_run(arguments, environment).splitlines()[-1])


def _run(arguments: Sequence[str], environment: dict[str, str]) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ProcessFailed(said[-1] if said else f"ended with status {done.returncode}")
    return done.stdout
