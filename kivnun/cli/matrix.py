"""`kivnun matrix`: which technique helps with what, measured on this machine."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import click

from kivnun.errors import InterruptedRun, SpecError

EXAMPLE = 'write {"cpu_core_hour": 0.04}'


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), required=True, metavar="DIR",
    help="The folder of the table; one that holds part of it is gone on with.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="A look: one seed, one learning rate, fewer methods and tasks.  [under 10 minutes]")
@click.option(
    "--prices", type=click.Path(path_type=Path, dir_okay=False, exists=True), metavar="FILE",
    help='What resources cost, as JSON: {"cpu_core_hour": 0.04}; money is shown beside CPU time then.',
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the verdicts as one JSON object on the last line of stdout.")
def matrix(output: Path, quick: bool, prices: Path | None, as_json: bool) -> int:
    """Measure the table of nine scenarios by six techniques.

    Trains the built-in base on the built-in scenarios with every technique, and writes matrix.json (54 cells, each with what the
    document says, what was measured and what follows) and matrix.html into DIR. Every run that is finished stays: the same command
    goes on after a stop.
    """
    from kivnun.cli.process import keep_freed_memory, set_threads
    from kivnun.cli.screen import print_json, stderr

    known = _read_prices(prices)
    keep_freed_memory()
    set_threads(1)
    command = ["kivnun", "matrix", *(["--quick"] if quick else []), "--output", output.name]
    with _progress() as screen:
        from kivnun.matrix.matrix import make_matrix

        try:
            held = make_matrix(output, quick=quick, prices=known, screen=screen, command=command)
        except KeyboardInterrupt:
            again = shlex.join([*command[:-1], str(output), *(["--prices", str(prices)] if prices else [])])
            raise InterruptedRun("stopped; what is finished is kept", hint=f"go on with: {again}") from None
    verdicts = {f"{cell['row']}/{cell['technique']}": cell["verdict"] for cell in held["cells"]}
    if as_json:
        print_json({"output": str(output), "cells": len(verdicts), "verdicts": verdicts})
        return 0
    stderr().print(f"{len(verdicts)} cells: {output / 'matrix.json'}, and to read: {output / 'matrix.html'}", highlight=False)
    return 0


def _read_prices(path: Path | None) -> dict[str, float]:
    if path is None:
        return {}
    from kivnun.spec.section import as_mapping

    try:
        held = cast("object", json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise SpecError(f"{path} is not JSON: {error}", hint=EXAMPLE) from error
    prices = as_mapping(held)
    price = None if prices is None else prices.pop("cpu_core_hour", None)
    if prices or not isinstance(price, int | float) or isinstance(price, bool) or price < 0:
        raise SpecError(f"{path} must hold the price of a cpu_core_hour and no more, got {held!r}", hint=EXAMPLE)
    return {"cpu_core_hour": float(price)}


@contextmanager
def _progress() -> Generator[Any]:
    """Show one bar per part of the work; lines where stderr is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from kivnun.cli.screen import stderr

    columns = (
        TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[last]}"),
    )  # fmt: skip
    with Progress(*columns, console=stderr(), disable=not sys.stderr.isatty()) as bars:
        yield _Bars(bars)


class _Bars:
    def __init__(self, bars: Any) -> None:
        self._bars, self._task = bars, None

    def stage(self, title: str, units: int) -> None:
        if self._bars.disable:
            print(f"{title}: {units}", file=sys.stderr, flush=True)
        self._task = self._bars.add_task(title, total=units, last="")

    def done(self, name: str) -> None:
        if self._bars.disable:
            print(f"  {name}", file=sys.stderr, flush=True)
        self._bars.update(self._task, advance=1, last=name)
