"""Lines of a JSONL file, read byte by byte and strictly: every non-blank line comes out as an object or as a problem.

Python's own `json` forgives what later breaks a run or a database: a key given twice (the last wins), NaN, escaped NUL characters,
half of a surrogate pair, numbers that overflow; and it reads a 10 GB line into memory. Each of these is a line-numbered problem
here. Problems name positions, key names and types, never what the row says. Next: `formats.py` (objects to records).
"""

from __future__ import annotations

import errno
import json
import math
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from kivnun.errors import DataError, StorageError

MAX_LINE_BYTES = 16 * 2**20
MAX_DEPTH = 64
MAX_INTEGER = 2**64

ACCEPTED = "data files are JSONL: UTF-8 text with one JSON object per line"
_OTHER_FORMATS = {
    ".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard", ".zip": "zip", ".7z": "7-Zip", ".tar": "tar",
    ".json": "JSON", ".csv": "CSV", ".tsv": "TSV", ".parquet": "Parquet", ".arrow": "Arrow", ".feather": "Arrow", ".xlsx": "Excel",
}  # fmt: skip
_MAGIC = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"PAR1": "Parquet", b"\x28\xb5\x2f\xfd": "Zstandard", b"BZh": "bzip2",
          b"\xfd7zXZ": "xz", b"ARROW1": "Arrow"}  # fmt: skip
# UTF-16 and UTF-32, with a byte order mark or by the NUL beside an ASCII character.
_WIDE_STARTS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff", b"{\x00", b"\x00{", b"\x00\x00\x00{")
_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"
# A string (closed or not: linear time whatever the input) or one bracket.
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)


class LineProblem(ValueError):
    """What is wrong with one line. The text is for people and holds none of the line's content; `page` is one of docs/mistakes."""

    def __init__(self, message: str, page: str | None = None) -> None:
        super().__init__(message)
        self.page = page


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | LineProblem]]:
    """Yield (line number from 1, object or problem) for every non-blank line; holds one line in memory at a time.

    Raises DataError where the file as a whole cannot be JSONL, StorageError where the system cannot read it.
    """
    for line, raw in _lines(path):
        try:
            yield line, raw if isinstance(raw, LineProblem) else parse_object(raw)
        except LineProblem as problem:
            yield line, problem


def parse_object(raw: bytes) -> dict[str, Any]:
    """Return the one JSON object on a line. Raises LineProblem for anything a strict reader would not take."""
    text = _text(raw)
    if text.startswith("\ufeff"):
        raise LineProblem("starts with a byte order mark, which is allowed at the start of the file only")
    value = parse_value(text)
    row = as_object(value)
    if row is None:
        raise LineProblem(f"holds {type_name(value)}; each line must be one JSON object")
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
        _check_strings(value)
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


def _lines(path: Path) -> Iterator[tuple[int, bytes | LineProblem]]:
    _check_kind(path)
    try:
        with path.open("rb") as file:
            _check_start(path, file.read(64))
            file.seek(0)
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 8):
                number += 1  # 8 spare bytes: BOM, CRLF and one more, so that a line that is too long is seen to be
                if number == 1:
                    raw = raw.removeprefix(_BOM)
                content = raw.removesuffix(b"\n").removesuffix(b"\r")
                if len(content) > MAX_LINE_BYTES:
                    _skip_rest(file, raw)
                    yield number, LineProblem(f"is longer than {MAX_LINE_BYTES // 2**20} MiB")
                elif content.strip(_BLANK):
                    yield number, content
    except OSError as error:
        raise _unreadable(path, error) from error


def _skip_rest(file: BinaryIO, raw: bytes) -> None:
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(2**20)


def _check_kind(path: Path) -> None:
    """Refuse what is not a regular file before opening it: opening a FIFO would wait for ever."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        raise DataError(
            f"data file {path} does not exist", hint="paths in a spec are relative to the spec's folder", pages=("03-missing-file",)
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from error
    if stat.S_ISDIR(mode):
        raise DataError(f"data file {path} is a folder", hint=f"name one file; {ACCEPTED}")
    if not stat.S_ISREG(mode):
        raise DataError(f"data file {path} is a pipe, a device or a socket", hint=f"write the rows to a file first; {ACCEPTED}")
    suffix = path.suffix.lower()
    if suffix in _OTHER_FORMATS:
        advice = " If each line is one JSON object already, name it .jsonl." if suffix == ".json" else ""
        raise DataError(f"data file {path} is {_OTHER_FORMATS[suffix]} by its name", hint=f"{ACCEPTED}.{advice}")


def _check_start(path: Path, start: bytes) -> None:
    if start.startswith(_WIDE_STARTS):
        raise DataError(
            f"data file {path} is UTF-16 or UTF-32 text; {ACCEPTED}",
            hint="convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW_FILE, or save it again as UTF-8 in the editor that wrote it",
        )
    for magic, name in _MAGIC.items():
        if start.startswith(magic):
            raise DataError(f"data file {path} holds {name} data", hint=ACCEPTED)


def _unreadable(path: Path, error: OSError) -> StorageError:
    reason = error.strerror or errno.errorcode.get(error.errno or 0, "unknown reason")
    return StorageError(f"data file {path} cannot be read: {reason}", hint="check the file's permissions and the disk")


def _text(raw: bytes) -> str:
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


def _check_strings(value: Any) -> None:
    if isinstance(value, str):
        if "\x00" in value:
            raise LineProblem("a string holds an escaped NUL character (\\u0000)")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise LineProblem("a string holds half of a surrogate pair (\\ud800 to \\udfff alone), which is no character")
        return
    for item in as_list(value) or ():
        _check_strings(item)
    for key, item in (as_object(value) or {}).items():
        _check_strings(key)
        _check_strings(item)
