"""From a file's rows to checked records, whatever the kind of file and whichever of the shapes the rows have.

A row is a record or it has problems; there is no third way. A key that would have no effect is refused, because a file's author
meant something by it; a table's other columns are named in a note. The changes made to what the file says are loss-free and written
down: keys of a message that hold null are left out, a list of text parts becomes the one string it spells, and the shapes of
`task_shapes.py` become a question and its reply. Next: `shapes.py` (their keys), `checks.py`, `loader.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kivnun.data.chat_shape import Complain, nearest
from kivnun.data.jsonl import LineProblem, key_name, parse_value
from kivnun.data.opening import name_of
from kivnun.data.rows import Record, Where
from kivnun.data.shapes import ALL_KEYS, EXAMPLES, SHAPES, Shape, Variant
from kivnun.data.sources import Source, open_source
from kivnun.data.task_shapes import spelled_answer
from kivnun.errors import DataError, RowProblem, SpecError

FORMATS = tuple(SHAPES)
UNKNOWN = "unknown"
MAX_PROBLEMS_PER_ROW = 5
MAX_SHOWN = 20
# Columns that hold what a row shows or plays: leaving them out would train on rows that speak of what is not there.
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_OTHER_MARKS = {";": "semicolons", "\t": "tabs", ",": "commas", "|": "bars"}


@dataclass
class _Complaints:
    """The problems of one row, in words; bounded, so that one broken row of 16 MiB does not make a million of them."""

    messages: list[tuple[str, str | None]] = field(default_factory=list[tuple[str, str | None]])
    more: int = 0

    def __call__(self, message: str, page: str | None = None) -> None:
        if len(self.messages) < MAX_PROBLEMS_PER_ROW:
            self.messages.append((message, page))
        else:
            self.more += 1

    def outcome(self, record: Record | None, where: Where) -> Iterator[Record | RowProblem]:
        """Yield the record where nothing is wrong with it, else what is."""
        if record is not None and not self.messages:
            yield record
        for message, page in self.messages:
            yield RowProblem(where.path, where.line, message, page)
        if self.more:
            yield RowProblem(where.path, where.line, f"and {self.more} more problems in this row")


class RecordStream:
    """The rows of one file, one at a time, as records and problems in the file's order; memory holds one row (of Parquet some).

    Every non-blank row is one record or at least one problem, never both. With "auto" the first good row decides the format and a
    later row of another shape is a problem; of a table the columns decide. Iterating again reads the file again.

    Iterating raises DataError where the file as a whole is of no use, StorageError where the system cannot read it, SpecError
    where `columns` or `instruction` do not fit it.
    """

    def __init__(self, path: Path, format: str, columns: Mapping[str, str], instruction: str | None) -> None:
        self.path = path
        self.name = name_of(path)
        self._columns = dict(columns)
        self._instruction = instruction
        self._asked = None if format == "auto" else format
        self._decided = self._asked
        self._guess = UNKNOWN
        self._unused: tuple[str, ...] = ()

    @property
    def format(self) -> str:
        """The format that was asked for or that the first good row decided; before a good row that of the first row whose keys
        tell; else "unknown"."""
        return self._decided or self._guess

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided without being asked for: the columns of a table that no key of the format takes."""
        if not self._unused:
            return ()
        shown = ", ".join(name or "(no name)" for name in self._unused[:MAX_SHOWN])
        more = f" and {len(self._unused) - MAX_SHOWN:,} more" if len(self._unused) > MAX_SHOWN else ""
        return (f"{self.path.name}: columns not used: {shown}{more}",)

    def __iter__(self) -> Iterator[Record | RowProblem]:
        self._decided, self._guess = self._asked, UNKNOWN
        source = open_source(self.path)
        rows = self._own_keys(source) if source.columns is None else self._table(source, source.columns)
        empty = True
        for item in rows:
            empty = False
            yield item
        if empty:
            raise DataError(f"data file {self.name} holds no rows", hint=f"a row is {EXAMPLES}")

    def _own_keys(self, source: Source) -> Iterator[Record | RowProblem]:
        """Yield the rows of a file in which each row names its own keys."""
        for line, value in source.read(()):
            where = Where(self.name, line)
            if isinstance(value, LineProblem):
                yield RowProblem(where.path, line, str(value), value.page)
                continue
            complaints = _Complaints()
            row = self._renamed(value, complaints)
            shape = shape_of(row)
            if self._guess == UNKNOWN and shape is not None:
                self._guess = shape
            record = _record(row, shape, self._decided, where, complaints, self._instruction)
            if record is not None and not complaints.messages:
                self._decided = shape
            yield from complaints.outcome(record, where)

    def _table(self, source: Source, columns: Sequence[str]) -> Iterator[Record | RowProblem]:
        """Yield the rows of a table. Its columns decide the format, once for all rows."""
        shape, variant, taken = self._taken(columns)
        self._decided = shape.name
        for line, values in source.read(tuple(taken.values())):
            where = Where(self.name, line)
            complaints = _Complaints()
            row = values if isinstance(values, LineProblem) else _table_row(values, taken, shape, variant, source.spells)
            if isinstance(row, LineProblem):
                yield RowProblem(where.path, line, str(row), row.page)
            else:
                record = _parsed(shape, row, where, complaints, self._instruction)
                yield from complaints.outcome(record, where)

    def _taken(self, columns: Sequence[str]) -> tuple[Shape, Variant, dict[str, str]]:
        """Return a table's shape and key -> column of the keys that it takes; keep the columns that none takes for a note."""
        column_of = _column_of(columns, self._columns, self.name)
        shape, variant = _table_shape(tuple(column_of), self._asked, columns, self.name, self._columns)
        taken = {key: column_of[key] for key in variant.keys if key in column_of}
        for key, column in self._columns.items():
            if key not in taken:
                raise SpecError(
                    f"data.columns gives {key} the column {key_name(column)}, but rows of the format {shape.name} have no such key",
                    hint=f"they have {', '.join(variant.keys)}",
                )
        self._unused = tuple(column for column in columns if column not in taken.values())
        media = [column for column in self._unused if column.lower() in _MEDIA]
        if media:
            raise DataError(
                f"data file {self.name}: the column {key_name(media[0])} holds images, sound or video, which are not read",
                hint="write a file without the column, if the rows make sense without it",
            )
        return shape, variant, taken

    def _renamed(self, row: dict[str, Any], complain: Complain) -> dict[str, Any]:
        """Return a row with the keys that `columns` gives other names."""
        if not self._columns:
            return row
        renamed: dict[str, Any] = {}
        for key, column in self._columns.items():
            if column in row:
                renamed[key] = row[column]
            elif not any(key in variant.may for shape in SHAPES.values() for variant in shape.variants):
                near = nearest(column, row)
                also = f"; did you mean {near!r}?" if near else ""
                complain(f"the key {key_name(column)}, which data.columns gives for {key}, is missing{also}")
        for key, value in row.items():
            if key in self._columns.values():
                continue
            if key in renamed:
                complain(f"the key {key_name(key)} stands beside {key_name(self._columns[key])}, which data.columns gives for it")
            renamed.setdefault(key, value)
        return renamed


def stream_records(
    path: Path, format: str = "auto", columns: Mapping[str, str] | None = None, instruction: str | None = None
) -> RecordStream:
    """Return the rows of a data file, to be read one at a time.

    `columns` says which column or key of the file a key of the format is (key -> column), `instruction` what is asked of a row's
    text in classification, entities and multiple_choice. Raises SpecError for a format or a key that there is not.
    """
    if format not in ("auto", *FORMATS):
        raise SpecError(
            f"data.format must be one of auto, {', '.join(FORMATS)}, got {format!r}", hint="auto decides by the rows' keys"
        )
    if format != "auto" and instruction is not None and not SHAPES[format].asks:
        raise _no_instruction(format)
    check_columns(columns or {})
    return RecordStream(path, format, columns or {}, instruction)


def read_records(
    path: Path, format: str = "auto", columns: Mapping[str, str] | None = None, instruction: str | None = None
) -> tuple[str, list[Record], list[RowProblem]]:
    """Return the format, the good records in their order, and what is wrong with the other rows: a `RecordStream` as lists."""
    stream = stream_records(path, format, columns, instruction)
    records: list[Record] = []
    problems: list[RowProblem] = []
    for item in stream:
        if isinstance(item, RowProblem):
            problems.append(item)
        else:
            records.append(item)
    return stream.format, records, problems


def check_columns(columns: Mapping[str, str]) -> None:
    """Raise SpecError for a key that no format has, and for a column that two keys name."""
    for key in columns:
        if key not in ALL_KEYS:
            near = nearest(key, ALL_KEYS)
            also = f"; did you mean {near!r}?" if near else ""
            raise SpecError(
                f"data.columns: no format has the key {key_name(key)}{also}",
                hint=f"it maps a format's key to a column of the file; the keys are {', '.join(ALL_KEYS)}",
            )
    twice = [column for column in columns.values() if list(columns.values()).count(column) > 1]
    if twice:
        raise SpecError(f"data.columns gives the column {key_name(twice[0])} to two keys", hint="each key has a column of its own")


def shape_of(row: Mapping[str, Any]) -> str | None:
    """Return the format that a row's keys tell, or None. Looks at keys only: the values may still be wrong."""
    return next((shape.name for shape in SHAPES.values() if any(sign in row for sign in shape.signs)), None)


def _record(
    row: dict[str, Any], shape: str | None, decided: str | None, where: Where, complain: Complain, instruction: str | None
) -> Record | None:
    if shape is None:
        _complain_of_shape(row, decided, complain)
        return None
    if decided is not None and shape != decided:
        complain(
            f"the row's keys are those of {shape}, the file's format is {decided}; one file holds one format", "07-mixed-formats"
        )
        return None
    return _parsed(SHAPES[shape], row, where, complain, instruction)


def _parsed(shape: Shape, row: dict[str, Any], where: Where, complain: Complain, instruction: str | None) -> Record | None:
    if instruction is not None and not shape.asks:
        raise _no_instruction(shape.name)
    shape.check_keys(row, complain)
    return shape.parse(row, where, complain, instruction)


def _no_instruction(format: str) -> SpecError:
    asking = ", ".join(name for name, shape in SHAPES.items() if shape.asks)
    return SpecError(
        f"data.instruction is asked of rows of the formats {asking}; these rows are {format}", hint="leave data.instruction out"
    )


def _complain_of_shape(row: dict[str, Any], decided: str | None, complain: Complain) -> None:
    wanted = SHAPES[decided].keys if decided is not None else ALL_KEYS
    names = list(row)
    typos = [(name, near) for name in names[:100] if name not in wanted and (near := nearest(name, wanted)) is not None]
    for name, near in typos:
        complain(f"unknown key {key_name(name)}; did you mean {near!r}?")
    if not typos:
        complain(f"the row's keys ({_shown(names)}) fit no format; a row is {EXAMPLES}")


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return (", ".join(key_name(name) for name in names[:6]) or "none") + more


def _column_of(columns: Sequence[str], mapped: Mapping[str, str], name: str) -> dict[str, str]:
    """Return key -> column: as `mapped` says, else the column of the key's own name. Raises DataError for one that is not there."""
    for key, column in mapped.items():
        if column not in columns:
            near = nearest(column, columns)
            also = f"; did you mean {near!r}?" if near else ""
            raise DataError(
                f"data file {name} has no column {key_name(column)}, which data.columns gives for {key}{also}",
                hint=f"it has {_shown(columns)}",
            )
    own = {column: column for column in columns if column in ALL_KEYS and column not in mapped.values()}
    return own | dict(mapped)


def _table_shape(
    keys: Sequence[str], asked: str | None, columns: Sequence[str], name: str, mapped: Mapping[str, str]
) -> tuple[Shape, Variant]:
    """Return the first shape that has all it needs, of those that take every key which `mapped` names where there is one."""
    shapes = [SHAPES[asked]] if asked is not None else list(SHAPES.values())
    fitting = [(shape, variant) for shape in shapes for variant in shape.variants if all(key in keys for key in variant.needs)]
    for shape, variant in fitting:
        if all(key in variant.keys for key in mapped):
            return shape, variant
    if fitting:
        return fitting[0]
    near = [
        f"{key_name(column)} is near {key!r}"
        for column in columns[:100]
        if column not in ALL_KEYS and (key := nearest(column, ALL_KEYS))
    ]
    if len(columns) == 1 and (other := next((name for mark, name in _OTHER_MARKS.items() if mark in columns[0]), None)):
        near = [
            f"the first line has {other} and no separator of this kind of file: export with commas as .csv, or with tabs as .tsv"
        ]
    wanted = f"the format {asked}" if asked is not None else "any format"
    needed = " or ".join(", ".join(variant.needs) for variant in shapes[0].variants) if asked is not None else ""
    raise DataError(
        f"data file {name}: its columns ({_shown(columns)}) are not those of {wanted}"
        + (f", which needs {needed}" if needed else ""),
        hint="; ".join([*near[:3], "data.columns says which column a key is, such as {text: review, label: stars}"]),
    )


def _table_row(
    values: Mapping[str, Any], taken: Mapping[str, str], shape: Shape, variant: Variant, spells: bool
) -> dict[str, Any] | LineProblem:
    """Return a table's row under the format's keys: without optional values that are null (in a text file: empty), and with lists
    and objects that are spelled as JSON read."""
    row: dict[str, Any] = {}
    for key, column in taken.items():
        value = values[column]
        if key in variant.may and (value is None or (spells and value == "")):
            continue
        if isinstance(value, str) and key in shape.spelled:
            try:
                value = parse_value(value)
            except LineProblem as problem:
                return LineProblem(f"{key} must be a list or an object, written as JSON: {problem}")
        row[key] = value
    try:
        if spells and isinstance(answer := row.get("answer"), str):
            row["answer"] = spelled_answer(answer, row.get("choices"))
    except LineProblem as problem:
        return problem
    return row
