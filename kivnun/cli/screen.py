"""What people see while a run goes on: events in, a progress display on stderr out.

`LiveScreen` draws on a terminal, `PlainScreen` writes lines elsewhere (a log, CI). Both get the run's events and nothing else,
so they can show nothing that `events.jsonl` does not hold. Next: `result.py`, the table at the end.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kivnun.events import (
    AdapterOpened,
    BaseLoaded,
    DataLoaded,
    Evaluated,
    Event,
    Planned,
    Resumed,
    RunFinished,
    RunInterrupted,
    RunStarted,
    StepDone,
    Warned,
)

# A plain log gets a line for the first and last step and one at most this often between.
PLAIN_EVERY_S = 5.0
# Metrics from 0 to 1.
SHARES = {
    "exact_match",
    "preference_accuracy",
    "macro_f1",
    "entity_f1",
    "qa_f1",
    "format_compliance",
    "ended_turn",
    "tune_validity",
}
# Share of the newest step in the shown speed: steps differ in length, the eye wants a steady figure.
SPEED_WEIGHT = 0.2


class Screen(Protocol):
    """Shows a run's events; a context, so that the terminal is left as it was found."""

    def __call__(self, event: Event) -> None: ...

    def scoring(self, stage: str, done: int, total: int) -> None:
        """Say how far an evaluation is: "score" or "generate", rows done, rows in all."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def open_screen() -> Screen:
    """Return the screen that fits stderr."""
    console = stderr()
    return LiveScreen(console) if console.is_terminal else PlainScreen(console, time.monotonic)


def stderr() -> Console:
    """Return a console for people's text. Markup and colouring of numbers are off: messages hold paths and brackets."""
    return Console(file=sys.stderr, markup=False, highlight=False, soft_wrap=True)


def stdout() -> Console:
    """Return a console for results; when stdout is no terminal it writes plain text and never wraps."""
    return Console(file=sys.stdout, markup=False, highlight=False, soft_wrap=True)


def print_json(value: object) -> None:
    """Write one line of JSON to stdout: the form that programs read. Scripts other than ASCII are written as they are."""
    click.echo(json.dumps(value, ensure_ascii=False))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], console: Console | None = None) -> None:
    """Write a table to stdout, or to `console`. Cells are text as it is; a column of figures is aligned to the right."""
    body = list(rows)
    shown = Table(box=None, pad_edge=False, header_style="bold", show_header=any(heads))
    for column, head in enumerate(heads):
        figures = bool(body) and all(row[column][:1] in "0123456789+-" for row in body)
        shown.add_column(head, justify="right" if figures else "left", overflow="fold")
    for row in body:
        shown.add_row(*(Text(cell) for cell in row))
    where = console or stdout()
    if not where.is_terminal:
        # The reader's width is unknown, and rich would fold at 80 columns.
        where = Console(file=where.file, width=10_000, markup=False, highlight=False)
    where.print(shown)


@contextmanager
def working(what: str) -> Generator[Callable[[str, int, int], None]]:
    """Show on stderr that something goes on that takes a while; gives a function to say how far it is (stage, done, total)."""
    console = stderr()
    if not console.is_terminal:
        yield lambda stage, done, total: None
        return
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=28), console=console, transient=True
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total)


class _Speed:
    """Tokens per second, smoothed over steps."""

    def __init__(self) -> None:
        self.tokens_per_s = 0.0

    def add(self, event: StepDone) -> float:
        now = event.tokens / max(event.seconds, 1e-9)
        self.tokens_per_s = now if not self.tokens_per_s else (1 - SPEED_WEIGHT) * self.tokens_per_s + SPEED_WEIGHT * now
        return self.tokens_per_s


class LiveScreen:
    """A bar with loss, tokens per second and time left; what is done stands above it as lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._speed = _Speed()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._bar: TaskID | None = None
        self._describe = _Lines()

    def __enter__(self) -> Self:
        self._progress.start()
        self._wait_for("reading data")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        line = self._describe(event)
        if line is not None:
            self._console.print(line, style="yellow" if isinstance(event, Warned) else None)
        if isinstance(event, StepDone):
            self._step(event)
        elif (phase := next_phase(event)) is not None:
            self._wait_for(phase)

    def scoring(self, stage: str, done: int, total: int) -> None:
        if self._task is not None:
            detail = "replies" if stage == "generate" else "rows"
            self._progress.update(self._task, completed=done, total=total, detail=detail)

    def _step(self, event: StepDone) -> None:
        self._wait_for(None)
        if self._bar is None:
            self._bar = self._progress.add_task("training", total=event.steps, completed=event.step - 1, detail="")
        detail = f"loss {event.loss:.3f}  {self._speed.add(event):,.0f} tokens/s"
        self._progress.update(self._bar, completed=event.step, detail=detail)
        if event.step == event.steps:
            self._wait_for("scoring the tuned model")

    def _wait_for(self, phase: str | None) -> None:
        """Show a phase of unknown length in place of the one before."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        if phase is not None:
            self._task = self._progress.add_task(phase, total=None, detail="")


class PlainScreen:
    """One line for each thing that happened; steps are thinned out by time."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console = console
        self._clock = clock
        self._speed = _Speed()
        self._shown_at = -PLAIN_EVERY_S
        self._began: tuple[float, int] | None = None
        self._describe = _Lines()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def __call__(self, event: Event) -> None:
        line = self._step(event) if isinstance(event, StepDone) else self._describe(event)
        if line is not None:
            self._console.print(line)

    def scoring(self, stage: str, done: int, total: int) -> None:
        """Nothing: a log is told when the score is there."""

    def _step(self, event: StepDone) -> str | None:
        now, speed = self._clock(), self._speed.add(event)
        began_at, began_step = self._began = self._began or (now - event.seconds, event.step - 1)
        if event.step not in (1, event.steps) and now - self._shown_at < PLAIN_EVERY_S:
            return None
        self._shown_at = now
        left = (now - began_at) / (event.step - began_step) * (event.steps - event.step)
        return f"step {event.step}/{event.steps}  loss {event.loss:.3f}  {speed:,.0f} tokens/s  {clock_time(left)} left"


class _Lines:
    """Says what happened, and at the end what was foretold beside what came."""

    def __init__(self) -> None:
        self._planned: Planned | None = None

    def __call__(self, event: Event) -> str | None:
        if isinstance(event, Planned):
            self._planned = event
        line = describe(event)
        if not isinstance(event, RunFinished) or self._planned is None:
            return line
        return f"{line} (foretold: {_foretold(self._planned)})"


def next_phase(event: Event) -> str | None:
    """Return what the run does after `event`, where that takes a while."""
    match event:
        case RunStarted():
            return "reading data"
        case DataLoaded():
            return "loading the base"
        case BaseLoaded() | AdapterOpened():
            return "scoring the base"
        case Evaluated(which="base") | Resumed():
            return "training"
        case _:
            return None


def describe(event: Event) -> str | None:
    """Return one line for people, or None for events that only the bar or nobody shows."""
    match event:
        case DataLoaded():
            return _data_line(event)
        case Planned():
            return f"plan: {event.steps:,} steps, {_foretold(event)}"
        case BaseLoaded():
            return f"base: {event.model}, {event.parameters:,} parameters, {event.precision}"
        case AdapterOpened():
            modules = ", ".join(f"{name} x{count}" for name, count in event.modules.items())
            return f"adapter: {event.kind}, {event.trainable_parameters:,} trained parameters at {event.sites} modules" + (
                f" ({modules})" if modules else ""
            )
        case Evaluated():
            at = "base" if event.which == "base" else f"after step {event.step}"
            metrics = "".join(f", {name} {figure(name, value)}" for name, value in event.metrics.items())
            return f"held out, {at}: nll {event.nll:.4f}{metrics} ({event.rows:,} rows)"
        case Resumed():
            return f"resumed after step {event.step}" if event.path else "no checkpoint yet: the run starts over"
        case Warned():
            return f"note: {event.message}"
        case RunInterrupted():
            return f"stopped after step {event.step}; its state is saved"
        case RunFinished():
            return (
                f"finished: {event.steps:,} steps, {event.trained_tokens:,} trained tokens, {clock_time(event.seconds)}, "
                f"{event.peak_bytes / 2**20:,.0f} MiB at most"
            )
        case _:
            return None


def figure(name: str, value: float) -> str:
    """Return a metric as people read it: shares in per cent, the loss with four digits, other scores with one."""
    if name in SHARES:
        return f"{100 * value:.1f} %"
    return f"{value:.4f}" if name == "nll" else f"{value:.1f}"


def clock_time(seconds: float) -> str:
    """Return 0:07, 3:25 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _foretold(event: Planned) -> str:
    time_taken = "" if event.seconds != event.seconds else f"{clock_time(event.seconds)}, "  # NaN: nobody knows
    return f"{time_taken}{event.peak_bytes / 2**20:,.0f} MiB at most"


def _data_line(event: DataLoaded) -> str:
    extra = [f"{count:,} {word}" for count, word in ((event.skipped, "skipped"), (event.truncated, "truncated")) if count]
    return (
        f"data: {event.format}, {event.train_rows:,} rows to train on ({event.train_tokens:,} tokens, "
        f"{event.trained_tokens:,} trained), {event.validation_rows:,} held out" + "".join(f", {part}" for part in extra)
    )
