"""What is known of data once it is read: counts, duplicates, overlap, problems by reason, and the tables that show them.

`check_file` looks at one file without a tokenizer (`kivnun data check`); `DataReport` is what `load_dataset` found on the way to
token rows. Neither holds what a row says. Next: `loader.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kivnun.data.formats import read_records
from kivnun.data.rows import ChatRecord, PreferenceRecord, PromptRecord, Record, TextRecord
from kivnun.errors import RowProblem


@dataclass(frozen=True, slots=True)
class FileReport:
    """What one data file holds. `rows` counts good rows, `bad_rows` lines with a problem; `characters` those of good rows."""

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


@dataclass(frozen=True, slots=True)
class DataReport:
    """What `load_dataset` found and did. Rows are token rows (a template may make several of one record) or preference pairs.

    `train_tokens` counts every token of the training rows, `trained_tokens` those with a weight. `skipped` counts file rows left
    out, with `problems` and `reasons` (reason in words -> rows) saying why; `truncated` counts file rows cut, by `cut_tokens`.
    `duplicates` counts training rows equal to an earlier one, `overlap` held-out rows that are also training rows.
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


def check_file(path: Path, format: str = "auto") -> FileReport:
    """Return what is in a data file, without a tokenizer. Problems of rows are in the report; raises only where no row can be
    read at all (DataError, StorageError)."""
    name, records, problems = read_records(path, format)
    roles: Counter[str] = Counter()
    trained = context = 0
    for record in records:
        for message in _messages(record):
            roles[message["role"]] += 1
        here, there = _replies(record)
        trained, context = trained + here, context + there
    return FileReport(
        path=str(path),
        format=name,
        rows=len(records),
        bad_rows=num_bad_rows(problems),
        problems=tuple(problems),
        roles=dict(roles),
        characters=sum(num_characters(record) for record in records),
        trained_replies=trained,
        context_replies=context,
        empty_replies=sum(num_empty_replies(record) for record in records),
        duplicates=num_duplicates(fingerprint(record) for record in records),
    )


def describe(report: FileReport | DataReport) -> list[tuple[str, str]]:
    """Return a report as (name, value) rows of a table, with the rows left out that say nothing."""
    rows = _describe_file(report) if isinstance(report, FileReport) else _describe_data(report)
    return [(name, value) for name, value in rows if value]


def fingerprint(record: Record) -> bytes:
    """Return 16 bytes that are equal for two records exactly when their content is (where they came from does not count)."""
    text = json.dumps([type(record).__name__, *_content(record)], sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def num_duplicates(fingerprints: Iterable[bytes]) -> int:
    """Return how many items equal an earlier one."""
    counts = Counter(fingerprints)
    return counts.total() - len(counts)


def num_bad_rows(problems: Iterable[RowProblem]) -> int:
    """Return the number of rows that problems speak of (a row may have several)."""
    return len({(problem.path, problem.line) for problem in problems})


def reasons(problems: Sequence[RowProblem]) -> dict[str, int]:
    """Return reason -> number of rows, most frequent first. A reason is a problem's words without its numbers and names."""
    rows = {(problem.path, problem.line, _reason(problem.message)) for problem in problems}
    return dict(sorted(Counter(reason for _, _, reason in rows).items(), key=lambda item: (-item[1], item[0])))


def by_reason(problems: Sequence[RowProblem], places: int = 20) -> Iterator[str]:
    """Yield one sentence per reason: how many rows, why, and where (the first `places`)."""
    where: dict[str, list[str]] = {}
    for problem in problems:
        where.setdefault(_reason(problem.message), []).append(f"{problem.path}:{problem.line}")
    for reason, count in reasons(problems).items():
        found = list(dict.fromkeys(where[reason]))
        more = f" and {len(found) - places:,} more" if len(found) > places else ""
        yield f"{count:,} {'row' if count == 1 else 'rows'} skipped: {reason} ({', '.join(found[:places])}{more})"


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


def _reason(message: str) -> str:
    without_places = re.sub(r"\[\d+\]", "[]", message)
    return re.sub(r"\d+", "N", re.sub(r"'[^']*'", "'…'", without_places))


def _describe_file(report: FileReport) -> list[tuple[str, str]]:
    roles = ", ".join(f"{role} {count:,}" for role, count in report.roles.items())
    replies = f"{report.trained_replies:,} trained, {report.context_replies:,} context only" if report.format == "messages" else ""
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
        *_by_reason(reasons(report.problems)),
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
        ("held-out rows also trained on", _some(report.overlap)),
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
