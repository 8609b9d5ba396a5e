"""TensorBoard's event files beside the record of a run, when asked for: written live, from the run's events alone.

`events.jsonl` stays the record. TensorBoard has no way to take a point back, so whenever the record does (a run went back to a
checkpoint, the base was scored again) the files are written anew from what counts. This is the one module that imports the extra
`tensorboard`. Next: `events.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, cast

from kivnun.artifacts import storage_errors
from kivnun.errors import SpecError
from kivnun.events import Evaluated, Event, Resumed, RunStarted, StepDone, read_events
from kivnun.run_folder import RunFolder

Listener = Callable[[Event], None]

FLUSH_SECONDS = 5


class Point(NamedTuple):
    """One scalar: `tag` at `step`, at the moment of its event."""

    tag: str
    step: int
    value: float
    wall_time: float


@contextmanager
def with_board(listener: Listener, run_dir: Path, wanted: bool) -> Generator[Listener]:
    """Give a listener that also writes `RUN/tensorboard`, where that is wanted; else `listener` itself.

    Raises SpecError when the extra is not installed. A run that was finished before gets its files from its record.
    """
    if not wanted:
        yield listener
        return
    board = Board(run_dir)

    def both(event: Event) -> None:
        listener(event)
        board(event)

    try:
        yield both
        board.complete()
    finally:
        board.close()


class Board:
    """A listener that keeps the event files in step with the record. The record holds an event before its listeners hear it."""

    def __init__(self, run_dir: Path) -> None:
        self._make_writer = _writer_class()
        self._run = RunFolder(run_dir)
        self._folder = self._run.tensorboard
        self._writer: Any = None
        self._written: dict[tuple[str, int], float] = {}

    def __call__(self, event: Event) -> None:
        if self._writer is None or isinstance(event, RunStarted | Resumed):
            self._write_anew()
            return
        points = points_of(event)
        if any(self._holds_another(point) for point in points):
            self._write_anew()
            return
        for point in points:
            self._write(point)

    def complete(self) -> None:
        """Write the files of a run that had nothing left to do, and so told nothing."""
        if self._writer is None:
            self._write_anew()

    def close(self) -> None:
        """Make what was written durable as far as the library does."""
        if self._writer is not None:
            self._writer.close()

    def _write_anew(self) -> None:
        self.close()
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            for old in self._folder.glob("events.out.tfevents.*"):
                old.unlink()
        self._writer, self._written = self._make_writer(logdir=str(self._folder), flush_secs=FLUSH_SECONDS), {}
        if self._run.resolved.is_file():
            text = self._run.resolved.read_text(encoding="utf-8")
            self._writer.add_text("spec", f"```yaml\n{text}```", 0)
        last: dict[tuple[str, int], Point] = {}
        for point in (point for event in read_events(self._run.events) for point in points_of(event)):
            last[point.tag, point.step] = point  # the score after the last step is measured twice
        for point in last.values():
            self._write(point)

    def _holds_another(self, point: Point) -> bool:
        """Return whether the files hold another value in the point's place."""
        before = self._written.get((point.tag, point.step))
        return before is not None and before != point.value and not (math.isnan(before) and math.isnan(point.value))

    def _write(self, point: Point) -> None:
        if (point.tag, point.step) not in self._written:
            self._writer.add_scalar(point.tag, point.value, point.step, walltime=point.wall_time)
            self._written[point.tag, point.step] = point.value


def points_of(event: Event) -> list[Point]:
    """Return the scalars of an event. The base's scores are those of step 0."""
    if isinstance(event, StepDone):
        values = {
            "train/loss": event.loss,
            "train/grad_norm": event.grad_norm,
            "train/learning_rate": event.learning_rate,
            "train/tokens_per_s": event.tokens / max(event.seconds, 1e-9),
        }
    elif isinstance(event, Evaluated):
        values = {"held_out/nll": event.nll, **{f"held_out/{name}": value for name, value in event.metrics.items()}}
        if event.forgetting:
            values["unrelated_text/nll"] = cast(float, event.forgetting["nll"])
    else:
        return []
    moment = datetime.fromisoformat(event.time).timestamp()
    return [Point(tag, event.step, value, moment) for tag, value in values.items()]


def _writer_class() -> Callable[..., Any]:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise SpecError(
            f"--tensorboard needs the library tensorboardX, which cannot be loaded: {error}",
            hint="pip install 'kivnun[tensorboard]', or leave --tensorboard out: report.html shows the same figures",
        ) from None
    return cast(Callable[..., Any], SummaryWriter)
