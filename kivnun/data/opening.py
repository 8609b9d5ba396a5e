"""Which kind of file a data file is, and its bytes: decided by the name, held against the content, before a row is read.

Whatever is no regular file is refused before it is opened (opening a pipe would wait for ever); the one kind of folder that is read
is a Hugging Face dataset. Compressed text is decompressed while it is read. Next: `sources.py` (which reader a kind has).
"""

from __future__ import annotations

import errno
import gzip
import stat
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias, cast

from kivnun.errors import DataError, RowProblem, StorageError

Kind: TypeAlias = Literal["jsonl", "json", "csv", "tsv", "parquet", "dataset", "hub"]

ACCEPTED = (
    "data files are JSONL, JSON, CSV, TSV (UTF-8; .gz too), Parquet, and Hugging Face datasets (a folder that save_to_disk "
    "wrote, or hf://ORG/NAME)"
)
NAMES = {
    "jsonl": "JSON lines",
    "json": "JSON",
    "csv": "CSV",
    "tsv": "TSV",
    "parquet": "Parquet",
    "dataset": "a Hugging Face dataset",
}
_BY_SUFFIX: dict[str, Kind] = {
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_OTHER = {
    ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard", ".zip": "zip", ".7z": "7-Zip", ".tar": "tar", ".tgz": "tar",
    ".arrow": "Arrow", ".feather": "Arrow", ".xlsx": "Excel", ".xls": "Excel", ".ods": "OpenDocument", ".pkl": "pickle",
}  # fmt: skip
_MAGIC = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"PAR1": "Parquet", b"\x28\xb5\x2f\xfd": "Zstandard", b"BZh": "bzip2",
          b"\xfd7zXZ": "xz", b"ARROW1": "Arrow"}  # fmt: skip
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
BOM = b"\xef\xbb\xbf"
BLANK = b" \t\r\n"
_START = 4096
HUB = "hf:"


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data file or folder that is there, of a kind that is read. `name` is how messages and records name it."""

    path: Path
    kind: Kind
    gzipped: bool

    @property
    def name(self) -> str:
        return name_of(self.path)


def name_of(path: Path) -> str:
    """Return the name of a data file as it is given: a path joins the slashes of hf://ORG/NAME."""
    return f"{HUB}//{'/'.join(path.parts[1:])}" if on_hub(path) else str(path)


def on_hub(path: Path) -> bool:
    """Return whether a path is the name of a data set of the Hugging Face hub."""
    return bool(path.parts) and path.parts[0] == HUB


def data_file(path: Path) -> DataFile:
    """Return what a path is. Raises DataError for what is not there or not read, StorageError where the system cannot tell."""
    if on_hub(path):
        return DataFile(path, "hub", False)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        raise DataError(
            f"data file {path} does not exist", hint="paths in a spec are relative to the spec's folder", pages=("03-missing-file",)
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from error
    if stat.S_ISDIR(mode):
        return _folder(path)
    if not stat.S_ISREG(mode):
        raise DataError(f"data file {path} is a pipe, a device or a socket", hint=f"write the rows to a file first; {ACCEPTED}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    gzipped = suffixes[-1:] == [".gz"]
    suffix = (suffixes[-2:-1] if gzipped else suffixes[-1:] or [""])[-1:] or [""]
    kind = _BY_SUFFIX.get(suffix[0], "jsonl")
    if suffix[0] in _OTHER:
        raise DataError(f"data file {path} is {_OTHER[suffix[0]]} by its name", hint=ACCEPTED)
    if gzipped and kind == "parquet":
        raise DataError(f"data file {path} is gzip around Parquet by its name", hint="unpack it: Parquet is compressed inside")
    _check_content(path, kind, gzipped)
    return DataFile(path, kind, gzipped)


@contextmanager
def opened(file: DataFile) -> Generator[BinaryIO, None, None]:
    """Yield the file's bytes, unpacked; what goes wrong while they are read is a DataError or a StorageError.

    A gzip file that breaks off is of no use as a whole: nobody knows how many rows are missing.
    """
    with _reading(file.path), file.path.open("rb") as raw:
        if file.gzipped:
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield cast(BinaryIO, unpacked)
        else:
            yield raw


def broken_off(name: str, line: int, what: str, hint: str) -> DataError:
    """Return the error for a file of which the rest cannot be read: from there on nothing is known of its rows."""
    return DataError(f"data file {name} cannot be read to its end", (RowProblem(name, line, what),), hint=hint)


@contextmanager
def _reading(path: Path) -> Generator[None, None, None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = "it ends too early" if isinstance(error, EOFError) else "its content is damaged"
        raise DataError(
            f"data file {path} cannot be unpacked: {reason}", hint="copy or download it again: gzip -t FILE tests it"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from error


def _folder(path: Path) -> DataFile:
    with _reading(path):
        if (path / "dataset_dict.json").is_file():
            splits = sorted(item.name for item in path.iterdir() if (item / "state.json").is_file())
            shown = ", ".join(splits[:10]) or "none"
            raise DataError(
                f"data file {path} is a folder of data sets with the splits {shown}",
                hint=f"name one of them: {path / (splits[0] if splits else 'SPLIT')}",
            )
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            return DataFile(path, "dataset", False)
    raise DataError(f"data file {path} is a folder, and no data set that save_to_disk wrote", hint=f"name one file; {ACCEPTED}")


def _check_content(path: Path, kind: Kind, gzipped: bool) -> None:
    with _reading(path), path.open("rb") as raw:
        start = raw.read(_START)
    if gzipped:
        if start and not start.startswith(b"\x1f\x8b"):
            raise DataError(f"data file {path} is gzip by its name, but does not hold gzip data", hint="take .gz off its name")
        with opened(DataFile(path, kind, True)) as unpacked:
            start = unpacked.read(_START)
    _check_start(path, kind, start)


def _check_start(path: Path, kind: Kind, start: bytes) -> None:
    if _is_wide(start):
        raise DataError(
            f"data file {path} is UTF-16 or UTF-32 text; {ACCEPTED}",
            hint="convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW_FILE, or save it again as UTF-8 in the editor that wrote it",
        )
    found = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)
    if kind == "parquet":
        if found != "Parquet":
            raise DataError(f"data file {path} is Parquet by its name, but does not begin as Parquet does", hint=ACCEPTED)
        return
    if found is not None:
        also = {"Parquet": "name it .parquet; ", "gzip": f"name it .{kind}.gz; "}.get(found, "")
        raise DataError(f"data file {path} holds {found} data", hint=f"{also}{ACCEPTED}")
    first = start.removeprefix(BOM).lstrip(BLANK)[:1]
    if kind == "jsonl" and first == b"[":
        raise DataError(
            f"data file {path} begins with a list, so it is no JSON lines", hint="name it .json, or write one JSON object per line"
        )
    if kind in ("csv", "tsv") and first in (b"{", b"["):
        raise DataError(f"data file {path} is {NAMES[kind]} by its name, but begins as JSON does", hint="name it .json or .jsonl")


def _is_wide(start: bytes) -> bool:
    """Return whether bytes begin as UTF-16 or UTF-32: with their byte order mark, or with NULs beside one ASCII character."""
    if start.startswith(_WIDE_MARKS):
        return True
    for width in (2, 4):
        unit = start[:width].strip(b"\x00")
        if len(start) >= width and len(unit) == 1 and unit.isascii() and (start[0] == 0) != (start[width - 1] == 0):
            return True
    return False


def _unreadable(path: Path, error: OSError) -> StorageError:
    reason = error.strerror or errno.errorcode.get(error.errno or 0, "unknown reason")
    return StorageError(f"data file {path} cannot be read: {reason}", hint="check the file's permissions and the disk")
