"""What is known of data once it is read: counts, problems by reason, lengths, and the tables that show them.

`check_files` looks at files before a run (`kivnun data check`); `DataReport` is what `load_dataset` found on the way to token rows.
Next: `loader.py`, `repeats.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kivnun.data.formats import UNKNOWN, RecordStream, stream_records
from kivnun.data.opening import name_of
from kivnun.data.problems import Problems
from kivnun.data.repeats import Found, Repeats
from kivnun.data.rows import ChatRecord, PreferenceRecord, PromptRecord, Record, TextRecord
from kivnun.data.spool import Table
from kivnun.data.tokens import RowTokenizer, make_drafts
from kivnun.errors import DataError, RowProblem

SAMPLES = 3
"""Rows that a check shows as they are."""
MAX_LABELS, MAX_LABEL = 60, 80
"""Replies are counted as labels while there are at most so many different ones, each of at most so many characters."""
SHORTEST = 4
"""Tokens, or characters, up to which rows stand in the first step of a histogram: 4, 6, 8, 12, 16, 24 and so on."""


@dataclass(frozen=True, slots=True)
class FileReport:
    """What a data file holds, or several together. `rows` counts good rows, `bad_rows` lines with a problem, `characters` those of
    good rows; `reasons` says of how many rows each problem is."""

    path: str
    format: str
    rows: int
    bad_rows: int
    problems: tuple[RowProblem, ...]
    roles: dict[str, int]
    characters: int
    trained_replies: int
    context_replies: int
    empty_replies: int
    duplicates: int
    reasons: dict[str, int]


@dataclass(frozen=True, slots=True)
class Check:
    """What is in files before a run. `found` is what repeats in them and over to the held-out file; `lengths` is (most, training
    rows, held-out rows) by step, in `unit`; `over_long` counts rows that are longer than the base was made for.

    `labels` maps each reply to its number of training and held-out rows, where few replies are given again and again; `samples` are
    the first rows. Only these two hold what rows say.
    """

    train: FileReport
    held_out: FileReport | None
    found: Found
    unit: str
    total: int
    longest: int
    over_long: int
    lengths: tuple[tuple[int, int, int], ...]
    labels: dict[str, tuple[int, int]]
    samples: tuple[Record, ...]
    notes: tuple[str, ...]

    @property
    def problems(self) -> tuple[RowProblem, ...]:
        return (*self.train.problems, *(self.held_out.problems if self.held_out else ()))

    @property
    def bad_rows(self) -> int:
        return self.train.bad_rows + (self.held_out.bad_rows if self.held_out else 0)

    @property
    def all_rows(self) -> int:
        """The rows of all files, good and bad."""
        return self.bad_rows + self.train.rows + (self.held_out.rows if self.held_out else 0)


@dataclass(frozen=True, slots=True)
class DataReport:
    """What `load_dataset` found and did. Rows are token rows (a template may make several of one record) or preference pairs.

    `train_tokens` counts every token of the training rows, `trained_tokens` those with a weight. `skipped` counts file rows left
    out, with `problems` and `reasons` (reason in words -> rows) saying why; `truncated` counts file rows cut, by `cut_tokens`.
    `duplicates` counts training records equal to an earlier one, `overlap` held-out records that are also training records;
    `near_duplicates` and `near_overlap` those that are nearly so. `lengths` is (most tokens, training rows, held-out rows) by step.
    """

    format: str
    train_rows: int
    validation_rows: int
    train_tokens: int
    trained_tokens: int
    validation_tokens: int
    validation_trained_tokens: int
    longest_row: int
    skipped: int
    truncated: int
    cut_tokens: int
    duplicates: int
    overlap: int
    empty_replies: int
    problems: tuple[RowProblem, ...]
    reasons: dict[str, int]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    near_duplicates: int
    near_overlap: int
    lengths: tuple[tuple[int, int, int], ...]

    def findings(self) -> dict[str, object]:
        """Return the counts as the run's record keeps them."""
        return {
            "duplicates": self.duplicates,
            "near_duplicates": self.near_duplicates,
            "overlap": self.overlap,
            "near_overlap": self.near_overlap,
            "lengths": [list(step) for step in self.lengths],
            "problems": sum(self.reasons.values()),
            "reasons": self.reasons,
        }


def histogram(train: np.ndarray, held_out: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """Return (longest, training rows, held-out rows) of each step of lengths, from that of the shortest row to the longest's."""
    both = np.concatenate([train, held_out])
    if not len(both):
        return ()
    ends = [SHORTEST, SHORTEST * 3 // 2]
    while ends[-1] < both.max():
        ends.append(2 * ends[-2])
    edges = np.array(ends)
    first, last = np.searchsorted(edges, [both.min(), both.max()]).tolist()
    of_train, of_held_out = np.searchsorted(edges, train), np.searchsorted(edges, held_out)
    return tuple(
        (ends[at], int(np.count_nonzero(of_train == at)), int(np.count_nonzero(of_held_out == at))) for at in range(first, last + 1)
    )


def check_file(path: Path, format: str = "auto") -> FileReport:
    """Return what is in a data file, without a tokenizer. Problems of rows are in the report; raises only where no row can be
    read at all (DataError, StorageError)."""
    return check_files([path], format=format).train


def check_files(
    train: Sequence[Path],
    held_out: Path | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    instruction: str | None = None,
    tokenizer: RowTokenizer | None = None,
    longest_row: int | None = None,
) -> Check:
    """Return what is in training files and, where there is one, a held-out file. With a base's tokenizer, lengths are in tokens and
    rows that its template refuses are problems. Rows pass one at a time.

    Problems of rows are in the report; raises where no row of a file can be read at all, or files do not go together (DataError,
    SpecError, StorageError).
    """
    look = _Look(tokenizer)
    formats: dict[str, str] = {}
    sides = [_Side(list(train)), *([_Side([held_out])] if held_out is not None else [])]
    for side in sides:
        for path in side.paths:
            stream = stream_records(path, format, columns, instruction)
            look.at_file(stream, side)
            if stream.format != UNKNOWN:
                formats.setdefault(stream.format, stream.name)
        side.end = len(look.repeats), len(look.lengths)
    if len(formats) > 1:
        parts = " and ".join(f"{name} ({path})" for name, path in formats.items())
        raise DataError(f"the files hold rows of different formats: {parts}", hint="one run takes rows of one format")
    found = look.repeats.find(np.arange(len(look.repeats)) >= sides[0].end[0])
    lengths = look.lengths.read()
    name = next(iter(formats), UNKNOWN)
    return Check(
        train=sides[0].report(name, found.duplicates),
        held_out=sides[1].report(name, 0) if held_out is not None else None,
        found=found,
        unit="characters" if tokenizer is None else "tokens",
        total=int(lengths.sum(dtype=np.int64)),
        longest=int(lengths.max(initial=0)),
        over_long=int((lengths > longest_row).sum()) if longest_row is not None else 0,
        lengths=histogram(lengths[: sides[0].end[1]], lengths[sides[0].end[1] :]),
        labels=_labels(*(side.replies for side in sides)),
        samples=tuple(look.samples),
        notes=(*look.notes, *found.notes()),
    )


class _Side:
    """Counts of the training files, or of the held-out file."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.problems = Problems()
        self.rows = self.characters = self.trained = self.context = self.empty = 0
        self.roles: Counter[str] = Counter()
        self.replies: Counter[str] | None = Counter()
        self.end: tuple[int, int] = (0, 0)  # of rows, of lengths

    def add(self, record: Record) -> None:
        self.rows += 1
        self.characters += num_characters(record)
        self.roles.update(message["role"] for message in _messages(record))
        here, there = _replies(record)
        self.trained, self.context = self.trained + here, self.context + there
        self.empty += num_empty_replies(record)
        if self.replies is not None:
            reply = _last_reply(record)
            if reply is not None and len(reply) <= MAX_LABEL and (reply in self.replies or len(self.replies) < MAX_LABELS):
                self.replies[reply] += 1
            else:
                self.replies = None

    def report(self, name: str, duplicates: int) -> FileReport:
        return FileReport(
            path=", ".join(map(name_of, self.paths)),
            format=name,
            rows=self.rows,
            bad_rows=self.problems.rows,
            problems=tuple(self.problems.kept),
            roles=dict(self.roles),
            characters=self.characters,
            trained_replies=self.trained,
            context_replies=self.context,
            empty_replies=self.empty,
            duplicates=duplicates,
            reasons=self.problems.reasons,
        )


class _Look:
    """Goes through files row by row."""

    def __init__(self, tokenizer: RowTokenizer | None) -> None:
        self.repeats = Repeats()
        self.lengths = Table(np.dtype("<i4"))
        self.samples: list[Record] = []
        self.notes: list[str] = []
        self._tokenizer = tokenizer

    def at_file(self, stream: RecordStream, side: _Side) -> None:
        """Read a file to its end, counting for a side."""
        for item in stream:
            if isinstance(item, RowProblem):
                side.problems.add(item)
                continue
            try:
                lengths = self._lengths_of(item)
            except DataError as error:
                for problem in error.problems or [RowProblem(item.where.path, item.where.line, error.message)]:
                    side.problems.add(problem)
                continue
            side.add(item)
            self.repeats.add(item)
            self.lengths.append(np.array(lengths, dtype="<i4").tobytes())
            if len(self.samples) < SAMPLES:
                self.samples.append(item)
        self.notes += stream.notes

    def _lengths_of(self, record: Record) -> list[int]:
        """Return the length of each of the record's rows; of a preference, both sides together."""
        if self._tokenizer is None:
            return [num_characters(record)]
        lengths = [draft.length for draft in make_drafts(record, self._tokenizer)]
        return [sum(lengths)] if isinstance(record, PreferenceRecord) else lengths


def describe(report: FileReport | DataReport) -> list[tuple[str, str]]:
    """Return a report as (name, value) rows of a table, with the rows left out that say nothing."""
    rows = _describe_file(report) if isinstance(report, FileReport) else _describe_data(report)
    return [(name, value) for name, value in rows if value]


def describe_check(check: Check) -> list[tuple[str, str]]:
    """Return a check as (name, value) rows of a table, as `describe` does."""
    found, held = check.found, check.held_out
    rows = [
        *describe(check.train),
        ("near duplicates", _some(found.near_duplicates)),
        ("held-out file", held.path if held else ""),
        ("held-out rows", f"{held.rows:,}" if held else ""),
        ("held-out rows with problems", _some(held.bad_rows) if held else ""),
        ("held-out rows also trained on", _some(found.overlap)),
        ("held-out rows nearly trained on", _some(found.near_overlap)),
        ("tokens", f"{check.total:,}, {check.longest:,} in the longest row" if check.unit == "tokens" else ""),
        ("longer than the base is made for", _some(check.over_long)),
        *_by_reason(held.reasons if held else {}),
        *(("note", note) for note in check.notes),
    ]
    return [(name, value) for name, value in rows if value]


def num_empty_replies(record: Record) -> int:
    """Return the number of trained replies that are empty: of those only the end marker is learned."""
    match record:
        case ChatRecord():
            return sum(1 for message in _trained(record) if message["content"] == "" and "tool_calls" not in message)
        case PromptRecord():
            return int(record.completion == "")
        case PreferenceRecord():
            return int(record.chosen == "") + int(record.rejected == "")
        case TextRecord():
            return 0


def num_characters(record: Record) -> int:
    """Return the number of characters of content in a record (Unicode code points; tool calls and schemas not counted)."""
    content = sum(len(message["content"] or "") for message in _messages(record))
    match record:
        case ChatRecord():
            return content
        case PromptRecord():
            return len(record.prompt) + len(record.completion)
        case TextRecord():
            return len(record.text)
        case PreferenceRecord():
            prompt = len(record.prompt) if isinstance(record.prompt, str) else content
            return prompt + len(record.chosen) + len(record.rejected)


def _messages(record: Record) -> Sequence[dict[str, Any]]:
    if isinstance(record, PreferenceRecord) and isinstance(record.prompt, ChatRecord):
        return record.prompt.messages
    return record.messages if isinstance(record, ChatRecord) else ()


def _trained(record: ChatRecord) -> list[dict[str, Any]]:
    return [message for message in record.messages if message["role"] == "assistant" and message.get("weight") != 0]


def _replies(record: Record) -> tuple[int, int]:
    """Return the number of replies that are trained and that are context only."""
    if isinstance(record, ChatRecord):
        trained = len(_trained(record))
        return trained, sum(1 for message in record.messages if message["role"] == "assistant") - trained
    return (2 if isinstance(record, PreferenceRecord) else 1), 0


def _last_reply(record: Record) -> str | None:
    """Return the reply that a row ends with, None where it has none that could be a label."""
    match record:
        case ChatRecord():
            return record.messages[-1]["content"]
        case PromptRecord():
            return record.completion
        case _:
            return None


def _labels(train: Counter[str] | None, held_out: Counter[str] | None = None) -> dict[str, tuple[int, int]]:
    """Return reply -> (training rows, held-out rows), most frequent first, if replies are given again and again; else nothing."""
    if not train or train.total() < 2 * len(train):
        return {}
    others = held_out or Counter[str]()
    return {label: (train[label], others[label]) for label, _ in (train + others).most_common()}


def _describe_file(report: FileReport) -> list[tuple[str, str]]:
    roles = ", ".join(f"{role} {count:,}" for role, count in report.roles.items())
    says_replies = report.roles and report.format != "preference"
    replies = f"{report.trained_replies:,} trained, {report.context_replies:,} context only" if says_replies else ""
    return [
        ("file", report.path),
        ("format", report.format),
        ("rows", f"{report.rows:,}"),
        ("rows with problems", _some(report.bad_rows)),
        ("messages by role", roles),
        ("replies", replies),
        ("characters", f"{report.characters:,}"),
        ("exact duplicates", _some(report.duplicates)),
        ("empty replies", _some(report.empty_replies, "only their end marker is trained")),
        *_by_reason(report.reasons),
    ]


def _describe_data(report: DataReport) -> list[tuple[str, str]]:
    held_out = f"{report.validation_rows:,}, {report.validation_tokens:,} tokens, {report.validation_trained_tokens:,} scored"
    return [
        ("format", report.format),
        ("training rows", f"{report.train_rows:,}"),
        ("training tokens", f"{report.train_tokens:,}, {report.trained_tokens:,} of them trained"),
        ("held-out rows", held_out if report.validation_rows else "none"),
        ("longest row", f"{report.longest_row:,} tokens"),
        ("rows skipped", _some(report.skipped)),
        ("rows truncated", _some(report.truncated, f"{report.cut_tokens:,} tokens cut")),
        ("exact duplicates", _some(report.duplicates)),
        ("near duplicates", _some(report.near_duplicates)),
        ("held-out rows also trained on", _some(report.overlap)),
        ("held-out rows nearly trained on", _some(report.near_overlap)),
        ("empty replies", _some(report.empty_replies, "only their end marker is trained")),
        *_by_reason(report.reasons),
        *(("note", note) for note in report.notes),
        *(("warning", warning) for warning in report.warnings),
    ]


def _by_reason(counts: dict[str, int]) -> list[tuple[str, str]]:
    return [(f"{count:,} {'row' if count == 1 else 'rows'}", reason) for reason, count in counts.items()]


def _some(count: int, why: str = "") -> str:
    """Return a count with its explanation, or nothing at all for 0."""
    return f"{count:,}{f' ({why})' if why else ''}" if count else ""
