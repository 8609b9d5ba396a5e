"""From the files a spec names to the rows a run trains and scores: nothing dropped, cut or repeated without being counted.

read (`formats.py`) -> token rows (`tokens.py`) -> what is too long -> refuse or skip -> store -> hold out -> number -> report.
Rows pass one at a time: a file may be larger than memory. All problems of all files are found before any is raised. Next:
`store.py` (where rows lie), `repeats.py` (what is there twice), `order.py` (which rows make a step), `packing.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kivnun.data.checks import DataReport, histogram, num_empty_replies
from kivnun.data.formats import UNKNOWN, stream_records
from kivnun.data.opening import name_of
from kivnun.data.problems import Problems
from kivnun.data.repeats import Found, Repeats
from kivnun.data.rows import PreferenceRecord, Record
from kivnun.data.spool import Table
from kivnun.data.store import RowStore, StoredRows
from kivnun.data.tokens import Draft, RowTokenizer, cut_drafts, make_drafts
from kivnun.errors import DataError, RowProblem, SpecError
from kivnun.randomness import permutation

if TYPE_CHECKING:
    from kivnun.spec import DataSpec


@dataclass(frozen=True)
class Source:
    """The training rows of one file. `share` is its part of an epoch, None where files are taken as they are."""

    path: str
    share: float | None
    rows: StoredRows


@dataclass(frozen=True)
class Sources:
    """All training rows. A row's number is its index in `rows`, the concatenation of the files in the spec's order.

    Preference pair i holds the token rows numbered 2i (chosen) and 2i + 1 (rejected).
    """

    files: tuple[Source, ...]
    rows: StoredRows

    @cached_property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each row (int64); of a pair, both sides together."""
        return self.rows.lengths

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(source.rows) for source in self.files)

    @property
    def shares(self) -> tuple[float, ...] | None:
        shares = tuple(source.share for source in self.files if source.share is not None)
        return shares if len(shares) == len(self.files) else None

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Dataset:
    """What a run trains on and is scored on. `content_hash` (sha256, hex) covers ids, weights, shares and the split: two runs with
    the same one see the same numbers."""

    train: Sources
    validation: StoredRows
    format: str
    report: DataReport
    content_hash: str


@dataclass
class _File:
    """A file and which of all usable records are its own: [first, end)."""

    path: Path
    share: float | None
    first: int = 0
    end: int = 0

    @property
    def name(self) -> str:
        return name_of(self.path)


@dataclass
class _Findings:
    """What reading all files brought up. `fatal` ends the run, `listed` is reported."""

    fatal: Problems = field(default_factory=Problems)
    listed: Problems = field(default_factory=Problems)
    over_long: int = 0
    rows: int = 0
    truncated: int = 0
    cut_tokens: int = 0
    empty_replies: int = 0
    notes: list[str] = field(default_factory=list[str])


class _Read:
    """What was read: token rows, how many items each usable record came to (1, or more where a template says so), what repeats."""

    def __init__(self, folder: Path | None) -> None:
        self.store = RowStore(folder)
        self.repeats = Repeats(folder)
        self.findings = _Findings()
        self._items = Table(np.dtype("<i4"), folder)

    @property
    def num_records(self) -> int:
        return len(self._items)

    def add(self, record: Record, drafts: Sequence[Draft]) -> None:
        """Take a usable record with its token rows."""
        for draft in drafts:
            self.store.append(draft, record.where)
        self._items.append(np.int32(1 if isinstance(record, PreferenceRecord) else len(drafts)).tobytes())
        self.repeats.add(record)
        self.findings.empty_replies += num_empty_replies(record)

    def items_of_records(self) -> np.ndarray:
        """Return how many items each usable record came to, int32."""
        return self._items.read()


def load_dataset(spec: DataSpec, tokenizer: RowTokenizer, seed: int, max_seq_len: int, folder: Path | None = None) -> Dataset:
    """Return the rows of a spec's data, held-out rows set apart. A pure function of the files' bytes, spec, tokenizer and seed.

    Rows that are many lie in a file without a name in `folder` (None: where the system puts temporary files), gone with the data
    set or the process. Raises DataError with the problems of all files, SpecError where the spec asks what this data cannot have,
    StorageError.
    """
    files = [_File(source.path, source.share) for source in spec.train]
    held_out = _File(spec.validation, None) if isinstance(spec.validation, Path) else None
    read = _Read(folder)
    name = _read_all([*files, *([held_out] if held_out else [])], spec, tokenizer, max_seq_len, read)
    if read.findings.fatal:
        raise _refusal(read.findings, max_seq_len)
    held = _held_out(read.num_records, held_out or spec.validation, seed)
    _check_left(files, held_out, held)
    train, validation = _dealt(files, read, held, name == "preference")
    report = _report(name, files, train, validation, held, spec, max_seq_len, read)
    return Dataset(train, validation, name, report, _content_hash(name, train, validation))


def _read_all(files: Sequence[_File], spec: DataSpec, tokenizer: RowTokenizer, max_seq_len: int, read: _Read) -> str:
    """Read every file; return the one format of all."""
    formats: dict[str, str] = {}
    for file in files:
        file.first = read.num_records
        name = _read_file(file.path, spec, tokenizer, max_seq_len, read)
        file.end = read.num_records
        if name == "preference":
            _refuse_cut_pairs(spec)
        if name != UNKNOWN:
            formats.setdefault(name, file.name)
    if len(formats) > 1:
        parts = " and ".join(f"{name} ({path})" for name, path in formats.items())
        raise DataError(
            f"the files hold rows of different formats: {parts}",
            hint="one run takes rows of one format",
            pages=("07-mixed-formats",),
        )
    return next(iter(formats), UNKNOWN)


def _read_file(path: Path, spec: DataSpec, tokenizer: RowTokenizer, max_seq_len: int, read: _Read) -> str:
    """Read one file to its end; return its format."""
    findings = read.findings
    bad = findings.fatal if spec.bad_rows == "refuse" else findings.listed
    stream = stream_records(path, spec.format, spec.columns, spec.instruction)
    line = None
    for item in stream:
        if isinstance(item, RowProblem):
            findings.rows += item.line != line  # a row may have several problems, one after the other
            line = item.line
            bad.add(item)
            continue
        findings.rows += 1
        if isinstance(item, PreferenceRecord):
            _refuse_cut_pairs(spec)
        drafts = _drafts(item, spec, tokenizer, max_seq_len, findings)
        if drafts:
            read.add(item, drafts)
    findings.notes += stream.notes
    return stream.format


def _refuse_cut_pairs(spec: DataSpec) -> None:
    if spec.over_long == "truncate":
        raise SpecError(
            "data.over_long: truncate cannot be used with preferences: cutting one reply would decide the comparison",
            hint="use refuse or skip",
        )


def _drafts(record: Record, spec: DataSpec, tokenizer: RowTokenizer, max_seq_len: int, findings: _Findings) -> list[Draft]:
    """Return the record's token rows, or none, with a finding that says why."""
    bad = findings.fatal if spec.bad_rows == "refuse" else findings.listed
    where = record.where
    try:
        drafts = make_drafts(record, tokenizer)
    except DataError as error:
        for problem in error.problems or [RowProblem(where.path, where.line, error.message)]:
            bad.add(problem)
        return []
    longest = max(draft.length for draft in drafts)
    if longest <= max_seq_len:
        return drafts
    if spec.over_long != "truncate":
        findings.over_long += 1
        message = f"has {longest:,} tokens, max_seq_len is {max_seq_len:,}"
        problem = RowProblem(where.path, where.line, message, "08-rows-too-long")
        (findings.fatal if spec.over_long == "refuse" else findings.listed).add(problem)
        return []
    drafts, num_cut = cut_drafts(drafts, max_seq_len)
    if not drafts:
        message = f"has {longest:,} tokens; its first {max_seq_len:,} hold nothing to train"
        bad.add(RowProblem(where.path, where.line, message))
        return []
    findings.truncated += 1
    findings.cut_tokens += num_cut
    return drafts


def _refusal(findings: _Findings, max_seq_len: int) -> DataError:
    fatal = findings.fatal
    problems = tuple(sorted(fatal.kept, key=lambda problem: (problem.path, problem.line)))
    hints: list[str] = []
    if findings.over_long:
        hints.append(f"rows longer than data.max_seq_len ({max_seq_len:,}): raise it, or set data.over_long to skip or truncate")
    if findings.over_long < fatal.rows:
        hints.append("mend the rows, or set data.bad_rows to skip, which lists what it leaves out")
    return DataError(f"{fatal.rows:,} of {findings.rows:,} rows cannot be used{fatal.left_out}", problems, hint="; ".join(hints))


def _held_out(count: int, asked: _File | float | Path | None, seed: int) -> np.ndarray:
    """Return which of `count` records are held out: those of a file, or a share of all, at least one; at least one stays."""
    held = np.zeros(count, dtype=np.bool_)
    if isinstance(asked, _File):
        held[asked.first : asked.end] = True
    elif isinstance(asked, float):
        if count < 2:
            raise DataError(
                f"{count} usable {'row' if count == 1 else 'rows'}: too few to train on some and hold others out",
                hint="give more rows, or set data.validation to null or to a file",
            )
        num_held_out = min(max(round(count * asked), 1), count - 1)
        held[permutation(count, seed, "validation")[:num_held_out]] = True
    return held


def _check_left(files: Sequence[_File], held_out: _File | None, held: np.ndarray) -> None:
    left = [int((~held[file.first : file.end]).sum()) for file in files]
    if not any(left):
        raise DataError("no training row is left", hint="the report of `kivnun data check FILE` says what is wrong with the rows")
    if held_out is not None and held_out.first == held_out.end:
        raise DataError(f"no held-out row is left of {held_out.name}", hint="mend the file, or set data.validation to null")
    for file, count in zip(files, left, strict=True):
        if file.share is not None and not count:
            raise DataError(
                f"no training row is left of {file.name}, which has a share", hint="give the file more rows, or no part"
            )


def _dealt(files: Sequence[_File], read: _Read, held: np.ndarray, pairs: bool) -> tuple[Sources, StoredRows]:
    """Return the training rows by file, numbered through all files, and the held-out rows, numbered by themselves. Token rows of a
    record are on the same side."""
    items = read.items_of_records()
    held_items = np.repeat(held, items)
    places = np.flatnonzero(~held_items)
    sources: list[Source] = []
    start = first = 0
    for file in files:
        end = start + int(items[file.first : file.end].sum())
        count = int(np.count_nonzero(~held_items[start:end]))
        if count:  # a file without rows (all skipped or held out) would be an empty stream
            rows = StoredRows(read.store, places[first : first + count], first, pairs)
            sources.append(Source(file.name, file.share, rows))
        start, first = end, first + count
    train = Sources(tuple(sources), StoredRows(read.store, places, 0, pairs))
    return train, StoredRows(read.store, np.flatnonzero(held_items), 0, pairs)


def _report(
    name: str,
    files: Sequence[_File],
    train: Sources,
    validation: StoredRows,
    held: np.ndarray,
    spec: DataSpec,
    max_seq_len: int,
    read: _Read,
) -> DataReport:
    findings, found = read.findings, read.repeats.find(held)
    of_validation = validation.lengths
    return DataReport(
        format=name,
        train_rows=len(train),
        validation_rows=len(validation),
        train_tokens=int(train.lengths.sum()),
        trained_tokens=train.rows.num_trained,
        validation_tokens=int(of_validation.sum()),
        validation_trained_tokens=validation.num_trained,
        longest_row=int(max(train.lengths.max(), of_validation.max(initial=0))),
        skipped=findings.listed.rows,
        truncated=findings.truncated,
        cut_tokens=findings.cut_tokens,
        duplicates=found.duplicates,
        overlap=found.overlap,
        empty_replies=findings.empty_replies,
        problems=tuple(findings.listed.kept),
        reasons=findings.listed.reasons,
        notes=(*_notes(name, train, files, held, spec, max_seq_len, findings), *found.notes()),
        warnings=(*findings.listed.sentences(), *_overlap_warning(found, int(held.sum()))),
        near_duplicates=found.near_duplicates,
        near_overlap=found.near_overlap,
        lengths=histogram(train.lengths, of_validation),
    )


def _notes(
    name: str,
    train: Sources,
    files: Sequence[_File],
    held: np.ndarray,
    spec: DataSpec,
    max_seq_len: int,
    findings: _Findings,
) -> Iterable[str]:
    """Yield what was decided without being asked for in so many words."""
    if spec.format == "auto":
        yield f"format {name}, decided by the keys of the first good row of {files[0].path.name}"
    yield from findings.notes
    if isinstance(spec.validation, float):
        yield f"{held.sum():,} of {len(held):,} records are held out (validation {spec.validation:g}), chosen by the seed"
    if findings.truncated and name == "text":
        yield f"truncated rows keep their first {max_seq_len:,} tokens; the end-of-text token of these rows is not trained"
    elif findings.truncated:
        yield f"truncated rows keep their first {max_seq_len:,} tokens; replies and end markers after that are not trained"
    kept = {source.path for source in train.files}
    for file in files:
        if file.name not in kept:
            yield f"{file.name} gives no training row: its rows are all skipped or held out"


def _overlap_warning(found: Found, num_held_out: int) -> Iterable[str]:
    if found.overlap:
        yield (
            f"{found.overlap:,} of {num_held_out:,} held-out records are also training records: the held-out score is too good; "
            "remove the duplicates from one side"
        )


def _content_hash(name: str, train: Sources, validation: StoredRows) -> str:
    digest = hashlib.sha256(f"{name} {train.sizes} {train.shares} {len(validation)}".encode())
    for rows in (train.rows, validation):
        for item in rows:
            for row in item.sides:
                digest.update(f"|{row.row} {row.length} {row.prompt_len}|".encode())
                digest.update(row.ids.astype("<i4").tobytes())
                digest.update(row.weights.astype("<f4").tobytes())
    return digest.hexdigest()
