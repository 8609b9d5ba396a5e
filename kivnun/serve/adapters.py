"""Adapters on demand: fetched as blobs, checked byte for byte against the hash that the records name, kept while there is room.

An adapter in memory goes by its content hash alone, never by a number that could be given anew; one that answers is never thrown
out. Next: `adapter_files.py` (what a file must be to be loaded), `scheduler.py` (who asks).
"""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kivnun.artifacts import atomic_folder, hash_folder, storage_errors
from kivnun.errors import IntegrityError
from kivnun.jobs.blobs import BlobStore, checked_name
from kivnun.serve.protocol import AdapterName

MAX_MANIFEST_BYTES = 1 << 20
MAX_FILES = 64
T = TypeVar("T")


class _File(BaseModel):
    model_config = ConfigDict(frozen=True)
    path: str = Field(max_length=200)
    blob: str
    bytes: Annotated[int, Field(ge=0)]


class _Manifest(BaseModel):
    files: list[_File] = Field(max_length=MAX_FILES)


class AdapterFolders:
    """Adapters on this machine's disk, each in a folder by its content hash; the ones used last are kept, up to `max_bytes`.
    Threads may share it."""

    def __init__(self, blobs: BlobStore, folder: Path, max_bytes: int = 16 << 30) -> None:
        self._blobs, self._folder, self._max_bytes = blobs, folder, max_bytes
        self._lent: Counter[str] = Counter()
        self._coming: dict[str, int] = {}  # bytes of those that are being fetched
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def fetched(self, tenant: str, name: AdapterName) -> Generator[Path]:
        """Give a folder whose content has the adapter's hash; it stays until the block's end. Raises IntegrityError where its blobs
        are not that, or another tenant's; StoreDown or StorageError where they cannot be had."""
        with self._lock:
            self._lent[name.content_hash] += 1
        try:
            yield self._fetch(tenant, name)
        finally:
            with self._lock:
                self._coming.pop(name.content_hash, None)
                self._lent[name.content_hash] -= 1
                if not self._lent[name.content_hash]:
                    del self._lent[name.content_hash]

    def _fetch(self, tenant: str, name: AdapterName) -> Path:
        place = self._folder / name.content_hash
        if place.is_dir():
            if hash_folder(place) == name.content_hash:
                place.touch()
                return place
            shutil.rmtree(place)
        files = self._listed(tenant, name)
        self._make_room(name, sum(file.bytes for file in files))
        with atomic_folder(place) as filling:
            for file in files:
                target = filling / _inside(file.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                self._blobs.fetch(file.blob, target)
            found = hash_folder(filling)
            if found != name.content_hash:
                raise IntegrityError(
                    f"an adapter's files have the hash {found}, its record says {name.content_hash}",
                    hint="restore the store from a copy, or train the model again",
                )
        return place

    def clear(self) -> None:
        """Remove the folder: its worker ends."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _listed(self, tenant: str, name: AdapterName) -> list[_File]:
        content = b"".join(self._blobs.read(checked_name(name.manifest), 0, MAX_MANIFEST_BYTES + 1))
        try:
            files = _Manifest.model_validate(json.loads(content)).files if len(content) <= MAX_MANIFEST_BYTES else []
        except (ValueError, ValidationError, RecursionError):
            files = []
        if not files:
            raise IntegrityError("an adapter's list of files cannot be read", hint="restore the store from a copy")
        for blob in (name.manifest, *(file.blob for file in files)):
            if checked_name(blob).partition("/")[0] != tenant:
                raise IntegrityError("an adapter names another tenant's blob", hint="restore the records from a copy")
        if sum(file.bytes for file in files) > self._max_bytes:
            raise IntegrityError(f"an adapter is larger than {self._max_bytes} bytes", hint="train one of a lower rank")
        return files

    def _make_room(self, name: AdapterName, needed: int) -> None:
        with self._lock, storage_errors(self._folder):
            self._coming[name.content_hash] = needed
            there = sorted(
                (place for place in self._folder.iterdir() if place.name not in self._coming and not place.name.startswith(".")),
                key=lambda place: place.stat().st_mtime,
            )
            sizes = {place: sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) for place in there}
            total = sum(sizes.values()) + sum(self._coming.values())
            for place in there:
                if total > self._max_bytes and place.name not in self._lent:
                    shutil.rmtree(place)
                    total -= sizes[place]


def _inside(path: str) -> PurePosixPath:
    """Return a file's place in its folder. Raises IntegrityError for a path that leads elsewhere."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or not pure.parts or any(part in ("..", ".") or "\x00" in part for part in pure.parts) or "\\" in path:
        raise IntegrityError("an adapter's list of files names a place outside its folder", hint="restore the store from a copy")
    return pure


@dataclass(slots=True)
class _Held(Generic[T]):
    adapter: T
    num_bytes: int
    users: int = 0


class AdapterCache(Generic[T]):
    """Adapters in memory by content hash: `load` makes one of a folder that `fetch` gives, and tells its bytes. Threads may share
    it; one adapter is loaded by one of them, and the others wait for it."""

    def __init__(
        self,
        fetch: Callable[[str, AdapterName], AbstractContextManager[Path]],
        load: Callable[[Path], tuple[T, int]],
        max_count: int = 64,
        max_bytes: int = 8 << 30,
    ) -> None:
        self._fetch, self._load, self._max_count, self._max_bytes = fetch, load, max_count, max_bytes
        self._held: OrderedDict[str, _Held[T]] = OrderedDict()  # the one used longest ago first
        self._loading: set[str] = set()
        self._lock = threading.Lock()
        self._loaded = threading.Condition(self._lock)

    @property
    def hashes(self) -> list[str]:
        """Return which adapters are in memory, the one used longest ago first."""
        with self._lock:
            return list(self._held)

    def take(self, tenant: str, name: AdapterName) -> T:
        """Return an adapter for use, loaded if need be; it stays until it is given back. Raises as `AdapterFolders.fetch`."""
        content_hash = name.content_hash
        with self._loaded:
            self._loaded.wait_for(lambda: content_hash not in self._loading)
            if content_hash in self._held:
                return self._used(content_hash)
            self._loading.add(content_hash)
        try:  # without the lock: whoever gives back does not wait for a disk
            with self._fetch(tenant, name) as folder:
                held = _Held(*self._load(folder))
        except BaseException:
            self._is_loaded(content_hash)
            raise
        with self._lock:
            self._held[content_hash] = held
            adapter = self._used(content_hash)
            self._evict()
        self._is_loaded(content_hash)
        return adapter

    def _is_loaded(self, content_hash: str) -> None:
        with self._loaded:
            self._loading.remove(content_hash)
            self._loaded.notify_all()

    def take_held(self, content_hash: str) -> T | None:
        """Return an adapter for use where it is in memory already."""
        with self._lock:
            return self._used(content_hash) if content_hash in self._held else None

    def give_back(self, content_hash: str) -> None:
        """Say that one user of an adapter is done with it."""
        with self._lock:
            self._held[content_hash].users -= 1
            self._evict()

    def _used(self, content_hash: str) -> T:
        held = self._held[content_hash]
        held.users += 1
        self._held.move_to_end(content_hash)
        return held.adapter

    def _evict(self) -> None:
        for content_hash in [name for name, held in self._held.items() if held.users == 0]:
            if len(self._held) <= self._max_count and sum(held.num_bytes for held in self._held.values()) <= self._max_bytes:
                return
            del self._held[content_hash]
