"""A file that is one JSON list of rows, or {"data": [rows]}: read a row at a time, whatever its size and its line breaks.

The list is cut into rows by its brackets and quotes alone; each row then goes through the strict reader of `jsonl.py`, as if it
stood on a line of its own. What is wrong inside a row is that row's problem; brackets that do not close are the file's.
Next: `delimited.py` (CSV and TSV).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from kivnun.data.jsonl import MAX_LINE_BYTES, LineProblem, key_name, parse_object, parse_value, text_of, too_long
from kivnun.data.opening import BOM, DataFile, broken_off, opened
from kivnun.errors import DataError

CHUNK = 2**18
_OUTSIDE = re.compile(rb'["\[\]{}]')
_INSIDE = re.compile(rb'["\\]')
_AFTER_SCALAR = re.compile(rb"[,\]}: \t\r\n]")
_NOT_BLANK = re.compile(rb"[^ \t\r\n]")
_HINT = 'a JSON file is a list of objects, or {"data": [...]}; if each line is one object, name it .jsonl'


def objects_of_list(file: DataFile) -> Iterator[tuple[int, dict[str, Any] | LineProblem]]:
    """Yield (number of the row from 1, object or problem); holds one row in memory. Raises DataError, StorageError."""
    with opened(file) as content:
        scan = _Scan(content, file.name)
        first = scan.peek()
        if not first:
            return
        if first == b"{":
            yield from _data_member(scan)
        elif first == b"[":
            yield from _rows(scan)
        else:
            raise DataError(f"data file {file.name} is JSON by its name, but does not begin with [ or {{", hint=_HINT)
        if scan.peek():
            raise scan.broken("something follows the end of the list")


class _Scan:
    """The bytes of a JSON file from where reading stands; `row` is the number of the row last begun."""

    def __init__(self, content: BinaryIO, name: str) -> None:
        self.name = name
        self.row = 0
        self._content = content
        self._buffer = content.read(CHUNK)
        self._at = len(BOM) if self._buffer.startswith(BOM) else 0
        self._passed = 0

    def peek(self) -> bytes:
        """Return the next byte that is not blank without taking it, b"" at the end."""
        while True:
            found = _NOT_BLANK.search(self._buffer, self._at)
            if found is not None:
                self._at = found.start()
                return found[0]
            if not self._more():
                return b""

    def take(self, expected: bytes, what: str) -> None:
        """Pass over the next byte that is not blank, which must be `expected`."""
        if self.peek() != expected:
            raise self.broken(what)
        self._at += 1

    def value(self) -> bytes | LineProblem:
        """Return the bytes of the value that begins here. A value that is too long is passed over and not held."""
        extent = _Extent(scalar=self.peek() not in (b"{", b"[", b'"'))
        pieces: list[bytes] = []
        size = 0
        while True:
            end = extent.end_in(self._buffer, self._at)
            piece = self._buffer[self._at : end]
            size += len(piece)
            if size > MAX_LINE_BYTES:
                pieces.clear()
            else:
                pieces.append(piece)
            self._at += len(piece)
            if end is not None:
                return b"".join(pieces) if size <= MAX_LINE_BYTES else too_long()
            if not self._more():
                raise self.broken("the file ends inside the row")

    def broken(self, what: str) -> DataError:
        return broken_off(self.name, max(self.row, 1), f"{what} (byte {self._passed + self._at + 1:,} of the file)", _HINT)

    def _more(self) -> bool:
        self._passed += len(self._buffer)
        self._buffer, self._at = self._content.read(CHUNK), 0
        return bool(self._buffer)


class _Extent:
    """Finds where a value ends, over as many pieces of the file as it takes."""

    def __init__(self, scalar: bool) -> None:
        self._scalar = scalar
        self._depth = 0
        self._quoted = False
        self._escaped = False

    def end_in(self, buffer: bytes, at: int) -> int | None:
        """Return where the value ends in `buffer`, or None where it goes on beyond it."""
        if self._scalar:
            found = _AFTER_SCALAR.search(buffer, at)
            return None if found is None else found.start()
        if self._escaped and at < len(buffer):
            at += 1
            self._escaped = False
        while (found := (_INSIDE if self._quoted else _OUTSIDE).search(buffer, at)) is not None:
            at = found.end()
            match found[0]:
                case b"\\":
                    self._escaped = at == len(buffer)
                    at += 1
                case b'"':
                    self._quoted = not self._quoted
                case b"[" | b"{":
                    self._depth += 1
                case _:
                    self._depth -= 1
            if not self._quoted and self._depth == 0:
                return at
        return None


def _rows(scan: _Scan) -> Iterator[tuple[int, dict[str, Any] | LineProblem]]:
    """Yield the rows of the list that begins here, and pass over its end."""
    scan.take(b"[", "a list was expected")
    if scan.peek() == b"]":
        scan.take(b"]", "")
        return
    while True:
        if scan.peek() in (b"", b",", b"]", b"}", b":"):
            raise scan.broken("a row was expected" if scan.peek() else "the file ends inside the list")
        scan.row += 1
        raw = scan.value()
        try:
            yield scan.row, raw if isinstance(raw, LineProblem) else parse_object(raw)
        except LineProblem as problem:
            yield scan.row, problem
        if scan.peek() == b"]":
            scan.take(b"]", "")
            return
        scan.take(
            b",", "after the row a comma or the end of the list was expected" if scan.peek() else "the file ends inside the list"
        )


def _data_member(scan: _Scan) -> Iterator[tuple[int, dict[str, Any] | LineProblem]]:
    """Yield the rows of the object {"data": [...]} that begins here, and pass over its end."""
    scan.take(b"{", "")
    _check_is_data(scan)
    if scan.peek() != b"[":
        raise DataError(f'data file {scan.name}: "data" must be a list of objects', hint=_HINT)
    yield from _rows(scan)
    if scan.peek() == b",":
        scan.take(b",", "")
        _check_is_data(scan)
        raise DataError(f'data file {scan.name} has the key "data" twice', hint=_HINT)
    scan.take(b"}", "the end of the object was expected")


def _check_is_data(scan: _Scan) -> None:
    """Pass over the key that begins here and its colon; refuse any key but "data"."""
    raw = scan.value() if scan.peek() == b'"' else b""
    try:
        key = parse_value(text_of(raw)) if isinstance(raw, bytes) and raw else None
    except LineProblem:
        key = None
    if key != "data":
        named = f" with the key {key_name(key)}" if isinstance(key, str) else ""
        raise DataError(f'data file {scan.name} holds an object{named}; only {{"data": [...]}} is read', hint=_HINT)
    scan.take(b":", "a colon was expected")
