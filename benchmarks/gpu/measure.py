"""How a side is measured: warm-up, then steps between synchronisations; the median counts.

A pass that does not fit into memory is tried again with half the tokens, down to one row: the row of the table says how many a
pass had. Next: `table.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from benchmarks.engine.workload import Model
from benchmarks.gpu.shapes import mfu
from benchmarks.gpu.sides import Side
from kivnun.data.rows import TokenRow


@dataclass(frozen=True, slots=True)
class Effort:
    """How many steps warm up, and how many are measured."""

    warm_up: int
    steps: int


QUICK, FULL = Effort(2, 3), Effort(3, 15)


@dataclass(frozen=True, slots=True)
class Measured:
    """One row of the table. Memory in bytes; without a CUDA device it is not measured. `note` says why there are no numbers."""

    model: str
    method: str
    lengths: str
    side: str
    recompute: bool
    pass_tokens: int | None = None
    tokens_per_s: float | None = None
    slowest: float | None = None
    fastest: float | None = None
    mfu: float | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    loss: float | None = None
    note: str = ""

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def measure(
    side: Side, rows: Sequence[TokenRow], effort: Effort, named: Measured, shape: Model, peak: float | None, pass_tokens: int
) -> Measured:
    """Return `named` with the numbers of training on these rows, or with the reason why there are none."""
    longest = max(row.length for row in rows)
    while True:
        try:
            return _steps(side, rows, effort, named, shape, peak, pass_tokens)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            if pass_tokens <= longest:
                return _changed(named, note="does not fit into memory, one row a pass")
            pass_tokens = max(longest, pass_tokens // 2)


def _steps(
    side: Side, rows: Sequence[TokenRow], effort: Effort, named: Measured, shape: Model, peak: float | None, pass_tokens: int
) -> Measured:
    lengths, on_cuda = [row.length for row in rows], torch.cuda.is_available()
    warm = [side.step(rows, pass_tokens) for _ in range(effort.warm_up)]
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = [side.step(rows, pass_tokens).seconds for _ in range(effort.steps)]
    middle = statistics.median(seconds)
    return _changed(
        named,
        pass_tokens=pass_tokens,
        tokens_per_s=sum(lengths) / middle,
        slowest=sum(lengths) / max(seconds),
        fastest=sum(lengths) / min(seconds),
        mfu=mfu(shape, lengths, middle, peak),
        allocated_bytes=torch.cuda.max_memory_allocated() if on_cuda else None,
        reserved_bytes=torch.cuda.max_memory_reserved() if on_cuda else None,
        loss=warm[0].loss,
    )


def _changed(named: Measured, **fields: object) -> Measured:
    return Measured(**{**asdict(named), **fields})  # type: ignore[arg-type]
