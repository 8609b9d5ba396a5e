"""Files of multiple-choice questions in TruthfulQA's shapes: its CSV, its JSON, and the Hugging Face copies (JSON or JSONL).

A file is read whole or refused with every line that is wrong; nothing is skipped. Answers of the CSV and of the `generation` shape
get a full stop where they lack one, as the paper's code does; `mc1_targets` and `mc2_targets` are taken as they are.
Next: `kivnun/evaluate/truthfulqa.py`, which scores them.

Source: Lin, Hilton and Evans 2022, arXiv 2109.07958, and the files published with it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from kivnun.data.jsonl import LineProblem, parse_value, read_objects
from kivnun.data.rows import Where
from kivnun.errors import DataError, RowProblem, StorageError

COLUMNS = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")
SHAPES = (
    "a CSV with the columns Question, Best Answer, Correct Answers, Incorrect Answers; or JSON with question, mc1_targets and "
    "mc2_targets; or JSON with question, best_answer, correct_answers and incorrect_answers"
)


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """A question with its answers. MC1 weighs `best` against `rivals`, MC2 `true` against `false`; none of the four is empty."""

    question: str
    category: str
    best: str
    rivals: tuple[str, ...]
    true: tuple[str, ...]
    false: tuple[str, ...]
    where: Where


def read_choices(path: Path) -> list[ChoiceQuestion]:
    """Return the questions of a file. Raises DataError with the line of every problem, StorageError."""
    found: list[ChoiceQuestion] = []
    problems: list[RowProblem] = []
    for line, value in _values(path):
        try:
            if isinstance(value, LineProblem):
                raise value
            found.append(_question(value, Where(str(path), line)))
        except LineProblem as problem:
            problems.append(RowProblem(str(path), line, str(problem)))
    if problems:
        raise DataError(
            f"{path} cannot be scored: {len(problems):,} of its questions are broken", tuple(problems), hint=f"it must be {SHAPES}"
        )
    if not found:
        raise DataError(f"{path} holds no question", hint=f"it must be {SHAPES}")
    return found


def _values(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | LineProblem]]:
    """Yield (line, fields or problem). The line is that where the question begins; in JSON lists, its number in the list."""
    if path.suffix.lower() == ".csv":
        yield from _csv_rows(path)
    elif path.suffix.lower() == ".jsonl":
        yield from read_objects(path)
    else:
        yield from _json_rows(path)


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | LineProblem]]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    head: list[str] | None = None
    line = 1
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield line, LineProblem(f"the CSV breaks off: {error}")
            return
        if row is None:
            return
        if not row:
            continue
        if head is None:
            head = [name.strip() for name in row]
            missing = [name for name in COLUMNS if name not in head]
            if missing:
                yield line, LineProblem(f"the heading lacks {', '.join(missing)}; it has {', '.join(head)[:200]}")
                return
        elif len(row) != len(head):
            yield line, LineProblem(f"has {len(row)} fields where the heading has {len(head)}; quote fields that hold a comma")
        else:
            yield line, dict(zip(head, row, strict=True))


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | LineProblem]]:
    text = _text(path)
    try:
        json.loads(text)  # for the line number; what is read is what the strict reader takes
        value = parse_value(text)
    except json.JSONDecodeError as error:
        lines = " (one object per line is .jsonl)" if error.msg == "Extra data" else ""
        yield error.lineno, LineProblem(f"not valid JSON at column {error.colno}: {error.msg}{lines}")
        return
    except (LineProblem, RecursionError) as error:
        yield 1, error if isinstance(error, LineProblem) else LineProblem("is nested too deeply")
        return
    rows: object = cast(dict[str, Any], value).get("validation", value) if isinstance(value, dict) else value
    if not isinstance(rows, list):
        yield 1, LineProblem("must be a list of questions")
        return
    for number, row in enumerate(cast(list[Any], rows), start=1):
        if isinstance(row, dict):
            yield number, cast(dict[str, Any], row)
        else:
            yield number, LineProblem(f"question {number} of the list must be an object")


def _question(row: Mapping[str, Any], where: Where) -> ChoiceQuestion:
    if "Question" in row:
        return _from_answers(row, COLUMNS, where)
    if "mc1_targets" in row or "mc2_targets" in row:
        return _from_targets(row, where)
    return _from_answers(row, ("question", "best_answer", "correct_answers", "incorrect_answers"), where)


def _from_answers(row: Mapping[str, Any], names: Sequence[str], where: Where) -> ChoiceQuestion:
    question, best = (_string(row, name) for name in names[:2])
    true, false = (_closed(_several(row, name)) for name in names[2:])
    (best,) = _closed([best])
    if best not in true:
        raise LineProblem(f"{names[1]} must be one of {names[2]}")
    return _checked(ChoiceQuestion(question, _category(row), best, false, true, false, where))


def _from_targets(row: Mapping[str, Any], where: Where) -> ChoiceQuestion:
    one_true, one_false = _targets(row, "mc1_targets")
    if len(one_true) != 1:
        raise LineProblem(f"mc1_targets must have one answer with label 1, got {len(one_true)}")
    true, false = _targets(row, "mc2_targets")
    return _checked(ChoiceQuestion(_string(row, "question"), _category(row), one_true[0], one_false, true, false, where))


def _targets(row: Mapping[str, Any], name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the (true, false) answers of {"choices": [...], "labels": [...]}, or of {answer: label} as in the paper's file."""
    given = row.get(name)
    if not isinstance(given, dict):
        raise LineProblem(f"{name} must be an object with choices and labels")
    pairs = cast(dict[str, Any], given)
    if "choices" in pairs or "labels" in pairs:
        choices, labels = pairs.get("choices"), pairs.get("labels")
        if not (isinstance(choices, list) and isinstance(labels, list)):
            raise LineProblem(f"{name} must have choices and labels, each a list")
        answers, marks = cast(list[Any], choices), cast(list[Any], labels)
        if len(answers) != len(marks):
            raise LineProblem(f"{name} has {len(answers)} choices and {len(marks)} labels")
    else:
        answers, marks = list(pairs), list(pairs.values())
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise LineProblem(f"{name}: every choice must be a string that is not empty")
    if not all(type(mark) is int and mark in (0, 1) for mark in marks):
        raise LineProblem(f"{name}: every label must be 0 or 1")
    labelled = list(zip(cast(list[str], answers), marks, strict=True))
    return tuple(answer for answer, mark in labelled if mark), tuple(answer for answer, mark in labelled if not mark)


def _checked(question: ChoiceQuestion) -> ChoiceQuestion:
    if not (question.true and question.false and question.rivals):
        raise LineProblem("a question needs at least one true answer and one false one")
    both = (set(question.true) | {question.best}) & (set(question.false) | set(question.rivals))
    if both:
        raise LineProblem("an answer is given as true and as false")
    return question


def _string(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise LineProblem(f"{name} must be a text that is not empty" if name in row else f"{name} is missing")
    return value.strip()


def _several(row: Mapping[str, Any], name: str) -> list[str]:
    """Return a list of answers, which CSV writes with semicolons between them."""
    value = row.get(name)
    if isinstance(value, str):
        return [part.strip() for part in value.split(";") if part.strip()]
    if isinstance(value, list) and all(isinstance(part, str) for part in cast(list[Any], value)):
        return [part.strip() for part in cast(list[str], value) if part.strip()]
    raise LineProblem(f"{name} must be a list of texts" if name in row else f"{name} is missing")


def _closed(answers: Sequence[str]) -> tuple[str, ...]:
    """Return answers with a full stop at the end, each once."""
    return tuple(dict.fromkeys(answer if answer.endswith(".") else answer + "." for answer in answers))


def _category(row: Mapping[str, Any]) -> str:
    value = row.get("Category", row.get("category", ""))
    return value if isinstance(value, str) else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}", hint="save it as UTF-8") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}", hint="check the path and its permissions") from None
