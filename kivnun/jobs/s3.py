"""Blobs as objects of a bucket, over S3's protocol: Amazon's, or any server that speaks it.

    s3://BUCKET/PREFIX?endpoint=http://minio:9000&region=us-east-1

The credentials are those of the usual AWS_ environment variables (a command line is read by others; the query takes them as well).
An object appears whole or not at all, so that nothing needs a name of its own while it is written. A large blob goes up in parts
and is read by ranges: memory holds a few pieces, and no single request lasts long. Next: `blobs.py` (the protocol).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from kivnun.artifacts import storage_errors
from kivnun.errors import IntegrityError, SpecError
from kivnun.jobs.blobs import PIECE_BYTES, blob_name, checked_name, hash_of, write_checked
from kivnun.jobs.effects import Watch, unwatched
from kivnun.jobs.errors import StoreDown

if TYPE_CHECKING:
    from obstore import ObjectMeta

PART_BYTES = 8 << 20
PARTS_AT_ONCE = 4
WHOLE_BYTES = PART_BYTES  # up to here an object is put by one request, on the condition that it is not there
# A part at 3.4 Mbit/s, and no longer: who waits for a store that hangs has to end within a drain (cli/serve.py).
REQUEST_S = 20
CONNECT_S = 5
GIVE_UP_S = 15  # a try that ends later than this after the first is the last one
RENEW_S = 1800.0  # an object older than this is written again when it is put again, so that its age starts anew
_OPTIONS = ("endpoint", "region", "access_key_id", "secret_access_key", "session_token")


class S3Blobs:
    """A `BlobStore` over a bucket. `clock` gives seconds since 1970, as the store's own clock does.

    `erase` looks at an object's age and then deletes it: unlike in a folder these are two requests. Whoever sweeps erases only what
    was garbage when it was seen before, so that a put in just that moment would have to follow an hour without one."""

    def __init__(self, url: str, watch: Watch = unwatched, clock: Callable[[], float] = time.time) -> None:
        self._store = _store_at(url)
        self._watch = watch
        self._clock = clock

    def put(self, tenant: str, source: Path) -> str:
        with storage_errors(source), source.open("rb") as stream:
            name = blob_name(tenant, hash_of(stream))
        self._keep(name, source)
        return name

    def take(self, tenant: str, source: Path, digest: str) -> str:
        name = blob_name(tenant, digest)
        self._keep(name, source)
        with storage_errors(source):
            source.unlink(missing_ok=True)
        return name

    def put_bytes(self, tenant: str, content: bytes) -> str:
        name = blob_name(tenant, hashlib.sha256(content).hexdigest())
        self._keep(name, content)
        return name

    def read(self, name: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        meta = self._meta(name)
        if meta is None:
            raise _absent(name)
        end = meta["size"] if length is None else min(meta["size"], start + length)
        while start < end:
            until = min(start + PART_BYTES, end)
            with _outages(name):
                piece = memoryview(obstore.get_range(self._store, name, start=start, end=until))
            for at in range(0, len(piece), PIECE_BYTES):
                yield bytes(piece[at : at + PIECE_BYTES])
            start = until

    def fetch(self, name: str, target: Path) -> None:
        write_checked(name, self.read(name), target)

    def has(self, name: str) -> bool:
        return self._meta(name) is not None

    def delete(self, name: str) -> None:
        key = checked_name(name)
        try:
            with _outages(key):
                obstore.delete(self._store, key)
        except IntegrityError:
            return

    def erase(self, name: str, before: float) -> bool:
        meta = self._meta(name)
        if meta is not None and meta["last_modified"].timestamp() >= before:
            return False
        self.delete(name)
        return True

    def names(self) -> Iterator[tuple[str, float]]:
        with _outages("the list of all"):
            for page in obstore.list(self._store, chunk_size=1000):
                for meta in page:
                    try:
                        yield checked_name(meta["path"]), meta["last_modified"].timestamp()
                    except IntegrityError:
                        continue  # somebody else's object

    def clear_leftovers(self, before: float) -> None:
        """Do nothing: parts of an object that never became whole are cleared by the bucket's lifecycle rule."""

    def _meta(self, name: str) -> ObjectMeta | None:
        key = checked_name(name)
        try:
            with _outages(key):
                return obstore.head(self._store, key)
        except IntegrityError:
            return None

    def _keep(self, name: str, content: Path | bytes) -> None:
        meta = self._meta(name)
        if meta is not None and self._clock() - meta["last_modified"].timestamp() < RENEW_S:
            return
        self._watch("before blob")
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        with _outages(name):
            if meta is None and size <= WHOLE_BYTES:
                with suppress(AlreadyExistsError):  # another writer was faster, with the same content
                    obstore.put(self._store, name, content, mode="create", use_multipart=False)
            else:
                obstore.put(self._store, name, content, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)
        self._watch("after blob")


def _store_at(url: str) -> S3Store:
    parts = urlsplit(url)
    hint = "s3://BUCKET/PREFIX?endpoint=https://HOST&region=REGION, with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY set"
    if parts.scheme != "s3" or not parts.netloc:
        raise SpecError(f"--store must be s3://BUCKET/PREFIX, got a URL of {parts.scheme or 'no scheme'}", hint=hint)
    options: dict[str, Any] = {}
    for key, value in parse_qsl(parts.query):
        if key not in _OPTIONS:
            raise SpecError(f"--store has the unknown option {key[:60]!r}; there are {', '.join(_OPTIONS)}", hint=hint)
        options[key] = value
    return S3Store(
        parts.netloc,
        prefix=parts.path.strip("/") or None,
        # Plain http is spoken only where the address says so; the client's name for it has to be there at the start.
        client_options={
            "allow_http": True,
            "timeout": timedelta(seconds=REQUEST_S),
            "connect_timeout": timedelta(seconds=CONNECT_S),
        },
        retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=GIVE_UP_S)},
        **options,
    )


@contextmanager
def _outages(name: str) -> Iterator[None]:
    """Turn the store's failures inside the block into errors of this package; AlreadyExistsError passes unchanged."""
    try:
        yield
    except AlreadyExistsError:
        raise
    except FileNotFoundError:
        raise _absent(name) from None
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise StoreDown(
            "the object store refuses the credentials", hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    except BaseError as error:
        hint = "see the store's own log; nothing of this was kept under its name"
        raise StoreDown(f"the object store does not answer ({type(error).__name__})", hint=hint) from error


def _absent(name: str) -> IntegrityError:
    return IntegrityError(f"the store lacks a blob that it should hold: {name}", hint="restore the bucket")
