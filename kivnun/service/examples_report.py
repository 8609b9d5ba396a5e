"""The examples of a job, each read as its run will read it: how many tokens it trains, what is cut, what is refused and why.

One pass over the files, whose outcome is the rows that the plan asks for, and a line of JSON for each line of the training file.
Never a word of what the lines say. Next: `planning.py`.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TextIO, cast

import numpy as np

from kivnun.data.formats import UNKNOWN, stream_records
from kivnun.data.repeats import fingerprint
from kivnun.data.rows import PreferenceRecord, Record
from kivnun.data.tokens import Draft, cut_drafts
from kivnun.errors import DataError, RowProblem
from kivnun.plan.rows import PROMPTS_LOOKED_AT, RunRows

TOLD = 10  # lines that a message names


@dataclass
class Refused:
    """Lines of one file that cannot be used: how many, and the first of them in words."""

    lines: int = 0
    too_long: int = 0
    first: list[str] = field(default_factory=list[str])

    def add(self, line: int, reasons: Sequence[str], *, too_long: bool = False) -> None:
        """Take the next line that cannot be used."""
        self.lines += 1
        self.too_long += too_long
        if self.lines <= TOLD:
            self.first.append(f"line {line}: {', '.join(reasons)}")

    def words(self) -> str:
        more = f"; and {self.lines - TOLD:,} more lines" if self.lines > TOLD else ""
        return "; ".join(self.first) + more


@dataclass(frozen=True)
class Examples:
    """What the files of a job hold. Counts are of the training file, of one epoch; `overlap` counts validation examples that are
    training examples too. `rows` is None where nothing is left to train on."""

    format: str
    validation_format: str
    examples: int
    held_out: int
    rows: RunRows | None
    truncated: int
    refused: Refused
    validation_refused: Refused
    overlap: int


@dataclass
class _File:
    """The good rows of one file as numbers: tokens of each token row, and of each item (a pair is one)."""

    examples: int = 0
    sides: array[int] = field(default_factory=lambda: array("q"))
    prompts: list[int] = field(default_factory=list[int])
    trained: int = 0
    truncated: int = 0
    pairs: bool = False
    refused: Refused = field(default_factory=Refused)
    format: str = UNKNOWN

    def take(self, record: Record, drafts: Sequence[Draft]) -> None:
        self.examples += 1
        self.pairs = isinstance(record, PreferenceRecord)
        self.sides.extend(draft.length for draft in drafts)
        self.trained += sum(draft.trained for draft in drafts)
        if len(self.prompts) < PROMPTS_LOOKED_AT:
            self.prompts += [draft.prompt_len for draft in (drafts[:1] if self.pairs else drafts) if draft.prompt_len]

    @property
    def lengths(self) -> np.ndarray:
        sides = np.asarray(self.sides, dtype=np.int64)
        return sides.reshape(-1, 2).sum(axis=1) if self.pairs else sides


@dataclass(frozen=True)
class Reader:
    """How files are read: what makes token rows of a record, up to which length, and what happens to longer ones.

    `counted` is false where the rows are estimates."""

    rows_of: Callable[[Record], list[Draft]]
    max_seq_len: int
    truncate: bool
    counted: bool = True

    def read(self, training: Path, validation: Path | None, report: TextIO) -> Examples:
        """Return what the files hold, and write a line of the report for each line of the training file.

        Raises DataError where a file as a whole is of no use, StorageError."""
        held, prints = _File(), dict[bytes, int]()
        if validation is not None:
            for record, _ in self._good(validation, held, None):
                its = fingerprint(record)
                prints[its] = prints.get(its, 0) + 1
        train, overlap = _File(), 0
        for record, drafts in self._good(training, train, report):
            train.take(record, drafts)
            overlap += prints.pop(fingerprint(record), 0) if prints else 0
        rows = self._rows(train, held) if train.examples else None
        return Examples(
            train.format, held.format, train.examples, held.examples, rows, train.truncated, train.refused, held.refused, overlap
        )

    def _good(self, path: Path, file: _File, report: TextIO | None) -> Iterator[tuple[Record, list[Draft]]]:
        """Yield the records that can be used; take note of the rest."""
        stream = stream_records(path)
        for line, items in groupby(stream, key=_line):  # a row may have several problems, one after the other
            found = list(items)
            problems = [item for item in found if isinstance(item, RowProblem)]
            if problems:
                file.refused.add(line, [problem.message for problem in problems])
                _tell(report, line, refused="; ".join(problem.message for problem in problems))
                continue
            record = cast(Record, found[0])
            drafts = self._drafts(record, file, report)
            if drafts:
                if report is None:
                    file.take(record, drafts)
                yield record, drafts
        file.format = stream.format

    def _drafts(self, record: Record, file: _File, report: TextIO | None) -> list[Draft]:
        line = record.where.line
        try:
            drafts = self.rows_of(record)
        except DataError as error:
            file.refused.add(line, [problem.message for problem in error.problems] or [error.message])
            _tell(report, line, refused=error.message)
            return []
        longest, tokens = max(draft.length for draft in drafts), sum(draft.length for draft in drafts)
        if longest <= self.max_seq_len:
            _tell(report, line, tokens=tokens, trained=sum(draft.trained for draft in drafts))
            return drafts
        if self.truncate and not isinstance(record, PreferenceRecord):
            drafts, cut = cut_drafts(drafts, self.max_seq_len)
            if drafts:
                file.truncated += 1
                _tell(report, line, tokens=tokens, trained=sum(draft.trained for draft in drafts), cut=cut)
                return drafts
            reason = f"has {longest:,} tokens, and its first {self.max_seq_len:,} hold nothing to train"
        else:
            reason = f"has {longest:,} tokens, and {self.max_seq_len:,} are allowed"
        file.refused.add(line, [reason], too_long=True)
        _tell(report, line, tokens=tokens, refused=reason)
        return []

    def _rows(self, train: _File, held: _File) -> RunRows:
        return RunRows(
            train.format,
            train.lengths,
            np.asarray(train.sides, dtype=np.int64),
            held.lengths,
            np.asarray(held.prompts, dtype=np.int64),
            (len(train.lengths),),
            None,
            train.trained,
            train.refused.lines,
            train.truncated,
            counted=self.counted,
        )


def _line(item: Record | RowProblem) -> int:
    return item.line if isinstance(item, RowProblem) else item.where.line


def _tell(
    report: TextIO | None, line: int, *, tokens: int | None = None, trained: int = 0, cut: int = 0, refused: str | None = None
) -> None:
    if report is None:
        return
    status = "refused" if refused is not None else "cut" if cut else "trained"
    told = {"line": line, "status": status, "tokens": tokens, "trained_tokens": trained, "cut_tokens": cut, "reason": refused}
    report.write(json.dumps(told, separators=(",", ":")) + "\n")
