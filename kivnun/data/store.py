"""Token rows kept as flat numbers, in memory or on disk, and made into `TokenRow` values when they are asked for.

A row of a Python list costs hundreds of bytes beside its tokens; here it costs 44, on disk where they are many. Ids are int32.
Weights, which change a few times in a row, are kept as runs of equal ones: exact, and small.
Next: `loader.py`, which fills a store.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from kivnun.data.rows import PreferencePair, TokenRow, Trainable, Where
from kivnun.data.spool import AT_ONCE, Table
from kivnun.data.tokens import Draft

ROW = np.dtype(
    [
        ("ids_at", "<i8"),
        ("runs_at", "<i8"),
        ("line", "<i8"),
        ("path", "<i4"),
        ("length", "<i4"),
        ("runs", "<i4"),
        ("trained", "<i4"),
        ("prompt_len", "<i4"),
    ]
)
_PACKED_ROW = struct.Struct("<qqqiiiii")
RUN = np.dtype([("length", "<i4"), ("weight", "<f4")])


class RowStore:
    """Token rows by their place, from 0, in the order in which they were added. `folder` as in `spool.Spool`."""

    def __init__(self, folder: Path | None = None) -> None:
        self._rows = Table(ROW, folder)
        self._ids = Table(np.dtype("<i4"), folder)
        self._runs = Table(RUN, folder)
        self._paths: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def append(self, draft: Draft, where: Where) -> None:
        """Add a row. Raises StorageError."""
        runs = _runs_of(draft.weights)
        path = self._paths.setdefault(where.path, len(self._paths))
        entry = (len(self._ids), len(self._runs), where.line, path, draft.length, len(runs), draft.trained, draft.prompt_len)
        self._ids.append(draft.ids.astype("<i4").tobytes())
        self._runs.append(runs.tobytes())
        self._rows.append(_PACKED_ROW.pack(*entry))

    def row(self, place: int, number: int) -> TokenRow:
        """Return the row at a place under a number of the caller's. Its arrays are the caller's own. Raises StorageError."""
        ids_at, runs_at, line, path, length, runs, _, prompt_len = self._rows.read(place, place + 1)[0].item()
        ids = self._ids.read(ids_at, ids_at + length)
        kept = self._runs.read(runs_at, runs_at + runs)
        weights = np.repeat(kept["weight"], kept["length"])
        return TokenRow(ids, weights, number, Where(self._path(path), line), prompt_len)

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each row, int32."""
        return self._column("length")

    def trained(self) -> np.ndarray:
        """Return the number of tokens that carry a weight, of each row, int32."""
        return self._column("trained")

    def _column(self, name: str) -> np.ndarray:
        parts = [self._rows.read(at, min(at + AT_ONCE, len(self)))[name].copy() for at in range(0, len(self), AT_ONCE)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    def _path(self, number: int) -> str:
        return next(path for path, its in self._paths.items() if its == number)


class StoredRows(Sequence[Trainable]):
    """Some rows of a store as a sequence: item i is made when it is asked for, and has the number `first` + i.

    `places` are the items' places in the store, counted in items; with `pairs` an item is two rows, the chosen one first, numbered
    twice the item's number and one more. A slice is a list.
    """

    def __init__(self, store: RowStore, places: np.ndarray, first: int = 0, pairs: bool = False) -> None:
        self._store, self._places, self._first, self._pairs = store, places, first, pairs

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Trainable]:
        return map(self._item, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Trainable: ...
    @overload
    def __getitem__(self, index: slice) -> list[Trainable]: ...
    def __getitem__(self, index: int | slice) -> Trainable | list[Trainable]:
        if isinstance(index, slice):
            return [self._item(at) for at in range(*index.indices(len(self)))]
        at = int(index)
        if not -len(self) <= at < len(self):
            raise IndexError(f"there are {len(self):,} rows, asked for number {at:,}")
        return self._item(at % len(self))

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each item, int64; of a pair, both sides together."""
        return self._of_items(self._store.lengths(), np.add)

    @property
    def side_lengths(self) -> np.ndarray:
        """The number of tokens of each token row, int64; of a pair, the chosen one's first."""
        lengths = self._store.lengths()
        return (lengths.reshape(-1, 2)[self._places].ravel() if self._pairs else lengths[self._places]).astype(np.int64)

    @property
    def longest_side(self) -> int:
        """The number of tokens of the longest token row."""
        return int(self._of_items(self._store.lengths(), np.maximum).max(initial=0))

    @property
    def num_trained(self) -> int:
        """The number of tokens that carry a weight, in all items together."""
        return int(self._of_items(self._store.trained(), np.add).sum())

    def _of_items(self, values: np.ndarray, join: np.ufunc) -> np.ndarray:
        of_items = join(values[0::2], values[1::2], dtype=np.int64) if self._pairs else values
        return of_items[self._places].astype(np.int64)

    def _item(self, at: int) -> Trainable:
        place, number = int(self._places[at]), self._first + at
        if not self._pairs:
            return self._store.row(place, number)
        chosen, rejected = (self._store.row(2 * place + side, 2 * number + side) for side in (0, 1))
        return PreferencePair(chosen, rejected, number, chosen.where)


def _runs_of(weights: np.ndarray) -> np.ndarray:
    """Return weights as (how many, which) for each run of equal ones; equal in their bits, so that they come back as they were."""
    bits = weights.view(np.int32)
    starts = np.concatenate([[0], np.flatnonzero(bits[1:] != bits[:-1]) + 1]) if len(weights) else np.empty(0, dtype=np.int64)
    runs = np.empty(len(starts), dtype=RUN)
    runs["length"] = np.diff(starts, append=len(weights))
    runs["weight"] = weights[starts]
    return runs
