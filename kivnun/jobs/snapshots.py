"""Folders as blobs: what a run needs to go on, or an adapter, is one manifest that names a blob for each file.

A manifest is a blob itself, so a row that names it names everything, and whoever fetches it checks every byte. Next: `blobs.py`,
`running.py` (whose rows name manifests).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar, cast

from kivnun.artifacts import hash_files, make_folder
from kivnun.errors import IntegrityError
from kivnun.jobs.blobs import BlobStore

T = TypeVar("T")
MAX_MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a folder and the blob that holds it."""

    path: str
    blob: str
    bytes: int

    @property
    def sha256(self) -> str:
        return self.blob.rpartition("/")[2]


class Attempt(Protocol):
    """Makes one call of the store. Who must not fail for a store that is away for a while makes it again and again."""

    def __call__(self, act: Callable[[], T], /) -> T: ...


def once(act: Callable[[], T], /) -> T:
    """Make a call, and let it fail."""
    return act()


def keep_files(blobs: BlobStore, tenant: str, files: Mapping[str, Path], attempt: Attempt = once) -> tuple[str, list[Entry]]:
    """Put files into the store, by the names they are to have; return the blob of their manifest, and its entries."""
    entries = [
        Entry(name, attempt(functools.partial(blobs.put, tenant, path)), path.stat().st_size)
        for name, path in sorted(files.items())
    ]
    listed = [{"path": entry.path, "blob": entry.blob, "bytes": entry.bytes, "sha256": entry.sha256} for entry in entries]
    content = json.dumps({"files": listed}, indent=1).encode()
    return attempt(lambda: blobs.put_bytes(tenant, content)), entries


def read_manifest(blobs: BlobStore, manifest: str) -> list[Entry]:
    """Return what a manifest names. Raises IntegrityError where it is damaged, or names a path outside of its folder."""
    content = b"".join(blobs.read(manifest, 0, MAX_MANIFEST_BYTES))
    try:
        listed = cast("list[dict[str, Any]]", json.loads(content)["files"])
        entries = [Entry(str(item["path"]), str(item["blob"]), int(item["bytes"])) for item in listed]
    except (ValueError, KeyError, TypeError):
        raise IntegrityError(f"{manifest} is no manifest", hint="restore the store from a copy") from None
    for entry in entries:
        path = PurePosixPath(entry.path)
        if path.is_absolute() or ".." in path.parts or not path.parts or entry.blob.partition("/")[0] != manifest.partition("/")[0]:
            raise IntegrityError(f"{manifest} names {entry.path!r}, which it must not", hint="restore the store from a copy")
    return entries


def fetch_folder(blobs: BlobStore, manifest: str, folder: Path, attempt: Attempt = once) -> list[Entry]:
    """Write the files that a manifest names into a new folder, each checked by its hash. Raises IntegrityError."""
    entries = attempt(lambda: read_manifest(blobs, manifest))
    attempt(functools.partial(make_folder, folder))
    for entry in entries:
        target = folder / entry.path
        attempt(functools.partial(make_folder, target.parent))
        attempt(functools.partial(fetch_file, blobs, entry.blob, target))
    return entries


def fetch_file(blobs: BlobStore, blob: str, target: Path) -> None:
    """Write a blob to a file, in place of what an attempt that failed left of it."""
    target.unlink(missing_ok=True)
    blobs.fetch(blob, target)


def content_hash(entries: list[Entry]) -> str:
    """Return what `artifacts.hash_folder` gives of the folder that these are the files of."""
    return hash_files({entry.path: entry.sha256 for entry in entries})


def files_in(folder: Path, without: frozenset[str] = frozenset()) -> Iterator[tuple[str, Path]]:
    """Yield each file below a folder with its relative name, hidden leftovers of killed writers left out."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if (
            path.is_file()
            and not any(part.startswith((".tmp-", ".old-")) for part in name.parts)
            and name.as_posix() not in without
        ):
            yield name.as_posix(), path
