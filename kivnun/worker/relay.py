"""What the owner of a job hears of a run: its record, line by line, in the words that scripts look for.

A run that goes on from a snapshot writes some steps again. They are compared with what was told: the same bits, or the job is not
what it promises to be. Pure but for the file it reads. Next: `tune_jobs.py` (who tells), `../events.py` (the record).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from kivnun.events import (
    CheckpointSaved,
    DataLoaded,
    Evaluated,
    Event,
    PassesShortened,
    Resumed,
    RunFinished,
    RunStarted,
    StepDone,
    Warned,
    from_json,
)
from kivnun.jobs.running import Told

READ_BYTES = 4 << 20  # of a record at once
HORIZON = 500  # steps that say how long the next ones take: a stall is not taken for the rule, what lasts is soon seen
_PATH = re.compile(r"(?<![\w.])~?(?:/[^\s/'\",;:()]+)+/([^\s/'\",;:()]+)")


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is in the run's folder. `length` is that of the record up to the line that tells of it, `metrics` what was
    measured at its step so far."""

    step: int
    length: int
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])


class NotReproduced(Exception):
    """A step that was made again came to other numbers than those its owner was told."""


@dataclass
class Pace:
    """How fast the run goes: the time of its steps, and of all else between them."""

    steps: int = 0
    step: int = 0
    step_s: float = 0.0  # the mean, of old steps ever less
    _made: int = 0
    _stepping: float = 0.0
    _first: float | None = None
    _last: float = 0.0
    _before: float = 0.0  # when the event before was recorded
    _scoring: float = 0.0  # the base, before the first step: the tuned model takes as long after the last one

    def hear(self, event: Event) -> None:
        now = datetime.fromisoformat(event.time).timestamp()
        if isinstance(event, RunStarted):  # what was between two processes is nobody's pace
            self._made, self._stepping, self._first = 0, 0.0, None
        elif isinstance(event, StepDone):
            if self._first is None:
                self._first = now - event.seconds
            self.steps, self.step, self._last = event.steps, event.step, now
            self._made, self._stepping = self._made + 1, self._stepping + event.seconds
            # The mean and not the median: rows are of many lengths, and the long steps are part of what is left. The first one
            # also warms up, and is forgotten with the second.
            self.step_s += (event.seconds - self.step_s) / max(1, min(self._made - 1, HORIZON))
        elif isinstance(event, Evaluated) and event.which == "base":
            self._scoring = now - self._before
        self._before = now

    def finish(self) -> float | None:
        """Return when the run will end, in seconds since 1970; None before its first step.

        After the last step the adapter is written and the held-out rows are scored once more."""
        if self._first is None:
            return None
        others = max(0.0, self._last - self._first - self._stepping) / self._made
        return self._last + (self.step_s + others) * (self.steps - self.step) + self._scoring


class Relay:
    """Reads a run's record as it grows. `told` holds what was told before of each step after `past`, `messages` what else was.

    Where rows are held out, a step waits for the next line of the record: its score may follow. Memory is that of the steps between
    a few checkpoints, however long the record is: steps up to `past` are in a snapshot and are never made again, and of those told
    here the ones before the last checkpoint but one are forgotten."""

    def __init__(self, record: Path, told: Mapping[int, Mapping[str, Any]], messages: frozenset[str], past: int = 0) -> None:
        self.pace = Pace()
        self.last: Mapping[str, Any] = {"step": 0}  # what was measured at the last step that was read whole
        self.is_behind = False  # whether the record goes on after what was read last
        self._record, self._past = record, past
        self._told = {step: dict(data) for step, data in told.items()}
        self._messages = set(messages)
        self._length = 0
        self._saved_step = 0
        self._held: tuple[StepDone, Evaluated | None] | None = None
        self._holds = False

    def read(self, *, to_the_end: bool = False) -> list[Told | Saved]:
        """Return what is new to tell and to keep, in its order, of a part of the record (`is_behind` says whether there is more).

        `to_the_end`: nothing follows. Raises NotReproduced."""
        try:
            with self._record.open("rb") as file:
                file.seek(self._length)
                lines = file.readlines(READ_BYTES)
        except FileNotFoundError:
            return []
        self.is_behind = sum(map(len, lines)) >= READ_BYTES
        found: list[Told | Saved] = []
        for line in lines:
            if not line.endswith(b"\n"):
                break
            self._length += len(line)
            found += self._hear(from_json(line.decode()))
        return [*found, *self._release()] if to_the_end else found

    def _hear(self, event: Event) -> Sequence[Told | Saved]:
        self.pace.hear(event)
        if isinstance(event, Evaluated) and event.which == "tuned" and self._held and self._held[0].step == event.step:
            self._held = (self._held[0], event)
            return []
        if isinstance(event, StepDone):
            before = self._release()
            self._held = (event, None)
            return before if self._holds else [*before, *self._release()]
        if isinstance(event, CheckpointSaved):
            is_last = self._held is not None and self._held[0].step == self._held[0].steps  # whose score is still to come
            released = [] if is_last else self._release()
            self._told = {step: data for step, data in self._told.items() if step > self._saved_step}
            self._saved_step = event.step
            metrics = self.last if self.last["step"] == event.step else {"step": event.step}
            return [*released, Saved(event.step, self._length, metrics)]
        if isinstance(event, RunFinished):
            return self._release()
        if isinstance(event, DataLoaded):
            self._holds = event.validation_rows > 0
        elif isinstance(event, Resumed):
            self._saved_step = event.step
            if self._held and self._held[0].step > event.step:
                self._held = None  # it is made again
        elif isinstance(event, Warned | PassesShortened):
            return self._once(_words_of(event))
        return []

    def _once(self, message: str) -> list[Told]:
        message = without_paths(message)
        if message in self._messages:
            return []
        self._messages.add(message)
        return [Told(message, level="warn")]

    def _release(self) -> list[Told]:
        """Return the step that waited, in words, unless it was told already."""
        if self._held is None:
            return []
        (step, score), self._held = self._held, None
        data: dict[str, Any] = {
            "step": step.step,
            "total_steps": step.steps,
            "train_loss": step.loss,
            "train_mean_token_accuracy": _known(step.accuracy),
            "learning_rate": step.learning_rate,
            "trained_tokens": step.trained_tokens,
            "epoch": step.epoch,
        }
        message = f"Step {step.step}/{step.steps}: training loss={step.loss:.2f}"
        if score is not None and math.isfinite(score.nll):
            # A step is scored on all the held-out rows or on none: both pairs of names are of the same rows.
            for name in ("valid", "full_valid"):
                data |= {f"{name}_loss": score.nll, f"{name}_mean_token_accuracy": _known(score.accuracy)}
            message += f", full validation loss={score.nll:.2f}"
        self.last = data
        if step.step <= self._past:
            return []
        before = self._told.get(step.step)
        if before is None:
            self._told[step.step] = data
            return [Told(message, type="metrics", data=data, step=step.step, trained_tokens=step.trained_tokens)]
        # An older version of the service told less of a step: what it did not tell cannot differ.
        changed = sorted(name for name, value in before.items() if value is not None and data.get(name) != value)
        if changed:
            raise NotReproduced(f"step {step.step} was made again and differs in {', '.join(changed)}")
        return []


def _known(share: float) -> float | None:
    return None if math.isnan(share) else share


def _words_of(event: Warned | PassesShortened) -> str:
    if isinstance(event, Warned):
        return event.message
    return f"Memory ran short in step {event.step}: from there on a pass has at most {event.micro_batch_tokens} tokens"


def without_paths(text: str) -> str:
    """Return a message with each absolute path cut to its last name: where the service keeps things is nobody's business."""
    return _PATH.sub(r"\1", text)
