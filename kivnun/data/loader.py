"""From the files a spec names to the rows a run trains and scores: nothing dropped, cut or repeated without being counted.

read (`formats.py`) -> token rows (`tokens.py`) -> what is too long -> refuse or skip -> hold out -> number -> report. All
problems of all files are collected before any is raised. Next: `order.py` (which rows make a step), `packing.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kivnun.data.checks import DataReport, by_reason, fingerprint, num_bad_rows, num_duplicates, num_empty_replies, reasons
from kivnun.data.formats import UNKNOWN, read_records
from kivnun.data.rows import PreferencePair, PreferenceRecord, Record, TokenRow, Trainable
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
    rows: tuple[Trainable, ...]


@dataclass(frozen=True)
class Sources:
    """All training rows. A row's number is its index in `rows`, the concatenation of the files in the spec's order.

    Preference pair i holds the token rows numbered 2i (chosen) and 2i + 1 (rejected).
    """

    files: tuple[Source, ...]

    @cached_property
    def rows(self) -> tuple[Trainable, ...]:
        return tuple(row for source in self.files for row in source.rows)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each row (int64); of a pair, both sides together."""
        return np.asarray([row.length for row in self.rows], dtype=np.int64)

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
    validation: list[Trainable]
    format: str
    report: DataReport
    content_hash: str


@dataclass(frozen=True, slots=True)
class _Item:
    """One usable record and its token rows, before it is dealt to training or held-out."""

    record: Record
    drafts: list[Draft]


@dataclass
class _File:
    path: Path
    share: float | None
    items: list[_Item] = field(default_factory=list[_Item])


@dataclass
class _Findings:
    """What reading all files brought up. `fatal` ends the run, `listed` is reported."""

    fatal: list[RowProblem] = field(default_factory=list[RowProblem])
    listed: list[RowProblem] = field(default_factory=list[RowProblem])
    over_long: int = 0
    rows: int = 0
    truncated: int = 0
    cut_tokens: int = 0


def load_dataset(spec: DataSpec, tokenizer: RowTokenizer, seed: int, max_seq_len: int) -> Dataset:
    """Return the rows of a spec's data, held-out rows set apart. A pure function of the files' bytes, spec, tokenizer and seed.

    Raises DataError with the problems of all files, SpecError where the spec asks what this data cannot have, StorageError.
    """
    files = [_File(source.path, source.share) for source in spec.train]
    held_out = _File(spec.validation, None) if isinstance(spec.validation, Path) else None
    findings = _Findings()
    name = _read_all([*files, *([held_out] if held_out else [])], spec, tokenizer, max_seq_len, findings)
    if findings.fatal:
        raise _refusal(findings, max_seq_len)
    if isinstance(spec.validation, float):
        held_out = _hold_out(files, spec.validation, seed)
    _check_left(files, held_out)
    train = _number_sources(files)
    validation = _number(held_out.items, 0) if held_out else []
    report = _report(name, files, held_out, train, validation, spec, max_seq_len, findings)
    return Dataset(train, validation, name, report, _content_hash(name, train, validation))


def _read_all(files: Sequence[_File], spec: DataSpec, tokenizer: RowTokenizer, max_seq_len: int, findings: _Findings) -> str:
    """Fill every file's items, and the findings; return the one format of all files."""
    formats: dict[str, Path] = {}
    for file in files:
        name, records, problems = read_records(file.path, spec.format)
        if name == "preference" and spec.over_long == "truncate":
            raise SpecError(
                "data.over_long: truncate cannot be used with preferences: cutting one reply would decide the comparison",
                hint="use refuse or skip",
            )
        if name != UNKNOWN:
            formats.setdefault(name, file.path)
        findings.rows += len(records) + num_bad_rows(problems)
        (findings.fatal if spec.bad_rows == "refuse" else findings.listed).extend(problems)
        file.items = [item for record in records if (item := _item(record, spec, tokenizer, max_seq_len, findings)) is not None]
    if len(formats) > 1:
        parts = " and ".join(f"{name} ({path})" for name, path in formats.items())
        raise DataError(
            f"the files hold rows of different formats: {parts}",
            hint="one run takes rows of one format",
            pages=("07-mixed-formats",),
        )
    return next(iter(formats), UNKNOWN)


def _item(record: Record, spec: DataSpec, tokenizer: RowTokenizer, max_seq_len: int, findings: _Findings) -> _Item | None:
    """Return the record with its token rows, or None with a finding that says why not."""
    bad = findings.fatal if spec.bad_rows == "refuse" else findings.listed
    where = record.where
    try:
        drafts = make_drafts(record, tokenizer)
    except DataError as error:
        bad.extend(error.problems or [RowProblem(where.path, where.line, error.message)])
        return None
    longest = max(draft.length for draft in drafts)
    if longest <= max_seq_len:
        return _Item(record, drafts)
    if spec.over_long != "truncate":
        findings.over_long += 1
        message = f"has {longest:,} tokens, max_seq_len is {max_seq_len:,}"
        problem = RowProblem(where.path, where.line, message, "08-rows-too-long")
        (findings.fatal if spec.over_long == "refuse" else findings.listed).append(problem)
        return None
    drafts, num_cut = cut_drafts(drafts, max_seq_len)
    if not drafts:
        message = f"has {longest:,} tokens; its first {max_seq_len:,} hold nothing to train"
        bad.append(RowProblem(where.path, where.line, message))
        return None
    findings.truncated += 1
    findings.cut_tokens += num_cut
    return _Item(record, drafts)


def _refusal(findings: _Findings, max_seq_len: int) -> DataError:
    problems = tuple(sorted(findings.fatal, key=lambda problem: (problem.path, problem.line)))
    hints: list[str] = []
    if findings.over_long:
        hints.append(f"rows longer than data.max_seq_len ({max_seq_len:,}): raise it, or set data.over_long to skip or truncate")
    if findings.over_long < num_bad_rows(problems):
        hints.append("mend the rows, or set data.bad_rows to skip, which lists what it leaves out")
    return DataError(f"{num_bad_rows(problems):,} of {findings.rows:,} rows cannot be used", problems, hint="; ".join(hints))


def _hold_out(files: Sequence[_File], share: float, seed: int) -> _File:
    """Move a share of all records, at least one, to a held-out set; at least one stays. Token rows of a record stay together."""
    records = [(file, item) for file in files for item in file.items]
    count = len(records)
    if count < 2:
        raise DataError(
            f"{count} usable {'row' if count == 1 else 'rows'}: too few to train on some and hold others out",
            hint="give more rows, or set data.validation to null or to a file",
        )
    num_held_out = min(max(round(count * share), 1), count - 1)
    chosen = {int(index) for index in permutation(count, seed, "validation")[:num_held_out]}
    for file in files:
        file.items = []
    held_out = _File(Path(), None)
    for index, (file, item) in enumerate(records):
        (held_out if index in chosen else file).items.append(item)
    return held_out


def _check_left(files: Sequence[_File], held_out: _File | None) -> None:
    if not any(file.items for file in files):
        raise DataError("no training row is left", hint="the report of `kivnun data check FILE` says what is wrong with the rows")
    if held_out is not None and not held_out.items:
        raise DataError(f"no held-out row is left of {held_out.path}", hint="mend the file, or set data.validation to null")
    for file in files:
        if file.share is not None and not file.items:
            raise DataError(
                f"no training row is left of {file.path}, which has a share", hint="give the file more rows, or no part"
            )


def _number_sources(files: Sequence[_File]) -> Sources:
    sources: list[Source] = []
    first = 0
    for file in files:
        rows = _number(file.items, first)
        first += len(rows)
        if rows:  # a file without rows (all skipped or held out) would be an empty stream
            sources.append(Source(str(file.path), file.share, tuple(rows)))
    return Sources(tuple(sources))


def _number(items: Iterable[_Item], first: int) -> list[Trainable]:
    """Return the trainable rows of the items, numbered from `first`."""
    rows: list[Trainable] = []
    for item in items:
        number, where = first + len(rows), item.record.where
        if _is_pair(item):
            sides = [TokenRow(d.ids, d.weights, 2 * number + side, where, d.prompt_len) for side, d in enumerate(item.drafts)]
            rows.append(PreferencePair(sides[0], sides[1], number, where))
        else:
            rows.extend(TokenRow(d.ids, d.weights, number + at, where, d.prompt_len) for at, d in enumerate(item.drafts))
    return rows


def _is_pair(item: _Item) -> bool:
    return isinstance(item.record, PreferenceRecord)


def _report(
    name: str,
    files: Sequence[_File],
    held_out: _File | None,
    train: Sources,
    validation: Sequence[Trainable],
    spec: DataSpec,
    max_seq_len: int,
    findings: _Findings,
) -> DataReport:
    records = [item.record for file in files for item in file.items]
    held_records = [item.record for item in held_out.items] if held_out else []
    prints = [fingerprint(record) for record in records]
    seen = set(prints)
    overlap = sum(fingerprint(record) in seen for record in held_records)
    return DataReport(
        format=name,
        train_rows=len(train),
        validation_rows=len(validation),
        train_tokens=int(train.lengths.sum()),
        trained_tokens=_num_trained(train.rows),
        validation_tokens=sum(row.length for row in validation),
        validation_trained_tokens=_num_trained(validation),
        longest_row=max(row.length for row in (*train.rows, *validation)),
        skipped=num_bad_rows(findings.listed),
        truncated=findings.truncated,
        cut_tokens=findings.cut_tokens,
        duplicates=num_duplicates(prints),
        overlap=overlap,
        empty_replies=sum(num_empty_replies(record) for record in (*records, *held_records)),
        problems=tuple(findings.listed),
        reasons=reasons(findings.listed),
        notes=tuple(_notes(name, train, files, held_out, spec, max_seq_len, findings)),
        warnings=(*by_reason(findings.listed), *_overlap_warning(overlap, len(held_records))),
    )


def _notes(
    name: str,
    train: Sources,
    files: Sequence[_File],
    held_out: _File | None,
    spec: DataSpec,
    max_seq_len: int,
    findings: _Findings,
) -> Iterable[str]:
    """Yield what was decided without being asked for in so many words."""
    if spec.format == "auto":
        yield f"format {name}, decided by the keys of the first good row of {files[0].path.name}"
    if held_out is not None and isinstance(spec.validation, float):
        count = sum(len(file.items) for file in files) + len(held_out.items)
        yield f"{len(held_out.items):,} of {count:,} records are held out (validation {spec.validation:g}), chosen by the seed"
    if findings.truncated and name == "text":
        yield f"truncated rows keep their first {max_seq_len:,} tokens; the end-of-text token of these rows is not trained"
    elif findings.truncated:
        yield f"truncated rows keep their first {max_seq_len:,} tokens; replies and end markers after that are not trained"
    kept = {source.path for source in train.files}
    for file in files:
        if str(file.path) not in kept:
            yield f"{file.path} gives no training row: its rows are all skipped or held out"


def _overlap_warning(overlap: int, num_held_out: int) -> Iterable[str]:
    if overlap:
        yield (
            f"{overlap:,} of {num_held_out:,} held-out records are also training records: the held-out score is too good; "
            "remove the duplicates from one side"
        )


def _num_trained(rows: Iterable[Trainable]) -> int:
    return sum(int(np.count_nonzero(side.weights)) for row in rows for side in row.sides)


def _content_hash(name: str, train: Sources, validation: Sequence[Trainable]) -> str:
    digest = hashlib.sha256(f"{name} {train.sizes} {train.shares} {len(validation)}".encode())
    for row in (*train.rows, *validation):
        for side in row.sides:
            digest.update(f"|{side.row} {side.length} {side.prompt_len}|".encode())
            digest.update(side.ids.astype("<i4").tobytes())
            digest.update(side.weights.astype("<f4").tobytes())
    return digest.hexdigest()
