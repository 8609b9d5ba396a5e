"""Lines of a JSONL file, read byte by byte and strictly: every non-blank line comes out as an object or as a problem.

Python's own `json` forgives what later breaks a run or a database: a key given twice (the last wins), NaN, escaped NUL characters,
half of a surrogate pair, numbers that overflow; and it reads a 10 GB line into memory. Each of these is a line-numbered problem
here. Problems name positions, key names and types, never what the row says. Next: `json_list.py` (a file that is one JSON value).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from kivnun.data.opening import BLANK, BOM, NAMES, DataFile, data_file, opened
from kivnun.errors import DataError

MAX_LINE_BYTES = 16 * 2**20
MAX_DEPTH = 64
MAX_INTEGER = 2**64

# A string (closed or not: linear time whatever the input) or one bracket.
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


class LineProblem(ValueError):
    """What is wrong with one line. The text is for people and holds none of the line's content; `page` is one of docs/mistakes."""

    def __init__(self, message: str, page: str | None = None) -> None:
        super().__init__(message)
        self.page = page


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | LineProblem]]:
    """Yield (line number from 1, object or problem) for every non-blank line of a JSONL file.

    Raises DataError where the file as a whole cannot be JSONL, StorageError where the system cannot read it.
    """
    file = data_file(path)
    if file.kind != "jsonl":
        raise DataError(
            f"{file.name} is {NAMES.get(file.kind, 'a data set')} by its name", hint="here one JSON object per line is read"
        )
    yield from objects_of(file)


def objects_of(file: DataFile) -> Iterator[tuple[int, dict[str, Any] | LineProblem]]:
    """Yield (line number from 1, object or problem) for every non-blank line; holds one line in memory at a time."""
    with opened(file) as content:
        for line, raw in _lines(content):
            try:
                yield line, raw if isinstance(raw, LineProblem) else parse_object(raw)
            except LineProblem as problem:
                yield line, problem


def parse_object(raw: bytes) -> dict[str, Any]:
    """Return the one JSON object on a line. Raises LineProblem for anything a strict reader would not take."""
    text = text_of(raw)
    if text.startswith("\ufeff"):
        raise LineProblem("starts with a byte order mark, which is allowed at the start of the file only")
    value = parse_value(text)
    row = as_object(value)
    if row is None:
        raise LineProblem(f"holds {type_name(value)}; each row must be one JSON object")
    return row


def parse_value(text: str) -> Any:
    """Return the JSON value of `text`, strictly: no duplicate keys, NaN, NUL, lone surrogates, oversized numbers, depth over 64."""
    _check_depth(text)
    try:
        value = json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_int=_integer, parse_float=_float
        )
    except json.JSONDecodeError as error:
        message = error.msg[:1].lower() + error.msg[1:].removesuffix(" at")
        if error.msg == "Extra data":
            message = "a second value follows the first (lines end with LF or CRLF, and hold one object each)"
        raise LineProblem(f"not valid JSON at column {error.pos + 1}: {message}", "04-bad-json-line") from None
    if "\\u" in text:  # raw bytes were checked before; only an escape can still make these characters
        check_strings(value)
    return value


def as_object(value: object) -> dict[str, Any] | None:
    """Return a JSON value that is an object, None for any other."""
    return cast(dict[str, Any], value) if isinstance(value, dict) else None


def as_list(value: object) -> list[Any] | None:
    """Return a JSON value that is a list, None for any other."""
    return cast(list[Any], value) if isinstance(value, list) else None


def type_name(value: object) -> str:
    """Return JSON's word for a value's type, with its article, for messages."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list() | tuple():
            return "a list"
        case _:
            return "an object"


def key_name(key: str) -> str:
    """Return a key as messages show it: quoted, control characters escaped, at most 40 characters."""
    return repr(key if len(key) <= 40 else key[:39] + "…")


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | LineProblem]]:
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 8):
        number += 1  # 8 spare bytes: BOM, CRLF and one more, so that a line that is too long is seen to be
        if number == 1:
            raw = raw.removeprefix(BOM)
        content = raw.removesuffix(b"\n").removesuffix(b"\r")
        if len(content) > MAX_LINE_BYTES:
            _skip_rest(file, raw)
            yield number, too_long()
        elif content.strip(BLANK):
            yield number, content


def too_long() -> LineProblem:
    return LineProblem(f"is longer than {MAX_LINE_BYTES // 2**20} MiB")


def _skip_rest(file: BinaryIO, raw: bytes) -> None:
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(2**20)


def text_of(raw: bytes) -> str:
    """Return bytes as text. Raises LineProblem for what is not UTF-8, and for a NUL."""
    if (nul := raw.find(b"\x00")) >= 0:
        raise LineProblem(f"holds a NUL character at byte {nul + 1}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LineProblem(f"byte {error.start + 1} is not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _check_depth(text: str) -> None:
    if text.count("{") + text.count("[") <= MAX_DEPTH:
        return
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        if match[0] in "{[":
            depth += 1
            if depth > MAX_DEPTH:
                raise LineProblem(f"is nested deeper than {MAX_DEPTH} levels")
        elif match[0] in "}]":
            depth -= 1


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise LineProblem(f"the key {key_name(key)} is given twice in one object")
            seen.add(key)
    return unique


def _refuse_constant(name: str) -> NoReturn:
    raise LineProblem(f"{name} is not JSON; use null or a finite number")


def _integer(digits: str) -> int:
    # Readers disagree beyond 64 bits (many round to a float); the length is checked first, since int() of 10 MB takes minutes.
    if len(digits) > 21 or abs(value := int(digits)) >= MAX_INTEGER:
        raise LineProblem("an integer does not fit in 64 bits")
    return value


def _float(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise LineProblem("a number is too large for a 64-bit float")
    return value


def check_strings(value: Any) -> None:
    """Raise LineProblem where a string, at any depth, holds a character that is none in a text."""
    if isinstance(value, str):
        if "\x00" in value:
            raise LineProblem("a string holds a NUL character (\\u0000)")
        if not value.isascii() and _SURROGATE.search(value) is not None:
            raise LineProblem("a string holds half of a surrogate pair (\\ud800 to \\udfff alone), which is no character")
        return
    for item in as_list(value) or ():
        check_strings(item)
    for key, item in (as_object(value) or {}).items():
        check_strings(key)
        check_strings(item)
