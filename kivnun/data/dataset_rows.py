"""Hugging Face datasets: a folder that `save_to_disk` wrote, or a data set of the hub, read as it arrives.

The one module that imports the datasets library. A hub's data set is named hf://ORG/NAME, with @REVISION, /CONFIGURATION and #SPLIT
where the main branch, the only configuration and train are not meant. Next: `sources.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

from kivnun.data.jsonl import LineProblem
from kivnun.data.opening import DataFile, name_of
from kivnun.data.parquet_rows import BATCH_ROWS, check_types, damage_told, each_batch, library, rows_of_batch, unique
from kivnun.errors import DataError, KivnunError, StorageError

_HUB_NAME = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/#@]+))?(?:/(?P<config>[^/#@]+))?(?:#(?P<split>.+))?")


def open_dataset(file: DataFile) -> Any:
    """Return the data set. Raises DataError where it is not there or damaged, StorageError where the hub cannot be reached."""
    datasets = library("datasets")
    if file.kind == "hub":
        return _from_hub(datasets, name_of(file.path))
    try:
        return datasets.load_from_disk(str(file.path), keep_in_memory=False)
    except KivnunError:
        raise
    except Exception as error:  # the library reads the folder's JSON without checks: damage can raise anything
        if isinstance(error, OSError) and error.errno:
            raise StorageError(
                f"data file {file.name} cannot be read: {error.strerror}", hint="check the files and the disk"
            ) from None
        raise DataError(f"data file {file.name} is no data set that can be read", hint="write it again with save_to_disk") from None


def columns_of(dataset: Any, name: str) -> tuple[str, ...]:
    """Return the names of the columns; for a hub's data set that does not say, those of its first row."""
    with damage_told(name, 0):
        names: list[str] | None = dataset.column_names
        if names is None:
            names = list(cast(dict[str, Any] | None, next(iter(dataset), None)) or {})
    return unique(names, name)


def rows_of(dataset: Any, columns: Sequence[str], name: str) -> Iterator[tuple[int, dict[str, Any] | LineProblem]]:
    """Yield (number of the row from 1, column -> value, or a problem) with the named columns only."""
    row = 0
    features: dict[str, Any] = dataset.features.to_dict() if dataset.features is not None else {}
    for batch in each_batch(dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=BATCH_ROWS), name):
        check_types(batch.schema, columns, features, name)
        for value in rows_of_batch(batch, columns, features):
            row += 1
            yield row, value


def _from_hub(datasets: Any, name: str) -> Any:
    said = _HUB_NAME.fullmatch(name)
    if said is None:
        raise DataError(
            f"{name} names no data set of the hub", hint="it is written hf://ORG/NAME[@REVISION][/CONFIGURATION][#SPLIT]"
        )
    try:
        return datasets.load_dataset(
            said["name"], said["config"], split=said["split"] or "train", revision=said["revision"], streaming=True
        )
    except (FileNotFoundError, ValueError, KeyError) as error:  # what is not there: the data set, a configuration, a split
        raise DataError(f"{name} cannot be opened: {_first_line(error)}", hint="look at its page on the hub") from None
    except Exception as error:
        hint = "check the network, or save the data set with save_to_disk and name the folder"
        raise StorageError(f"{name} cannot be reached: {_first_line(error)}", hint=hint) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
