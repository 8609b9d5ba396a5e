"""The training loop: rows in, updates out, over the verbs of a trainee.

It knows nothing of adapters, precision, files or processes. A step's rows and their total weight are known before its first
micro-step, so every share of loss and gradient is divided by the same number. Next: `engine.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from kivnun.data.order import RowOrder
from kivnun.data.packing import micro_batches
from kivnun.data.rows import PreferencePair, Trainable
from kivnun.errors import InterruptedRun
from kivnun.events import Event, RunInterrupted, StepDone
from kivnun.train.engine import Trainee
from kivnun.train.schedule import Schedule


class Saver(Protocol):
    """Keeps the state of a run. `after_step` saves when it is due, `now` in any case."""

    def after_step(self, step: int, epoch_ended: bool) -> None: ...

    def now(self, step: int) -> None: ...


def fit(
    trainee: Trainee,
    rows: Sequence[Trainable],
    order: RowOrder,
    schedule: Schedule,
    micro_batch_tokens: int,
    *,
    emit: Callable[[Event], object],
    evaluate: Callable[[int], object],
    evaluate_every_steps: int | None,
    saver: Saver,
    stop_requested: Callable[[], bool],
) -> None:
    """Train from the trainee's step to the end of the schedule.

    After each step: an event, then an evaluation and a checkpoint where they are due; the last step leaves both to the caller's
    final ones, but is always saved. Raises InterruptedRun after saving, when a stop was requested; NonFiniteLossError before the
    update it would have spoilt.
    """
    for step in range(trainee.steps + 1, schedule.steps + 1):
        began = time.monotonic()
        items = [rows[row] for row in order.rows_of(step)]
        total_weight = sum(trainee.objective.weight_of(item) for item in items)
        loss = 0.0
        for part in micro_batches(items, micro_batch_tokens):
            loss += trainee.forward_backward(trainee.objective.pack(part), total_weight)
        learning_rate = schedule.learning_rate(step)
        update = trainee.optim_step(learning_rate)
        emit(
            StepDone(
                step=step,
                steps=schedule.steps,
                epoch=order.epoch_of(step),
                loss=loss,
                grad_norm=update.grad_norm,
                learning_rate=learning_rate,
                rows=len(items),
                tokens=sum(item.length for item in items),
                trained_tokens=sum(map(trained_tokens, items)),
                seconds=time.monotonic() - began,
            )
        )
        last, epoch_ended = step == schedule.steps, order.ends_epoch(step)
        due = epoch_ended if evaluate_every_steps is None else step % evaluate_every_steps == 0
        if due and not last:
            evaluate(step)
        if last:
            saver.now(step)
        elif stop_requested():
            saver.now(step)
            emit(RunInterrupted(step=step))
            raise InterruptedRun(f"stopped after step {step} of {schedule.steps}, which is saved", hint="go on with --resume")
        else:
            saver.after_step(step, epoch_ended)


def trained_tokens(item: Trainable) -> int:
    """Return how many tokens of an item carry weight in the loss."""
    sides = (item.chosen, item.rejected) if isinstance(item, PreferencePair) else (item,)
    return sum(int(np.count_nonzero(side.weights)) for side in sides)
