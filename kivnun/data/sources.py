"""One way to read every kind of data file: its columns where it is a table, and its rows one at a time. Next: `formats.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from kivnun.data import dataset_rows, delimited, parquet_rows
from kivnun.data.json_list import objects_of_list
from kivnun.data.jsonl import LineProblem, objects_of
from kivnun.data.opening import DataFile, data_file

Rows: TypeAlias = Iterator[tuple[int, dict[str, Any] | LineProblem]]


@dataclass(frozen=True, slots=True)
class Source:
    """A data file about to be read. `columns` is None where each row names its own keys (JSONL and JSON).

    `read` takes the columns that are wanted (all, where rows name their own keys) and yields each row's number from 1, which is
    its line in a text file, and its values or what is wrong with it. `spells` is true where every value is a text, lists too.
    """

    file: DataFile
    columns: tuple[str, ...] | None
    read: Callable[[Sequence[str]], Rows]
    spells: bool = False


def open_source(path: Path) -> Source:
    """Return a data file's columns and reader. Raises DataError for what is not read, StorageError."""
    file = data_file(path)
    match file.kind:
        case "jsonl":
            return Source(file, None, lambda _: objects_of(file))
        case "json":
            return Source(file, None, lambda _: objects_of_list(file))
        case "csv" | "tsv":
            return Source(file, delimited.columns_of(file), lambda _: delimited.rows_of(file), spells=True)
        case "parquet":
            return Source(file, parquet_rows.columns_of(file), lambda columns: parquet_rows.rows_of(file, columns))
        case "dataset" | "hub":
            dataset = dataset_rows.open_dataset(file)
            columns = dataset_rows.columns_of(dataset, file.name)
            return Source(file, columns, lambda columns: dataset_rows.rows_of(dataset, columns, file.name))
