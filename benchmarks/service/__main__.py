"""How long callers of the hosted service wait: `python -m benchmarks.service [--quick] [--results FOLDER]`.

Creates while a job of the built-in base trains, cancels until the training process is gone, and chats with a worker whose model
costs nothing, so that what is measured is the service; and how far `estimated_finish` is off after a tenth of a job's steps. Writes
`service_DATE.md` and `.json`. Next: `measure.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from benchmarks.engine.report import machine
from benchmarks.service.measure import (
    ANSWER_TOKENS,
    BASE,
    answers,
    answers_while_a_job_trains,
    cancels,
    creates_while_a_job_trains,
    estimates,
    percentile,
    service,
)

RESULTS = Path(__file__).parents[1] / "results"
CREATES, CANCELS, CHATS = 300, 30, 100
AT_ONCE = (1, 8)
EPOCHS = (8, 16, 24)
OFF = 0.25  # how far the end of a job may be from its estimate, of the time that was left


@dataclass(frozen=True, slots=True)
class Figure:
    """What was timed, the seconds of each time, and the bound that its 99th percentile has to keep (None: none is set)."""

    name: str
    seconds: list[float]
    bound_s: float | None

    def cells(self) -> tuple[str, ...]:
        bound = "" if self.bound_s is None else f"{1000 * self.bound_s:,.0f}"
        shown = [
            f"{1000 * value:,.0f}" for value in (percentile(self.seconds, 0.5), percentile(self.seconds, 0.99), max(self.seconds))
        ]
        return (self.name, str(len(self.seconds)), *shown, bound)

    @property
    def kept(self) -> bool:
        return self.bound_s is None or percentile(self.seconds, 0.99) < self.bound_s


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the dated files go")
    given = parser.parse_args(arguments)
    part = 10 if given.quick else 1
    with tempfile.TemporaryDirectory(prefix="kivnun-bench-service-") as name, service(Path(name)) as running:
        folder = Path(name)
        figures = [
            *(
                Figure(f"chat of {ANSWER_TOKENS} tokens, {number} at once", answers(running, number, CHATS // part), None)
                for number in AT_ONCE
            ),
            Figure(f"create, while a job of {BASE} trains", creates_while_a_job_trains(running, folder, CREATES // part), 0.2),
            Figure("cancel, until the training process is gone", cancels(running, folder, CANCELS // part), 2.0),
            Figure(
                f"chat of {ANSWER_TOKENS} tokens with {BASE}, while a job of it trains",
                answers_while_a_job_trains(running, folder, CHATS // part),
                None,
            ),
        ]
        off = estimates(running, folder, EPOCHS[: len(EPOCHS) // part or 1])
    command = "python -m benchmarks.service" + (" --quick" if given.quick else "")
    stem = f"service_{'quick_' if given.quick else ''}{datetime.now(UTC):%Y-%m-%d}"
    path = _write(given.results, stem, command, figures, off)
    Console(stderr=True).print(f"written to {path}", highlight=False)
    return 0 if all(figure.kept for figure in figures) and max(off) < OFF else 1


def _write(folder: Path, stem: str, command: str, figures: Sequence[Figure], off: Sequence[float]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    facts = machine()
    record = {"machine": facts, "command": command, "figures": [asdict(figure) for figure in figures], "off": list(off)}
    (folder / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    rows = "\n".join(f"| {' | '.join(figure.cells())} |" for figure in figures)
    text = f"""# What callers of the service wait, {stem[-10:]}

`{command}` · {" · ".join(f"{name}: {value}" for name, value in facts.items())}

Milliseconds at the client, over HTTP on the service's own machine, SQLite in the data folder, one worker.

| what | times | median | 99 % | most | the 99 % are to be below |
|---|---:|---:|---:|---:|---:|
{rows}

The first chats' worker has no model: what is timed is the API, the socket to the worker, and the count of tokens. A cancel is over
when the process that computed is gone.

`estimated_finish` after a tenth of the steps, of {len(off)} jobs of {BASE} on an otherwise idle machine: off by
{", ".join(f"{share:.0%}" for share in off)} of the time that was left (to be below {OFF:.0%}).
"""
    path = folder / f"{stem}.md"
    path.write_text(text, encoding="utf-8")
    print(text)
    return path


if __name__ == "__main__":
    sys.exit(main())
