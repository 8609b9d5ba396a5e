"""The training loop: rows in, updates out, over the verbs of a trainee.

It knows nothing of adapters, precision, files or processes. A step's rows and their total weight are known before its first
micro-step, so every share of loss and gradient is divided by the same number. A step's packs are made while the step before it
computes. Next: `passes.py` (what a step does when memory runs out), `engine.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kivnun.data.order import RowOrder
from kivnun.data.packing import micro_batches, pack
from kivnun.data.rows import Trainable
from kivnun.errors import InterruptedRun
from kivnun.events import Event, RunInterrupted, StepDone
from kivnun.train.engine import Trainee
from kivnun.train.passes import PassBudget, Passes, StepPacks, telling_shortage
from kivnun.train.schedule import Schedule

LOOKED_AT = 8  # steps from which `shareable` judges


class Saver(Protocol):
    """Keeps the state of a run. `after_step` saves when it is due, `now` in any case."""

    def after_step(self, step: int, epoch_ended: bool) -> None: ...

    def now(self, step: int, epoch_ended: bool) -> None: ...


def fit(
    trainee: Trainee,
    rows: Sequence[Trainable],
    order: RowOrder,
    schedule: Schedule,
    budget: PassBudget,
    *,
    share_prefixes: bool = False,
    emit: Callable[[Event], object],
    evaluate: Callable[[int], object],
    evaluate_every_steps: int | None,
    saver: Saver,
    stop_requested: Callable[[], bool],
) -> None:
    """Train from the trainee's step to the end of the schedule.

    After each step: an event, then an evaluation and a checkpoint where they are due; the last step leaves both to the caller's
    final ones, but is always saved. Raises InterruptedRun after saving, when a stop was requested; NonFiniteLossError before the
    update it would have spoilt; WontFitError where memory holds no pass of a step, or not its update.
    """
    began = time.monotonic()
    steps = range(trainee.steps + 1, schedule.steps + 1)
    passes = Passes(trainee, budget, int(order.lengths.max()), share_prefixes=share_prefixes, emit=emit)

    def prepare(step: int) -> StepWork:
        return prepared(step, trainee, rows, order, passes)

    for step, work in one_ahead(steps, prepare):
        items = work.items
        loss, computed = passes.computed(step, items, work.packed, work.total_weight)
        learning_rate = schedule.learning_rate(step)
        with telling_shortage(f"the update of step {step}"):
            update = trainee.optim_step(learning_rate)
        emit(
            StepDone(
                step=step,
                steps=schedule.steps,
                epoch=work.epoch,
                loss=loss,
                grad_norm=update.grad_norm,
                learning_rate=learning_rate,
                rows=len(items),
                tokens=sum(item.length for item in items),
                trained_tokens=sum(map(trained_tokens, items)),
                computed_tokens=computed.computed_tokens,
                seconds=time.monotonic() - began,
                accuracy=update.accuracy,
            )
        )
        last, epoch_ended = step == schedule.steps, work.ends_epoch
        due = epoch_ended if evaluate_every_steps is None else step % evaluate_every_steps == 0
        if due and not last:
            evaluate(step)
        if last:
            saver.now(step, epoch_ended)
        elif stop_requested():
            saver.now(step, epoch_ended)
            emit(RunInterrupted(step=step))
            raise InterruptedRun(f"stopped after step {step} of {schedule.steps}, which is saved", hint="go on with --resume")
        else:
            saver.after_step(step, epoch_ended)
        began = time.monotonic()


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step computes with: its items, their packs, the weight of all items, and where it stands in the order."""

    items: list[Trainable]
    packed: StepPacks
    total_weight: float
    epoch: int
    ends_epoch: bool


def prepared(step: int, trainee: Trainee, rows: Sequence[Trainable], order: RowOrder, passes: Passes) -> StepWork:
    """Return the work of a step. Nobody else asks the order anything meanwhile: it remembers the epoch it was last asked for."""
    items = [rows[row] for row in order.rows_of(step)]
    total_weight = sum(trainee.objective.weight_of(item) for item in items)
    return StepWork(items, passes.of(step, items), total_weight, order.epoch_of(step), order.ends_epoch(step))


def shareable(rows: Sequence[Trainable], order: RowOrder, micro_batch_tokens: int) -> float:
    """Return which part of the tokens of the first steps `share_prefixes` would spare, between 0 and 1."""
    tokens = computed = 0
    for step in range(1, min(order.steps, LOOKED_AT) + 1):
        items = [rows[row] for row in order.rows_of(step)]
        tokens += sum(item.length for item in items)
        computed += sum(pack(part, True).num_tokens for part in micro_batches(items, micro_batch_tokens, True))
    return 1 - computed / tokens


def one_ahead(steps: range, prepare: Callable[[int], StepWork]) -> Iterator[tuple[int, StepWork]]:
    """Yield each step with its work, which a thread of its own has prepared while the step before was computed."""
    with ThreadPoolExecutor(1, "kivnun-prepare") as thread:
        coming = [thread.submit(prepare, step) for step in steps[:1]]
        for step in steps:
            work = coming.pop().result()
            if step + 1 in steps:
                coming.append(thread.submit(prepare, step + 1))
            yield step, work


def trained_tokens(item: Trainable) -> int:
    """Return how many tokens of an item carry weight in the loss."""
    return sum(int(np.count_nonzero(side.weights)) for side in item.sides)
