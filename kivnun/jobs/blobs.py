"""Bytes by name: a folder on this machine, or S3. A blob is whole or absent, and is never changed once it is there.

A blob's name holds its tenant and the SHA-256 of its content, so that writing it twice is no harm, and so that one tenant's
deletion touches nobody else's. Blobs that no row names are garbage once they are old; putting one that is there already makes it
young again, so that what is about to be named is not taken for garbage. Next: `s3.py` (the same over S3's protocol).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from kivnun.artifacts import storage_errors, sync_folder
from kivnun.errors import IntegrityError
from kivnun.jobs.effects import Watch, unwatched

PIECE_BYTES = 1 << 20
PARTIAL = ".partial-"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}/[0-9a-f]{64}")


class BlobStore(Protocol):
    """Keeps blobs. Threads may share one. Raises StorageError or StoreDown; a blob that fails is not there at all."""

    def put(self, tenant: str, source: Path) -> str:
        """Keep a file's content; return the blob's name. The same content again is no work."""
        ...

    def take(self, tenant: str, source: Path, digest: str) -> str:
        """Keep a file whose SHA-256 was counted already, and remove it from where it is; return the blob's name."""
        ...

    def put_bytes(self, tenant: str, content: bytes) -> str:
        """Keep `content`; return the blob's name."""
        ...

    def read(self, name: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Yield the blob's bytes from `start` in pieces of 1 MiB at most. Raises IntegrityError where there is no such blob."""
        ...

    def fetch(self, name: str, target: Path) -> None:
        """Write the blob to a new file and check its hash. Raises IntegrityError where it is another's or absent."""
        ...

    def has(self, name: str) -> bool: ...

    def delete(self, name: str) -> None:
        """Remove a blob; one that is not there is no error."""
        ...

    def erase(self, name: str, before: float) -> bool:
        """Remove a blob unless it was put at or after `before`; return whether it is gone."""
        ...

    def names(self) -> Iterator[tuple[str, float]]:
        """Yield every blob's name and the time it was last put, in seconds since 1970; those of a tenant come together."""
        ...

    def clear_leftovers(self, before: float) -> None:
        """Remove what writers that were killed before then left behind."""
        ...


def blob_name(tenant: str, digest: str) -> str:
    """Return the name of a tenant's blob by its content's SHA-256 in hexadecimal."""
    return checked_name(f"{tenant}/{digest}")


def checked_name(name: str) -> str:
    """Return a blob's name. Raises IntegrityError where it is none: nothing else ever becomes a path."""
    if not _NAME.fullmatch(name):
        raise IntegrityError("that is not a blob's name", hint="a name is TENANT/SHA-256")
    return name


def hash_of(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := stream.read(PIECE_BYTES):
        digest.update(piece)
    return digest.hexdigest()


class FolderBlobs:
    """Blobs as files of a folder: written beside, made durable, then given their name."""

    def __init__(self, folder: Path, watch: Watch = unwatched) -> None:
        self.folder = folder
        self._watch = watch
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def put(self, tenant: str, source: Path) -> str:
        with storage_errors(source), source.open("rb") as stream:
            name = blob_name(tenant, hash_of(stream))
            if not self._renewed(name):
                stream.seek(0)
                self._keep(name, stream)
        return name

    def take(self, tenant: str, source: Path, digest: str) -> str:
        name = blob_name(tenant, digest)
        with storage_errors(source):
            if not self._renewed(name):
                with source.open("rb") as stream:
                    if self._on_one_disk(source):
                        self._watch("before blob")
                        os.fsync(stream.fileno())
                        os.utime(stream.fileno())
                        self._give_name(name, source)
                        self._watch("after blob")
                        return name
                    self._keep(name, stream)
            source.unlink(missing_ok=True)
        return name

    def put_bytes(self, tenant: str, content: bytes) -> str:
        name = blob_name(tenant, hashlib.sha256(content).hexdigest())
        if not self._renewed(name):
            with storage_errors(self.folder), tempfile.SpooledTemporaryFile(len(content) + 1) as stream:
                stream.write(content)
                stream.seek(0)
                self._keep(name, stream)  # type: ignore[arg-type]
        return name

    def read(self, name: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        with storage_errors(self._path(name)), self._opened(name) as stream:
            stream.seek(start)
            left = length
            while left is None or left > 0:
                piece = stream.read(PIECE_BYTES if left is None else min(PIECE_BYTES, left))
                if not piece:
                    return
                left = None if left is None else left - len(piece)
                yield piece

    def fetch(self, name: str, target: Path) -> None:
        write_checked(name, self.read(name), target)

    def has(self, name: str) -> bool:
        return self._path(name).is_file()

    def delete(self, name: str) -> None:
        with storage_errors(self._path(name)):
            self._path(name).unlink(missing_ok=True)

    def erase(self, name: str, before: float) -> bool:
        path = self._path(name)
        with storage_errors(path), suppress(FileNotFoundError), _locked(path.parent, fcntl.LOCK_EX):
            if path.stat().st_mtime >= before:
                return False
            path.unlink()
        return True

    def names(self) -> Iterator[tuple[str, float]]:
        with storage_errors(self.folder):
            for tenant in sorted(self.folder.iterdir()):
                for path in tenant.glob("??/*"):
                    name = f"{tenant.name}/{path.name}"
                    with suppress(FileNotFoundError):
                        if _NAME.fullmatch(name):
                            yield name, path.stat().st_mtime

    def clear_leftovers(self, before: float) -> None:
        with storage_errors(self.folder):
            for path in self.folder.glob(f"*/??/{PARTIAL}*"):
                with suppress(FileNotFoundError):
                    if path.stat().st_mtime < before:
                        path.unlink()

    def _path(self, name: str) -> Path:
        tenant, digest = checked_name(name).split("/")
        return self.folder / tenant / digest[:2] / digest

    def _opened(self, name: str) -> BinaryIO:
        try:
            return self._path(name).open("rb")
        except FileNotFoundError:
            raise IntegrityError(f"the store lacks a blob that it should hold: {name}", hint="restore the store's folder") from None

    def _renewed(self, name: str) -> bool:
        """Return whether the blob is there; if so, it is as young as one just written."""
        path = self._path(name)
        try:
            with _locked(path.parent, fcntl.LOCK_SH):
                os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _on_one_disk(self, source: Path) -> bool:
        return source.stat().st_dev == self.folder.stat().st_dev

    def _give_name(self, name: str, source: Path) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent, fcntl.LOCK_SH):
            os.rename(source, path)
        for folder in (path.parent, path.parent.parent, self.folder):
            sync_folder(folder)

    def _keep(self, name: str, stream: BinaryIO) -> None:
        self._watch("before blob")
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL)
        try:
            with os.fdopen(descriptor, "wb") as out:
                while piece := stream.read(PIECE_BYTES):
                    out.write(piece)
                out.flush()
                os.fsync(out.fileno())
            self._give_name(name, Path(partial))
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
        self._watch("after blob")


@contextmanager
def _locked(folder: Path, kind: int) -> Iterator[None]:
    """Hold a folder's lock: whoever erases looks and unlinks while nobody renews or adds. A process that dies lets go of it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


def write_checked(name: str, pieces: Iterable[bytes], target: Path) -> None:
    """Write a blob's content to a new file. Raises IntegrityError where it is not what its name says."""
    digest = hashlib.sha256()
    with storage_errors(target), target.open("xb") as out:
        for piece in pieces:
            digest.update(piece)
            out.write(piece)
    check_digest(name, digest.hexdigest())


def check_digest(name: str, digest: str) -> None:
    """Raise IntegrityError where a blob's content is not what its name says."""
    if not name.endswith(digest):
        raise IntegrityError(f"a blob's content is not what its name says: {name}", hint="restore the store from a copy")
