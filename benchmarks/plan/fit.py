"""Fits the rates of `kivnun/plan/time.py` to a calibration: `python -m benchmarks.plan.fit FILE` prints its table `SECONDS`.

Each measured time is a sum of counted amounts at their rates, at the speed that the core had between the steps. Steps (the first
left out) count by their relative errors, the scoring of rows and replies less than steps. No rate may be negative. A rate that both
precisions share is fitted to both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.plan.cases import NEW_TOKENS, PROMPTS, SCORED_ROWS, SCORED_SHARE, Case
from benchmarks.plan.measure import Record
from kivnun.plan.memory import COMPUTE_BYTES, Shape
from kivnun.plan.techniques import adapter_of
from kivnun.plan.time import REFERENCE_FLOPS, SHARED, generation_amounts, scoring_amounts, training_amounts, work_of

LESS = 0.4  # the weight of what is not a step


@dataclass(frozen=True, slots=True)
class Timed:
    """What was counted and what it took, in seconds of the reference's core."""

    name: str
    number: int  # bytes of a number that is computed with
    amounts: dict[str, float]
    seconds: float
    weight: float = 1.0


def timed(case: Case, processes: list[dict[str, Any]]) -> Iterator[Timed]:
    """Yield the times of a case's largest process."""
    its, sizes, spec, number = processes[0], case.sizes, adapter_of(case.kind), COMPUTE_BYTES[case.precision]
    speeds = [flops / REFERENCE_FLOPS[number] for flops in its["flops"]]
    own = [lengths[:: case.processes] for lengths in case.step_lengths()]
    work = work_of(own[1:], case.pass_tokens, SCORED_SHARE)
    shape = Shape(case.precision, work.pass_tokens, "cpu", case.recompute, case.processes, case.zero_stage, case.packed)
    around = [(before + after) / 2 for before, after in pairwise(speeds)]
    steps = sum(seconds * speed for seconds, speed in zip(its["step_cpu_s"][1:], around[1:], strict=True))
    yield Timed(case.name, number, training_amounts(sizes, spec, shape, work), steps)
    if case.processes == 1:
        flat, speed = case.lengths(), median(speeds)
        held_out = work_of([flat[:SCORED_ROWS]], case.pass_tokens, SCORED_SHARE)
        yield Timed(f"{case.name}: scored", number, scoring_amounts(sizes, spec, shape, held_out), its["score_cpu_s"] * speed, LESS)
        told = generation_amounts(sizes, spec, shape, [length // 2 for length in flat[:PROMPTS]], NEW_TOKENS)
        yield Timed(f"{case.name}: replies", number, told, its["generate_cpu_s"] * speed, LESS)


def fitted(points: list[Timed]) -> dict[str, dict[int, float]]:
    """Return the rates, by kind and bytes of a number, that are nearest in least squares of relative errors."""
    keys = sorted({(name, 0 if name in SHARED else it.number) for it in points for name in it.amounts})
    weights = np.array([it.weight for it in points])
    shares = weights[:, None] * np.array([[_amount(it, *key) / it.seconds for key in keys] for it in points])
    scale = shares.max(axis=0)
    kept = np.flatnonzero(scale > 0)
    while True:
        found = np.linalg.lstsq(shares[:, kept] / scale[kept], weights, rcond=None)[0]
        if (found >= 0).all():
            break
        kept = np.delete(kept, found.argmin())
    rates = np.zeros(len(keys))
    rates[kept] = found / scale[kept]
    table: dict[str, dict[int, float]] = {}
    for (name, number), rate in zip(keys, rates, strict=True):
        for one in (number,) if number else (2, 4):
            table.setdefault(name, {2: 0.0, 4: 0.0})[one] = float(f"{rate:.3g}")
    return table


def _amount(it: Timed, name: str, number: int) -> float:
    return it.amounts.get(name, 0.0) if number in (0, it.number) else 0.0


def main(file: Path) -> None:
    record = Record.read(file)
    assert record is not None
    points = [it for held in record.points.values() for it in timed(Case(**held["case"]), held["processes"])]
    table = fitted(points)
    for name, rates in table.items():
        print(f'    "{name}": {rates},')
    off = {it.name: sum(table[name][it.number] * amount for name, amount in it.amounts.items()) / it.seconds - 1 for it in points}
    for what in ("steps", "scored", "replies"):
        its = {name: it for name, it in off.items() if (name.rpartition(": ")[2] if ": " in name else "steps") == what}
        print(f"# {what}: {len(its)}, median error {median(map(abs, its.values())):.1%}")
        for name, it in sorted(its.items(), key=lambda pair: -abs(pair[1]))[:12]:
            print(f"#   {it:+.1%} {name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
