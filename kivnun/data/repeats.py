"""Rows that say the same: exact and near duplicates in training, and held-out rows that are in training too.

Rows are shown to a `Repeats` one by one as they are read; 28 bytes of each are kept, on disk where they are many. Once it is
known which rows are held out, `find` gives the counts and the first pairs. Exact copies are counted over all rows. Near ones are
looked for among at most LOOKED_AT different rows, drawn by a hash of what they say: neither time nor memory grows beyond that.
Next: `signatures.py` (what near is and how it is found), `loader.py` and `check_files.py` (who ask).
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kivnun.data.rows import ChatRecord, PreferenceRecord, PromptRecord, Record, TextRecord, Where
from kivnun.data.signatures import BINS, find_near, sketch_of
from kivnun.data.spool import AT_ONCE, Table

LOOKED_AT = 50_000
"""Different rows among which near duplicates are looked for."""
SHOWN = 50
"""Pairs of a kind that a report lists."""
# Fingerprints are sorted in parts of about so many rows, each picked out of all that are on disk; more parts take too long.
_PART, MAX_PARTS = 2**18, 16

_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("line", "<i8"), ("path", "<i4")])
_PACKED_RECORD = struct.Struct("<QQqi")
_SPAN = np.dtype([("start", "<i8"), ("count", "<i4")])
_PACKED_SPAN = struct.Struct("<qi")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two rows that say the same, or nearly: `row` is like `other`, which comes before it or is a training row. `likeness` is
    shared runs of characters over those of both; of exact copies 1."""

    row: Where
    other: Where
    likeness: float


@dataclass(frozen=True, slots=True)
class Found:
    """What repeats. `duplicates` counts training rows equal to an earlier one, `near_duplicates` different ones that are near an
    earlier one; `overlap` held-out rows equal to a training row, `near_overlap` others near one. `looked_at` of `different` rows
    were looked at for what is near. Of each kind the first SHOWN pairs are kept."""

    duplicates: int
    near_duplicates: int
    overlap: int
    near_overlap: int
    looked_at: int
    different: int
    pairs: dict[str, tuple[Pair, ...]]

    def notes(self) -> Iterator[str]:
        """Yield what a reader of the counts must know."""
        if self.looked_at < self.different:
            yield (
                f"near duplicates were looked for among {self.looked_at:,} of {self.different:,} different rows, drawn by a hash "
                "of what they say: there may be more"
            )


class Repeats:
    """Takes rows in their order and finds what repeats in them. `folder` as in `spool.Spool`."""

    def __init__(self, folder: Path | None = None, looked_at: int = LOOKED_AT) -> None:
        self._records = Table(_RECORD, folder)
        self._paths: list[str] = []
        self._sample = _Sample(folder, looked_at)

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: Record) -> None:
        """Take a row. Raises StorageError."""
        high, low = struct.unpack("<QQ", fingerprint(record))
        if record.where.path not in self._paths[-1:]:
            self._paths.append(record.where.path)
        self._records.append(_PACKED_RECORD.pack(high, low, record.where.line, len(self._paths) - 1))
        self._sample.add(high, record)

    def find(self, held_out: np.ndarray) -> Found:
        """Return what repeats; `held_out` [rows] says which rows are held out. Raises StorageError."""
        assert len(held_out) == len(self)
        copies = _Copies()
        for part in self._parts():
            copies.take(part, held_out)
        hashes, slots = self._sample.by_hash()
        first = self._first_rows(hashes, held_out)
        says = first < len(self)
        train, held = np.flatnonzero(says[:, 0]), np.flatnonzero(says[:, 1] & ~says[:, 0])
        train, held = train[np.argsort(first[train, 0])], held[np.argsort(first[held, 1])]
        bins, lowest = self._sample.bins(slots), self._sample.lowest(slots)
        near, over = find_near(bins, lowest, train, train), find_near(bins, lowest, train, held)
        return Found(
            duplicates=copies.duplicates,
            near_duplicates=int((near[0] >= 0).sum()),
            overlap=copies.overlap,
            near_overlap=int((over[0] >= 0).sum()),
            looked_at=len(slots),
            different=copies.different,
            pairs={
                "duplicates": self._pairs(copies.of_train, np.ones(SHOWN)),
                "near_duplicates": self._near_pairs(first[train, 0], first[:, 0], *near),
                "overlap": self._pairs(copies.of_held_out, np.ones(SHOWN)),
                "near_overlap": self._near_pairs(first[held, 1], first[:, 0], *over),
            },
        )

    def _parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (row numbers, fingerprints) of about _PART rows at a time, equal ones always in the same part."""
        num_parts = min(MAX_PARTS, len(self) // _PART + 1)
        for part in range(num_parts if len(self) else 0):
            numbers: list[np.ndarray] = []
            prints: list[np.ndarray] = []
            for start, records in self._chunks():
                mine = np.flatnonzero(records["high"] % np.uint64(num_parts) == part)
                numbers.append(mine + start)
                prints.append(records[["high", "low"]][mine].copy())
            yield np.concatenate(numbers), np.concatenate(prints)

    def _chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(self), AT_ONCE):
            yield start, self._records.read(start, min(start + AT_ONCE, len(self)))

    def _first_rows(self, hashes: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Return the first training and the first held-out row that says each text of the sample [N, 2]; len(self) for none."""
        first = np.full((len(hashes), 2), len(self), dtype=np.int64)
        for start, records in self._chunks():
            at = np.searchsorted(hashes, records["high"])
            known = np.flatnonzero(at < len(hashes))
            known = known[hashes[at[known]] == records["high"][known]]
            np.minimum.at(first, (at[known], held_out[known + start].astype(np.int64)), known + start)
        return first

    def _where(self, row: int) -> Where:
        entry = self._records.read(row, row + 1)[0]
        return Where(self._paths[int(entry["path"])], int(entry["line"]))

    def _near_pairs(self, rows: np.ndarray, first: np.ndarray, found: np.ndarray, alike: np.ndarray) -> tuple[Pair, ...]:
        """Return pairs of the rows for which a text was found, with the row that says it."""
        places = np.flatnonzero(found >= 0)[:SHOWN]
        return self._pairs(np.stack([rows[places], first[found[places]]], axis=1), alike[places])

    def _pairs(self, rows: np.ndarray, alike: np.ndarray) -> tuple[Pair, ...]:
        places = [(self._where(int(row)), self._where(int(other))) for row, other in rows]
        return tuple(Pair(*pair, round(float(value), 3)) for pair, value in zip(places, alike[: len(rows)], strict=True))


class _Copies:
    """Counts exact copies part by part, and keeps the first pairs (row, the one it copies) of each kind."""

    def __init__(self) -> None:
        self.duplicates = self.overlap = self.different = 0
        self.of_train = self.of_held_out = np.empty((0, 2), dtype=np.int64)

    def take(self, part: tuple[np.ndarray, np.ndarray], held_out: np.ndarray) -> None:
        numbers, prints = part
        if not len(numbers):
            return
        held = held_out[numbers]
        # Equal prints side by side, of each the training rows first, in their order.
        order = np.lexsort((numbers, held, prints["low"], prints["high"]))
        numbers, prints, held = numbers[order], prints[order], held[order]
        begins = np.concatenate([[True], prints[1:] != prints[:-1]])
        heads = np.flatnonzero(begins)[np.cumsum(begins) - 1]
        copy = ~begins & ~held
        over = held & ~held[heads]
        self.duplicates += int(copy.sum())
        self.overlap += int(over.sum())
        self.different += int(begins.sum())
        self.of_train = _first_pairs(self.of_train, numbers[copy], numbers[heads[copy]])
        self.of_held_out = _first_pairs(self.of_held_out, numbers[over], numbers[heads[over]])


def _first_pairs(pairs: np.ndarray, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    joined = np.concatenate([pairs, np.stack([rows, others], axis=1)])
    return joined[np.argsort(joined[:, 0])][:SHOWN]


class _Sample:
    """Sketches of at most `limit` different rows: those whose hash is below a line that comes down as more rows come. Which rows
    are in it depends on what they say alone, not on their order."""

    def __init__(self, folder: Path | None, limit: int) -> None:
        self._limit, self._line = limit, 2**64
        self._slots: dict[int, int] = {}
        self._bins = Table(np.dtype("<u2"), folder)
        self._lowest = Table(np.dtype("<u4"), folder)
        self._spans = Table(_SPAN, folder)

    def __len__(self) -> int:
        return len(self._slots)

    def add(self, key: int, record: Record) -> None:
        if key >= self._line or key in self._slots:
            return
        sketch = sketch_of(text_of(record))
        self._slots[key] = len(self._spans)
        self._spans.append(_PACKED_SPAN.pack(len(self._lowest), len(sketch.lowest)))
        self._lowest.append(sketch.lowest.tobytes())
        self._bins.append(sketch.bins.tobytes())
        while len(self._slots) > self._limit:
            self._line //= 2
            self._slots = {key: slot for key, slot in self._slots.items() if key < self._line}

    def by_hash(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the hashes of the sample in order (uint64), and the place of each text's sketch."""
        hashes = sorted(self._slots)
        slots = np.array([self._slots[key] for key in hashes], dtype=np.int64)
        return np.array(hashes, dtype=np.uint64), slots

    def bins(self, slots: np.ndarray) -> np.ndarray:
        """Return the bins of the sketches at these places [N, BINS]."""
        found = np.empty((len(slots), BINS), dtype=np.uint16)
        for number, slot in enumerate(slots.tolist()):
            found[number] = self._bins.read(slot * BINS, (slot + 1) * BINS)
        return found

    def lowest(self, slots: np.ndarray) -> Callable[[int], np.ndarray]:
        """Return a function that gives the lowest hashes of a text by its place in `slots`."""
        spans = self._spans.read()[slots]
        starts, ends = spans["start"].tolist(), (spans["start"] + spans["count"]).tolist()
        return lambda text: self._lowest.read(starts[text], ends[text])


def fingerprint(record: Record) -> bytes:
    """Return 16 bytes that are equal for two records exactly when their content is (where they came from does not count)."""
    text = json.dumps([type(record).__name__, *_content(record)], sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def text_of(record: Record) -> str:
    """Return what a record says, one part a line: contents and tool calls, without roles and the schemas of tools."""
    match record:
        case ChatRecord():
            return "\n".join(part for message in record.messages for part in _said(message))
        case PromptRecord():
            return f"{record.prompt}\n{record.completion}"
        case TextRecord():
            return record.text
        case PreferenceRecord():
            prompt = record.prompt if isinstance(record.prompt, str) else text_of(record.prompt)
            return f"{prompt}\n{record.chosen}\n{record.rejected}"


def _said(message: dict[str, Any]) -> Iterator[str]:
    if message.get("content"):
        yield message["content"]
    if "tool_calls" in message:
        yield json.dumps(message["tool_calls"], ensure_ascii=False)


def _content(record: Record) -> list[object]:
    match record:
        case ChatRecord():
            return [record.messages, record.tools]
        case PromptRecord():
            return [record.prompt, record.completion]
        case TextRecord():
            return [record.text]
        case PreferenceRecord():
            prompt = record.prompt if isinstance(record.prompt, str) else _content(record.prompt)
            return [prompt, record.chosen, record.rejected]
