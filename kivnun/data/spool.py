"""Bytes that are written once, in order, and read from anywhere: in memory while they are few, then in a file without a name.

Token rows of a file larger than memory go here. The file has no name from the start, so a process that is killed leaves nothing
behind. It is read with `pread` and not mapped: pages of a mapping count as the process's own memory, and a disk that fails or is
full would end the process with a signal where here it is an error with a hint. Next: `store.py`, which keeps rows in spools.
"""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from pathlib import Path

import numpy as np

from kivnun.artifacts import storage_errors

MEMORY_BYTES = 16 * 2**20  # that a spool holds in memory before it goes to disk
WRITE_BYTES = 2**20  # written to disk at a time
AT_ONCE = 65_536  # entries of a table to read at a time when all are gone through


class Spool:
    """Bytes in the order they came. `folder` is where the file would lie; None: where the system puts temporary files."""

    def __init__(self, folder: Path | None = None, memory_bytes: int | None = None) -> None:
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._limit = MEMORY_BYTES if memory_bytes is None else memory_bytes
        self._held = bytearray()  # the end of the bytes: all of them, or those not yet on disk
        self._on_disk = 0
        self._file: int | None = None

    def __len__(self) -> int:
        return self._on_disk + len(self._held)

    @property
    def is_on_disk(self) -> bool:
        return self._file is not None

    def append(self, data: bytes | memoryview) -> int:
        """Add bytes at the end; return where they begin. Raises StorageError."""
        start = len(self)
        self._held += data
        if len(self._held) >= (self._limit if self._file is None else WRITE_BYTES):
            self._write_out()
        return start

    def read(self, start: int, count: int, dtype: np.dtype) -> np.ndarray:
        """Return a copy of `count` entries of a numpy type, which begin at byte `start` and must be there. Raises StorageError."""
        end = start + count * dtype.itemsize
        assert 0 <= start <= end <= len(self), (start, end, len(self))
        if start < self._on_disk < end:
            self._write_out()  # it lies on both sides; rare, since most is read when all is written
        if start >= self._on_disk:
            return np.frombuffer(self._held, dtype, count, start - self._on_disk).copy() if count else np.empty(0, dtype)
        found = bytearray(end - start)
        with storage_errors(self._folder):
            _read_fully(self._file, memoryview(found), start)
        return np.frombuffer(found, dtype)

    def _write_out(self) -> None:
        with storage_errors(self._folder):
            if self._file is None:
                self._file = _nameless_file(self._folder)
                weakref.finalize(self, os.close, self._file)
            left = memoryview(bytes(self._held))
            while left:
                written = os.pwrite(self._file, left, self._on_disk)
                left, self._on_disk = left[written:], self._on_disk + written
        self._held = bytearray()


class Table:
    """Entries of one numpy type in a spool: what a list would hold as objects, in a few bytes each."""

    def __init__(self, dtype: np.dtype, folder: Path | None = None, memory_bytes: int | None = None) -> None:
        self.dtype = dtype
        self._spool = Spool(folder, memory_bytes)

    def __len__(self) -> int:
        return len(self._spool) // self.dtype.itemsize

    def append(self, entries: bytes | memoryview) -> None:
        """Add one entry or several, as their bytes."""
        assert len(entries) % self.dtype.itemsize == 0
        self._spool.append(entries)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return a copy of the entries [start, stop)."""
        stop = len(self) if stop is None else stop
        return self._spool.read(start * self.dtype.itemsize, stop - start, self.dtype)


def _nameless_file(folder: Path) -> int:
    # The library takes O_TMPFILE, which never has a name, and removes the name at once where the file system lacks that.
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        return os.dup(file.fileno())


def _read_fully(file: int | None, target: memoryview, start: int) -> None:
    assert file is not None
    while target:
        count = os.preadv(file, [target], start)
        if not count:
            raise OSError(errno.EIO, "a temporary file is shorter than what was written to it")
        target, start = target[count:], start + count
