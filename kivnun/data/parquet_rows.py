"""Parquet, a batch of rows at a time: the one module that imports pyarrow, which also turns Arrow's batches into rows.

Bytes from a file are validated in full before a value is made of them. Arrow cannot tell a key that a row does not have from one
that holds null, so nulls inside objects are left out. Class labels that the file's own description names become their names.
Next: `dataset_rows.py`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, cast

from kivnun.data.jsonl import MAX_DEPTH, LineProblem, as_list, as_object, check_strings, key_name
from kivnun.data.opening import DataFile, broken_off
from kivnun.errors import DataError, StorageError

BATCH_ROWS = 256
BUFFER_BYTES = 2**20
EXTRA = "pip install 'kivnun[data]'"
_MEDIA = ("Image", "Audio", "Video", "Pdf")
# What pyarrow raises over damaged bytes, beside its own errors (which are ValueErrors, KeyErrors, OSErrors and so on).
_DAMAGE = (ValueError, KeyError, TypeError, IndexError, OverflowError, NotImplementedError, MemoryError, RecursionError, EOFError)


def library(name: str) -> Any:
    """Return pyarrow, datasets or a part of them, untyped. Raises DataError with what to install."""
    try:
        return import_module(name)
    except ImportError:
        raise DataError(f"reading this data needs {name.partition('.')[0]}, which is not installed", hint=EXTRA) from None


def columns_of(file: DataFile) -> tuple[str, ...]:
    """Return the names of a Parquet file's columns. Raises DataError."""
    with damage_told(file.name, 0), _opened(file) as parquet:
        names: list[str] = list(parquet.schema_arrow.names)
        described(parquet.schema_arrow.metadata)
    return unique(names, file.name)


def rows_of(file: DataFile, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | LineProblem]]:
    """Yield (number of the row from 1, column -> value, or a problem) with the named columns only."""
    row = 0
    with damage_told(file.name, 0):
        parquet = _opened(file)
    with parquet:
        features = described(parquet.schema_arrow.metadata)
        check_types(parquet.schema_arrow, columns, features, file.name)
        batches = parquet.iter_batches(batch_size=BATCH_ROWS, columns=list(columns), use_threads=False)
        for batch in each_batch(batches, file.name):
            for value in rows_of_batch(batch, columns, features):
                row += 1
                yield row, value


def each_batch(batches: Any, name: str) -> Iterator[Any]:
    """Yield Arrow's batches. Raises DataError with the number of the row from which on the data are damaged, StorageError."""
    source = iter(batches)
    row = 1
    while True:
        with damage_told(name, row):
            batch = next(source, None)
        if batch is None:
            return
        row += batch.num_rows
        yield batch


@contextmanager
def damage_told(name: str, row: int) -> Generator[None, None, None]:
    """Turn what pyarrow raises into a DataError that says from which row on nothing can be read; 0 for none at all."""
    try:
        yield
    except (DataError, StorageError):
        raise
    except OSError as error:
        if error.errno:
            raise StorageError(f"data file {name} cannot be read: {error.strerror}", hint="check the file and the disk") from None
        raise _damaged(name, row) from None
    except _DAMAGE:
        raise _damaged(name, row) from None


def unique(names: Sequence[str], name: str) -> tuple[str, ...]:
    twice = [one for one, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(
            f"data file {name} has the columns {', '.join(map(key_name, twice[:6]))} twice", hint="give each column its own name"
        )
    return tuple(names)


def described(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """Return column -> feature, as the datasets library writes them into a Parquet file; empty without such a description."""
    text = (metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    info = as_object(cast(object, json.loads(text)))
    return as_object((as_object((info or {}).get("info")) or {}).get("features")) or {}


def check_types(schema: Any, columns: Sequence[str], features: Mapping[str, Any], name: str) -> None:
    """Refuse columns whose values are neither text, numbers, booleans nor lists and objects of these."""
    for column in columns:
        kind = schema.field(column).type
        media = _media_in(features.get(column))
        if media is not None:
            raise DataError(f"data file {name}: the column {key_name(column)} holds {media.lower()} data, which is not read")
        if not _is_read(kind, 0):
            raise DataError(
                f"data file {name}: the column {key_name(column)} is of the type {str(kind)[:60]}; "
                "text, numbers, booleans, lists and objects are read",
                hint="write it as text",
            )


def rows_of_batch(batch: Any, columns: Sequence[str], features: Mapping[str, Any]) -> Iterator[dict[str, Any] | LineProblem]:
    """Yield the rows of a RecordBatch or Table. In a batch with invalid text only the rows that hold it are problems."""
    try:
        batch.validate(full=True)
        rows: list[dict[str, Any]] | None = batch.to_pylist()
    except ValueError:  # pyarrow's ArrowInvalid is one, and so is UnicodeDecodeError
        rows = None
    for number in range(batch.num_rows):
        try:
            yield _row(rows[number] if rows is not None else _one(batch, number), columns, features)
        except LineProblem as problem:
            yield problem


def _one(batch: Any, number: int) -> dict[str, Any]:
    part = batch.slice(number, 1)
    try:
        part.validate(full=True)
        return part.to_pylist()[0]
    except ValueError:
        raise LineProblem("holds text that is not UTF-8, or damaged values") from None


def _row(values: Mapping[str, Any], columns: Sequence[str], features: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for column in columns:
        value = _named(values[column], features.get(column), column)
        _check(value)
        row[column] = _without_nulls(value)
    return row


def _named(value: Any, feature: Any, column: str) -> Any:
    """Return a value with the numbers of its class labels replaced by their names, at any depth."""
    items, several = as_list(value), as_object(value)
    described = as_object(feature)
    if described is None:
        inner = as_list(feature)  # an older way to write a list's feature: [feature]
        return value if not inner or items is None else [_named(item, inner[0], column) for item in items]
    if described.get("_type") == "ClassLabel":
        return _class_name(value, as_list(described.get("names")) or [], column)
    if isinstance(described.get("_type"), str):
        inner = described.get("feature")
        if items is not None:
            return [_named(item, inner, column) for item in items]
        parts = as_object(inner)
        if several is not None and parts is not None:  # a list of objects, kept as an object of lists
            return {key: _named(item, {"_type": "List", "feature": parts.get(key)}, column) for key, item in several.items()}
        return value
    return {key: _named(item, described.get(key), column) for key, item in several.items()} if several is not None else value


def _class_name(value: Any, names: Sequence[Any], column: str) -> Any:
    if type(value) is not int:
        return value
    if not 0 <= value < len(names) or not isinstance(names[value], str):
        raise LineProblem(f"{key_name(column)} holds {value}, which names none of its {len(names)} classes")
    return names[value]


def _without_nulls(value: Any) -> Any:
    """Return a value whose objects hold no nulls; a null that is the value, or in a list, stays."""
    if (items := as_list(value)) is not None:
        return [_without_nulls(item) for item in items]
    if (several := as_object(value)) is not None:
        return {key: _without_nulls(item) for key, item in several.items() if item is not None}
    return value


def _check(value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise LineProblem("a number is NaN or infinite")
    if isinstance(value, str):
        check_strings(value)
    for item in as_list(value) or ():
        _check(item)
    for key, item in (as_object(value) or {}).items():
        check_strings(key)
        _check(item)


def _is_read(kind: Any, depth: int) -> bool:
    types = library("pyarrow.types")
    if depth > MAX_DEPTH:
        return False
    if types.is_struct(kind):
        names = [field.name for field in kind]
        return len(names) == len(set(names)) and all(_is_read(field.type, depth + 1) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_dictionary(kind):
        return _is_read(kind.value_type, depth + 1)
    plain = (types.is_null, types.is_boolean, types.is_integer, types.is_floating, types.is_string, types.is_large_string)
    return any(is_plain(kind) for is_plain in plain) or types.is_string_view(kind)


def _media_in(feature: Any) -> str | None:
    """Return the kind of pictures, sound or pages that a feature holds at any depth, or None."""
    for item in as_list(feature) or ():
        if (found := _media_in(item)) is not None:
            return found
    described = as_object(feature) or {}
    kind = described.get("_type")
    if kind in _MEDIA:
        return str(kind)
    return next((found for item in described.values() if (found := _media_in(item)) is not None), None)


def _opened(file: DataFile) -> Any:
    parquet = library("pyarrow.parquet")
    return parquet.ParquetFile(file.path, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)


def _damaged(name: str, row: int) -> DataError:
    hint = "write or download it again"
    if not row:
        return DataError(f"data file {name} is damaged: its description cannot be read", hint=hint)
    return broken_off(name, row, "from this row on the file is damaged", hint)
