"""The cells of rows 1 to 6 for the columns that say what is trained, computed from finished jobs.

Next: `sharding.py` (the other columns).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kivnun.data.scenarios import Scenario
from kivnun.evaluate.intervals import Interval
from kivnun.matrix.jobs import Done, Job, read_done
from kivnun.matrix.methods import METHODS
from kivnun.matrix.plan import COST_TASK, Scale, chosen_rate, confirmed_rates, cost_seeds
from kivnun.matrix.statistics import effect_over_seeds, ratio_interval
from kivnun.matrix.table import Cell, judged, least_favourable
from kivnun.plan.techniques import COLUMNS

COST_SHARE = 0.8  # of what full tuning takes off the loss: the fixed loss to which cost is counted


def task_cells(folder: Path, scale: Scale) -> list[Cell]:
    """Return the cells of rows 1 to 5: score against the base, with full tuning at equal tokens beside it."""
    cells: list[Cell] = []
    for row in sorted({scenario.table_row for scenario in scale.scenarios}):
        tasks = [scenario for scenario in scale.scenarios if scenario.table_row == row]
        for technique, methods in COLUMNS.items():
            offered = [method for method in methods if method in scale.methods]
            found = {method: {task.name: scored(folder, scale, task, method) for task in tasks} for method in offered}
            cells.append(_task_cell(folder, scale, row, technique, tasks, found))
    return cells


def scored(folder: Path, scale: Scale, task: Scenario, method: str) -> dict[str, Any]:
    """Return what a method got on a task: score, difference to base and to full tuning, with intervals over rows and seeds."""
    metric = task.main_metric
    runs = score_runs(folder, scale, task.name, method)
    base = _base(folder, scale, task.name, METHODS[method].precision)
    point, interval = effect_over_seeds([base.measures[metric]], [done.measures[metric] for done in runs])
    whole = score_runs(folder, scale, task.name, "full")
    beside, beside_interval = effect_over_seeds([d.measures[metric] for d in whole], [d.measures[metric] for d in runs])
    return {
        "metric": metric,
        "higher_is_better": task.higher_is_better,
        "score": float(np.mean([done.figures[metric] for done in runs])),
        "by_seed": [done.figures[metric] for done in runs],
        "base": base.figures[metric],
        "gain": point,
        "gain_interval": list(interval),
        "to_full": beside,
        "to_full_interval": list(beside_interval),
        "learning_rate": runs[0].job.rate,
        "trained_tokens": runs[0].trained_tokens,
        "trainable": runs[0].trainable,
        "runs": [done.job.name for done in runs],
    }


def score_runs(folder: Path, scale: Scale, task: str, method: str) -> list[Done]:
    """Return the finished scoring runs of a method on a task, one per seed."""
    rate = chosen_rate(folder, scale, task, method)
    return [_done(folder, Job("score", task, method, rate, seed)) for seed in range(scale.seeds)]


def _task_cell(
    folder: Path, scale: Scale, row: int, technique: str, tasks: list[Scenario], found: Mapping[str, Mapping[str, dict[str, Any]]]
) -> Cell:
    effect = {
        method: least_favourable([Interval(*it["gain_interval"]) for it in by_task.values()]) for method, by_task in found.items()
    }
    merit = {method: float(np.mean([_merit(it) for it in by_task.values()])) for method, by_task in found.items()}
    best, worst = max(merit, key=lambda method: merit[method]), min(merit, key=lambda method: merit[method])
    measured: dict[str, Any] = {"method": best, **_without_runs(found[best])}
    if technique == "PEFT":
        measured = {
            "best": {"method": best, **_without_runs(found[best])},
            "worst": {"method": worst, **_without_runs(found[worst])},
        }
        measured["methods"] = list(found)
    runs = [run for by_task in found.values() for it in by_task.values() for run in it["runs"]]
    baseline = {
        task.name: {
            "base": _base(folder, scale, task.name, "fp32").figures[task.main_metric],
            "full": float(np.mean([d.figures[task.main_metric] for d in score_runs(folder, scale, task.name, "full")])),
        }
        for task in tasks
    }
    return Cell(row, technique, measured, baseline, effect[best], judged(row, technique, effect[best]), tuple(runs))


def _merit(scored: Mapping[str, Any]) -> float:
    """Return how far a method's score is above full tuning's, as a share of full tuning's gain: tasks of different scales can be
    put together so. Gains would not do: a quantised base may begin lower."""
    full = abs(scored["gain"] - scored["to_full"])
    return scored["to_full"] / full if full else scored["to_full"]


def _without_runs(by_task: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    return {task: {name: value for name, value in it.items() if name != "runs"} for task, it in by_task.items()}


def cost_cells(folder: Path, scale: Scale, prices: Mapping[str, float]) -> list[Cell]:
    """Return the cells of row 6: CPU time (and money) to a fixed validation loss, as a ratio to full tuning's; each method at the
    rate that gets there at the least."""
    target = _target(folder, scale)
    runs_of = {method: _cheapest_runs(folder, scale, method, target) for method in scale.methods}
    spent = {method: [_cpu_to(done, target) for done in runs] for method, runs in runs_of.items()}
    full = spent["full"]
    assert all(seconds is not None for seconds in full), "the loss is one that full tuning passes"
    cells: list[Cell] = []
    for technique, methods in COLUMNS.items():
        offered = [method for method in methods if method in scale.methods]
        found = {method: {"learning_rate": runs_of[method][0].job.rate, **_cost(spent[method], full, prices)} for method in offered}
        ranked = sorted(offered, key=lambda method: found[method]["ratio_to_full"] or np.inf)
        best, worst = ranked[0], ranked[-1]
        effect = found[best].pop("effect")
        for other in offered:
            found[other].pop("effect", None)
        measured: dict[str, Any] = {"method": best, **found[best]}
        if technique == "PEFT":
            measured = {"best": {"method": best, **found[best]}, "worst": {"method": worst, **found[worst]}, "methods": offered}
        measured |= {"task": COST_TASK, "target_nll": target}
        baseline = {"full_cpu_s": float(np.mean([s for s in full if s is not None])), **_money(full, prices)}
        runs = tuple(done.job.name for method in offered for done in runs_of[method])
        cells.append(Cell(6, technique, measured, baseline, effect, judged(6, technique, effect), runs))
    return cells


def _cheapest_runs(folder: Path, scale: Scale, method: str, target: float) -> list[Done]:
    """Return a method's runs, one per seed, at the rate at which most of them reach the target, the cheapest of such rates."""

    def rank(runs: list[Done]) -> tuple[int, float]:
        spent = [seconds for done in runs if (seconds := _cpu_to(done, target)) is not None]
        return -len(spent), sum(spent)

    return min((_cost_runs(folder, scale, method, r) for r in confirmed_rates(folder, scale, COST_TASK, method)), key=rank)


def _cost_runs(folder: Path, scale: Scale, method: str, rate: float) -> list[Done]:
    """Return the finished runs that looked at their loss on the way, one per seed."""
    return [_done(folder, Job("cost", COST_TASK, method, rate, seed)) for seed in range(cost_seeds(scale))]


def _target(folder: Path, scale: Scale) -> float:
    """Return the loss at which COST_SHARE of full tuning's gain is had, the worst seed deciding."""
    runs = _cost_runs(folder, scale, "full", chosen_rate(folder, scale, COST_TASK, "full"))
    before = runs[0].base["nll"]
    return before - COST_SHARE * (before - max(done.figures["nll"] for done in runs))


def _cpu_to(done: Done, target: float) -> float | None:
    """Return the CPU seconds of training until the loss was first at the target, between two looks in proportion; None: never."""
    before_nll, before_cpu = done.base["nll"], 0.0
    for step, nll, cpu_s in done.trace:
        if step == 0:
            continue
        if nll <= target:
            share = (before_nll - target) / (before_nll - nll) if before_nll > nll else 1.0
            return before_cpu + share * (cpu_s - before_cpu)
        before_nll, before_cpu = nll, cpu_s
    return None


def _cost(seconds: list[float | None], full: list[float | None], prices: Mapping[str, float]) -> dict[str, Any]:
    """Return a method's cost. One that never reaches the loss costs without end: its effect is as bad as can be."""
    if any(s is None for s in seconds):
        never = {
            "cpu_s": None,
            "ratio_to_full": None,
            "ratio_interval": None,
            "seeds_that_reached": sum(s is not None for s in seconds),
        }
        return {**never, "effect": Interval(-1.0, -1.0)}
    ratios = [mine / theirs for mine, theirs in zip(seconds, full, strict=True) if mine is not None and theirs is not None]
    low, high = ratio_interval(ratios)
    mean = float(np.exp(np.mean(np.log(ratios))))
    cpu = {"cpu_s": float(np.mean([s for s in seconds if s is not None])), **_money(seconds, prices)}
    return {**cpu, "ratio_to_full": mean, "ratio_interval": [low, high], "effect": Interval(1 - high, 1 - low)}


def _money(seconds: list[float | None], prices: Mapping[str, float]) -> dict[str, float]:
    price = prices.get("cpu_core_hour")
    return {} if price is None else {"money": float(np.mean([s for s in seconds if s is not None])) / 3600 * price}


def _base(folder: Path, scale: Scale, task: str, precision: str) -> Done:
    methods = [method for method in scale.methods if METHODS[method].precision == precision]
    for method in methods:
        done = read_done(folder, Job("base", task, method))
        if done is not None:
            return done
    raise AssertionError(f"the base is not scored on {task} in {precision}")


def _done(folder: Path, job: Job) -> Done:
    done = read_done(folder, job)
    assert done is not None, f"{job.name} is not done"
    return done
