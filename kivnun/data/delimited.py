"""CSV and TSV with a first line of column names, as Python's strict `csv` reads them: UTF-8, quotes doubled inside quotes.

A row is named by the line it begins on, since a quoted field may hold line breaks. A row with too many or too few fields is that
row's problem; a quote in the wrong place is the file's, because nobody knows where the next row begins. Next: `parquet_rows.py`.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from kivnun.data.jsonl import MAX_LINE_BYTES, LineProblem, key_name
from kivnun.data.opening import BOM, DataFile, broken_off, opened
from kivnun.errors import DataError

_BROKEN = re.compile("[\ud800-\udfff]")
_QUOTES = "a field that holds a quote, a line break or the separator is written in quotes, a quote inside it twice"


def columns_of(file: DataFile) -> tuple[str, ...]:
    """Return the names on the first line, outer blanks off; none for a file without lines. Raises DataError."""
    line, names = next(_records(file), (1, list[str]()))
    names = [name.strip() for name in names]
    if any(_trouble(name) for name in names):
        raise DataError(f"data file {file.name}:{line}: the first line is not UTF-8 text", hint="save the file as UTF-8")
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        shown = ", ".join(key_name(name) for name in twice[:6])
        raise DataError(
            f"data file {file.name}:{line}: the first line names {shown} more than once", hint="give each column its own name"
        )
    return tuple(names)


def rows_of(file: DataFile) -> Iterator[tuple[int, dict[str, str] | LineProblem]]:
    """Yield (line the row begins on, column -> field, or a problem). Raises DataError where the rest is lost, StorageError."""
    records = _records(file)
    names = [name.strip() for name in next(records, (1, list[str]()))[1]]
    for line, fields in records:
        if len(fields) != len(names):
            yield line, LineProblem(f"has {len(fields):,} of the {len(names):,} fields that the first line names; {_QUOTES}")
        elif fields[0].startswith("\ufeff"):
            yield line, LineProblem("starts with a byte order mark, which is allowed at the start of the file only")
        elif trouble := next(filter(None, map(_trouble, fields)), None):
            yield line, LineProblem(trouble)
        else:
            yield line, dict(zip(names, fields, strict=True))


def _records(file: DataFile) -> Iterator[tuple[int, list[str]]]:
    # The library's own limit is 128 KiB a field; `_Lines` holds a row to the limit of every other kind of file.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    with opened(file) as content:
        lines = _Lines(content, file.name)
        reader = csv.reader(lines, delimiter="\t" if file.kind == "tsv" else ",", strict=True)
        while True:
            lines.begin()
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise broken_off(file.name, lines.first, _why(error), _QUOTES) from None
            if fields is None:
                return
            if fields:  # an empty line is no row
                yield lines.first, fields


class _Lines:
    """Lines of text for the reader, which takes several for a row with line breaks in it. `first` is the row's first."""

    def __init__(self, content: BinaryIO, name: str) -> None:
        self.first = 1
        self._content = content
        self._name = name
        self._number = 0
        self._size = 0

    def begin(self) -> None:
        self.first, self._size = self._number + 1, 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        raw = self._content.readline(MAX_LINE_BYTES + 1)
        if not raw:
            raise StopIteration
        self._number += 1
        self._size += len(raw)
        if self._size > MAX_LINE_BYTES:
            what = f"a row of more than {MAX_LINE_BYTES // 2**20} MiB begins here: is a quote not closed?"
            raise broken_off(self._name, self.first, what, _QUOTES)
        if self._number == 1:
            raw = raw.removeprefix(BOM)
        return raw.decode("utf-8", "surrogateescape")  # what is not UTF-8 is told of its row, by `_trouble`


def _trouble(field: str) -> str | None:
    if "\x00" in field:
        return "holds a NUL character"
    if not field.isascii() and _BROKEN.search(field) is not None:
        return "holds a byte that is not UTF-8; save the file as UTF-8"
    return None


def _why(error: csv.Error) -> str:
    """Return the library's words for a person; they hold nothing of the file."""
    text = str(error)
    if "unexpected end of data" in text:
        return "a quote that opens in this row is never closed"
    if "new-line character" in text:
        return "a carriage return stands alone; lines end with LF or CRLF"
    return "after a closing quote neither the separator nor the end of the line follows" if "expected after" in text else text
