"""Which rows make which step: a pure function of (seed, step), so that resuming needs no sampler state.

An epoch draws from each source as many rows as its share asks for, shuffles them together and cuts them into steps by a number
of rows or of tokens. A source's rows come as a stream of permutations, so a small source with a large share repeats only after
all its rows were seen. Next: `train/loop.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kivnun.randomness import permutation

if TYPE_CHECKING:
    from kivnun.spec import ScheduleSpec


@dataclass(frozen=True)
class RowOrder:
    """The order of training.

    `lengths[i]` is the token count of row i; `source_sizes` splits the row numbers into consecutive sources; `shares` says how
    much of an epoch each source gives (None: all rows of every source, once). One of `batch_rows` and `batch_tokens` sets the
    size of a step, one of `epochs` and `num_steps` the end.
    """

    lengths: np.ndarray
    source_sizes: tuple[int, ...]
    shares: tuple[float, ...] | None
    batch_rows: int | None
    batch_tokens: int | None
    epochs: int | None
    num_steps: int | None
    seed: int
    _ends: list[int] = field(default_factory=list[int], init=False, repr=False, compare=False)
    _epochs: dict[int, list[np.ndarray]] = field(default_factory=dict[int, list[np.ndarray]], init=False, repr=False, compare=False)

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps of the whole run."""
        if self.num_steps is not None:
            return self.num_steps
        assert self.epochs is not None
        return self._end_of(self.epochs - 1)

    def rows_of(self, step: int) -> np.ndarray:
        """Return the row numbers (int64) of a step, counted from 1."""
        epoch = self.epoch_of(step)
        return self._batches(epoch)[step - 1 - self._start_of(epoch)]

    def epoch_of(self, step: int) -> int:
        """Return the epoch, counted from 0, that a step belongs to."""
        epoch = 0
        while self._end_of(epoch) < step:
            epoch += 1
        return epoch

    def ends_epoch(self, step: int) -> bool:
        return self._end_of(self.epoch_of(step)) == step

    def _start_of(self, epoch: int) -> int:
        return self._end_of(epoch - 1) if epoch else 0

    def _end_of(self, epoch: int) -> int:
        """Return the last step of an epoch. Batches cut by tokens differ from epoch to epoch, so the ends are counted up once."""
        while len(self._ends) <= epoch:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self._batches(len(self._ends))))
        return self._ends[epoch]

    def _batches(self, epoch: int) -> list[np.ndarray]:
        if epoch not in self._epochs:
            self._epochs.clear()  # steps come in order: one epoch at a time is enough
            rows = self.epoch_rows(epoch)
            self._epochs[epoch] = self._cut(rows)
        return self._epochs[epoch]

    def _cut(self, rows: np.ndarray) -> list[np.ndarray]:
        if self.batch_rows is not None:
            return [rows[at : at + self.batch_rows] for at in range(0, len(rows), self.batch_rows)]
        assert self.batch_tokens is not None
        return _cut_by_tokens(rows, self.lengths, self.batch_tokens)

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """Return all row numbers of an epoch in training order."""
        counts = self._rows_per_source()
        starts = np.concatenate([[0], np.cumsum(self.source_sizes)[:-1]])
        parts = [
            start + _stream(size, epoch * count, count, self.seed, source)
            for source, (start, size, count) in enumerate(zip(starts, self.source_sizes, counts, strict=True))
        ]
        drawn = np.concatenate(parts).astype(np.int64)
        return drawn[permutation(len(drawn), self.seed, "order", epoch)]

    def _rows_per_source(self) -> list[int]:
        if self.shares is None:
            return list(self.source_sizes)
        total = sum(self.source_sizes)
        scale = total / sum(self.shares)
        return [max(1, round(share * scale)) for share in self.shares]


def order_of(
    schedule: ScheduleSpec, seed: int, lengths: np.ndarray, sizes: tuple[int, ...], shares: tuple[float, ...] | None
) -> RowOrder:
    """Return the order of training that a resolved schedule gives to rows of these lengths."""
    return RowOrder(
        lengths=lengths,
        source_sizes=sizes,
        shares=shares,
        batch_rows=schedule.batch_rows,
        batch_tokens=schedule.batch_tokens,
        epochs=schedule.epochs,
        num_steps=schedule.steps,
        seed=seed,
    )


def _stream(size: int, first: int, count: int, seed: int, source: int) -> np.ndarray:
    """Return elements [first, first + count) of an endless stream of permutations of range(size)."""
    passes = range(first // size, (first + count - 1) // size + 1)
    stream = np.concatenate([permutation(size, seed, "pass", source, number) for number in passes])
    return stream[first - passes[0] * size :][:count]


def _cut_by_tokens(rows: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Return the rows cut, in order, into runs of at most `batch_tokens` tokens (a longer single row is a run of its own)."""
    ends = np.cumsum(lengths[rows])
    cuts: list[int] = []
    at = 0
    while at < len(rows):
        before = int(ends[at - 1]) if at else 0
        at = max(at + 1, int(np.searchsorted(ends, before + batch_tokens, side="right")))
        cuts.append(at)
    return np.split(rows, cuts[:-1])
