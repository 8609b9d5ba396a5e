"""`python -m benchmarks.engine.profile`: where the CPU time of a training step goes, kernel by kernel, and how fast it multiplies.

Every kernel of `NativeKernels` is timed as a step calls it, products apart by their sides (numbers summed, outputs). "The rest" is
Python, autograd, the optimizer and what torch computes. The floor is that of `floor.py`, measured just before. Timing itself costs
about 2 us a call. Next: `flops.py` (what a step needs at least).
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.engine import ours
from benchmarks.engine.cases import Case
from benchmarks.engine.floor import floor
from benchmarks.engine.flops import step_flops
from benchmarks.engine.workload import MODELS, VARIANTS, draw_rows, write_workload
from kivnun.cli.process import keep_freed_memory
from kivnun.model.kernels import NativeKernels

ROWS = {"71m": 16, "wide": 8, "small": 16}


@dataclass(slots=True)
class Spent:
    """What calls of one kind came to."""

    seconds: float = 0.0
    calls: int = 0
    operations: int = 0


def main() -> None:
    options = _options()
    keep_freed_memory()
    torch.set_num_threads(1)
    write_workload(options.work, options.model)
    floor_rate = max(floor(options.model, "fp32" if options.precision == "fp32" else "bf16"))
    rows, steps, packed = ROWS[options.model], options.steps + 2, not options.unpacked
    case = Case("", "", "ours", options.model, options.precision, steps, rows, 1, variant=options.variant, packed=packed)
    side = ours.opened(case, options.work, {})
    assert isinstance(side, ours.Opened), side
    spent = timed(NativeKernels)
    for number in range(2):  # the first allocates, the second has what the first kept
        ours.step(side, number)
    spent.clear()
    began = time.process_time()
    for number in range(2, steps):
        ours.step(side, number)
    total = time.process_time() - began
    drawn = draw_rows(steps * rows)[2 * rows :]
    needed = step_flops(MODELS[options.model], drawn, options.variant).total
    title = f"{options.model}, {options.precision}, {options.variant}: {needed / floor_rate / total:.1%} of the floor"
    _show(f"{title} ({floor_rate / 1e9:,.0f} Gflop/s)", spent, total, options.steps, floor_rate)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.profile", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="71m")
    parser.add_argument("--precision", choices=("bf16", "fp32", "nf4"), default="bf16")
    parser.add_argument("--variant", choices=VARIANTS, default="lora")
    parser.add_argument("--unpacked", action="store_true", help="without weights kept as products read them")
    parser.add_argument("--steps", type=int, default=4, help="steps measured, after two that are not")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "kivnun-bench-engine")
    return parser.parse_args()


def timed(kernels: type[Any]) -> dict[str, Spent]:
    """Let every kernel of the class keep its time from now on, and return where."""
    spent: dict[str, Spent] = defaultdict(Spent)
    for name, kernel in list(_kernels(kernels)):
        setattr(kernels, name, _timed(name, kernel, spent))
    return spent


def _kernels(kernels: type[Any]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield what computes; the questions a set of kernels answers are left out."""
    for name, method in vars(kernels).items():
        if callable(method) and not name.startswith("_") and name not in ("multiplies", "packs"):
            yield name, method


def _timed(name: str, kernel: Callable[..., Any], spent: dict[str, Spent]) -> Callable[..., Any]:
    @functools.wraps(kernel)
    def call(self: Any, *given: Any, **named: Any) -> Any:
        began = time.process_time()
        out = kernel(self, *given, **named)
        seconds = time.process_time() - began
        told, operations = _told(name, given, out)
        entry = spent[told]
        entry.seconds, entry.calls, entry.operations = entry.seconds + seconds, entry.calls + 1, entry.operations + operations
        return out

    return call


def _told(name: str, given: tuple[Any, ...], out: Any) -> tuple[str, int]:
    """Return how a call is listed, and its operations where it is a product of matrices."""
    if name not in ("product", "outer"):
        return name, 0
    left: Tensor = given[0]
    operations = 2 * left.numel() * int(out.shape[1])
    return (f"product, {left.shape[1]:,} to {out.shape[1]:,}" if name == "product" else "an adapter's gradient"), operations


def _show(title: str, spent: dict[str, Spent], total: float, steps: int, floor_rate: float) -> None:
    table = Table("what", "calls a step", "ms a step", "of the time", "Gflop/s", "of the floor", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, entry in sorted(spent.items(), key=lambda item: -item[1].seconds):
        rate, told = entry.operations / entry.seconds, entry.operations > 0
        rates = (f"{rate / 1e9:,.0f}", f"{rate / floor_rate:.0%}") if told else ("", "")
        table.add_row(
            name, f"{entry.calls / steps:,.0f}", f"{1e3 * entry.seconds / steps:,.1f}", f"{entry.seconds / total:.1%}", *rates
        )
    rest = total - sum(entry.seconds for entry in spent.values())
    table.add_row("the rest", "", f"{1e3 * rest / steps:,.1f}", f"{rest / total:.1%}", "", "")
    table.add_row("a step", "", f"{1e3 * total / steps:,.1f}", "", "", "", style="bold")
    Console().print(table)


if __name__ == "__main__":
    main()
