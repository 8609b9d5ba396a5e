"""Which jobs a table takes: a quick one for a look, the full one to rely on. Next: `jobs.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kivnun.data.scenarios import SCENARIOS, Scenario, find_scenario
from kivnun.matrix.jobs import Job, read_done
from kivnun.matrix.methods import METHODS

COST_TASK = "translation"  # its loss falls steadily, so that a fixed one is passed once


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int
    sweep: bool

    @property
    def scenarios(self) -> tuple[Scenario, ...]:
        return tuple(find_scenario(task) for task in self.tasks)


FULL = Scale(tuple(scenario.name for scenario in SCENARIOS), tuple(METHODS), 3, sweep=True)
QUICK = Scale(
    ("domain", "translation", "question_answering", "chat", "melodies"),
    ("full", "lora", "qlora", "dora", "ia3", "prompt"),
    1,
    sweep=False,
)


def objective_of(task: str) -> str:
    """Return the objective that a task's rows are for, which its default learning rate hangs on."""
    return "supervised" if find_scenario(task).replies else "pretraining"


def base_jobs(scale: Scale) -> list[Job]:
    """Return the scoring of the base, in each precision that a method trains on."""
    by_precision = {METHODS[method].precision: method for method in reversed(scale.methods)}
    return [Job("base", task, method) for task in scale.tasks for method in by_precision.values()]


def sweep_jobs(scale: Scale) -> list[Job]:
    """Return a run per method, task and rate, scored on a part of the training rows. Empty where defaults are taken."""
    if not scale.sweep:
        return []
    return [
        Job("sweep", task, method, rate)
        for task in scale.tasks
        for method in scale.methods
        for rate in METHODS[method].rates(objective_of(task))
    ]


def confirm_jobs(folder: Path, scale: Scale) -> list[Job]:
    """Return a second run, of another seed, of the two rates that did best in the sweep: the largest rate that trains is the most
    likely to fail with another start."""
    if not scale.sweep:
        return []
    jobs: list[Job] = []
    for task in scale.tasks:
        for method in scale.methods:
            tried = {rate: _swept(folder, task, method, rate) for rate in METHODS[method].rates(objective_of(task))}
            jobs += [Job("sweep", task, method, rate, 1) for rate in sorted(tried, key=lambda rate: tried[rate])[:2]]
    return jobs


def score_jobs(folder: Path, scale: Scale) -> list[Job]:
    """Return a run per method, task and seed, at the rate that its sweep found best."""
    return [
        Job("score", task, method, chosen_rate(folder, scale, task, method), seed)
        for task in scale.tasks
        for method in scale.methods
        for seed in range(scale.seeds)
    ]


def cost_jobs(folder: Path, scale: Scale) -> list[Job]:
    """Return the runs that look at their loss on the way, on one task: at both rates that a sweep confirmed, since the rate that
    ends best need not be the one that gets there first."""
    return [
        Job("cost", COST_TASK, method, rate, seed)
        for method in scale.methods
        for rate in confirmed_rates(folder, scale, COST_TASK, method)
        for seed in range(cost_seeds(scale))
    ]


def cost_seeds(scale: Scale) -> int:
    """Return how many runs tell the cost of a method: one would have no interval."""
    return max(2, scale.seeds)


def chosen_rate(folder: Path, scale: Scale, task: str, method: str) -> float:
    """Return the rate with the least loss on the rows that the sweep held back, the worse of its two seeds deciding; or the middle
    one where there is no sweep."""
    rates = confirmed_rates(folder, scale, task, method)
    if not scale.sweep:
        return rates[0]
    return min(rates, key=lambda rate: max(_swept(folder, task, method, rate, seed) for seed in (0, 1)))


def confirmed_rates(folder: Path, scale: Scale, task: str, method: str) -> list[float]:
    """Return the rates that were tried with a second seed, smallest first; the middle one alone where there is no sweep."""
    rates = METHODS[method].rates(objective_of(task))
    if not scale.sweep:
        return [rates[len(rates) // 2]]
    confirmed = [rate for rate in rates if read_done(folder, Job("sweep", task, method, rate, 1)) is not None]
    assert confirmed, f"the sweep of {task}/{method} is not done"
    return confirmed


def _swept(folder: Path, task: str, method: str, rate: float, seed: int = 0) -> float:
    done = read_done(folder, Job("sweep", task, method, rate, seed))
    assert done is not None, f"the sweep of {task}/{method} at {rate:g} with seed {seed} is not done"
    return done.figures["nll"]
