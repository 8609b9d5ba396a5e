"""An upload's body, written to disk while it arrives: memory holds one piece of it whatever its size.

The form is read by python-multipart's callbacks; the one part that is a file goes to a file of the scratch folder and is hashed on
the way. Whatever ends early (a limit, a full disk, a client that is gone or silent) leaves nothing there. Next: `api/files.py`,
`filenames.py`.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from kivnun.errors import StorageError
from kivnun.jobs.config import Limits
from kivnun.jobs.files import Storage
from kivnun.service.errors import ApiError, bad_request

PIECE_BYTES = 1 << 20
FRAME_BYTES = 64 << 10  # of a body beside its file: fields, boundaries, headers
MAX_FIELD_BYTES = 4096
MAX_PARTS = 16
SPARE_BYTES = 64 << 20  # of the disk, that uploads leave free
DRAIN_BYTES = 32 << 20
DRAIN_S = 2.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

CheckField = Callable[[str, str], None]
"""Raises ApiError for a field of the form that is unknown or wrong, before the rest is read."""


@dataclass(frozen=True, slots=True)
class Received:
    """What a form held: its fields, and its file as it lies in the scratch folder."""

    fields: dict[str, str]
    path: Path
    filename: str
    bytes: int
    digest: str  # SHA-256


def admit(limits: Limits, kept: Storage, coming: int) -> None:
    """Raise ApiError where a tenant has no room for one more file of `coming` bytes."""
    if kept.files >= limits.files:
        raise _no_room(f"you keep {kept.files:,} files, which is as many as are allowed; delete some")
    if kept.bytes + coming > limits.storage_bytes:
        free = max(0, limits.storage_bytes - kept.bytes)
        raise _no_room(f"{coming:,} bytes were to be kept and {free:,} of {limits.storage_bytes:,} are free; delete files")


def check_disk(scratch: Path, coming: int) -> None:
    """Raise ApiError where the disk has no room for `coming` bytes."""
    if shutil.disk_usage(scratch).free < coming + SPARE_BYTES:
        raise _disk_full()


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn a full disk inside the block into the answer that says so."""
    try:
        yield
    except OSError as error:
        cause = error.__cause__ if isinstance(error, StorageError) else error
        if isinstance(cause, OSError) and cause.errno in _FULL:
            raise _disk_full() from error
        raise


def declared_bytes(request: Request) -> int | None:
    """Return the body's length as its client declares it; None where it does not."""
    given = request.headers.get("content-length", "")
    return int(given) if given.isascii() and given.isdigit() and len(given) < 19 else None


@asynccontextmanager
async def received(request: Request, part: str, max_bytes: int, scratch: Path, check_field: CheckField) -> AsyncIterator[Received]:
    """Read a multipart form whose part `part` is a file of `max_bytes` at most; remove the file at the end, where it still is.

    Raises ApiError for a form that is broken, too large or unknown, and where the disk is full."""
    boundary = _boundary_of(request)
    with disk_errors():
        descriptor, name = await run_in_threadpool(tempfile.mkstemp, dir=scratch, prefix="incoming-", suffix=".jsonl")
    path = Path(name)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as out:
            form = Form(out, part, max_bytes, check_field)
            await _feed(request, form, boundary)
        yield form.received(path)
    except ApiError:
        await drain(request)
        raise
    finally:
        path.unlink(missing_ok=True)


async def drain(request: Request) -> None:
    """Read on for a moment: a client that still writes may not see an answer whose connection is closed under its hands."""
    left = DRAIN_BYTES
    try:
        async with asyncio.timeout(DRAIN_S):
            async for piece in request.stream():
                left -= len(piece)
                if left < 0:
                    return
    except (TimeoutError, ClientDisconnect, RuntimeError):  # RuntimeError: read to its end already
        return


async def _feed(request: Request, form: Form, boundary: bytes) -> None:
    parser = MultipartParser(boundary, form.callbacks(), max_header_count=8, max_header_size=32 << 10)  # type: ignore[arg-type]
    gathered = bytearray()
    stream = request.stream()
    while True:
        try:
            piece = await anext(stream, None)
        except ClientDisconnect:
            raise ApiError(400, "the upload broke off", code="upload_aborted") from None
        if piece is not None:
            gathered += piece
        if gathered and (piece is None or len(gathered) >= PIECE_BYTES):
            await run_in_threadpool(_write, parser, bytes(gathered))
            gathered.clear()
        if piece is None:
            break
    if not form.ended:
        raise bad_request("the form breaks off before its closing boundary", code="invalid_multipart")


def _write(parser: MultipartParser, piece: bytes) -> None:
    with disk_errors():
        try:
            parser.write(piece)
        except FormParserError:
            raise bad_request("the body is no multipart form with the boundary of its header", code="invalid_multipart") from None


@dataclass
class Form:
    """Takes what the parser finds: fields to memory, the file to `out`."""

    out: BinaryIO
    part: str
    max_bytes: int
    check_field: CheckField
    fields: dict[str, str] = field(default_factory=dict[str, str])
    filename: str | None = None
    bytes: int = 0
    ended: bool = False
    _digest: Any = field(default_factory=hashlib.sha256)
    _parts: int = 0
    _header: tuple[bytearray, bytearray] = field(default_factory=lambda: (bytearray(), bytearray()))
    _disposition: bytes = b""
    _name: str = ""
    _is_file: bool = False
    _value: bytearray = field(default_factory=bytearray)

    def callbacks(self) -> dict[str, Callable[..., None]]:
        return {
            "on_part_begin": self._begun, "on_header_begin": self._header_begun, "on_header_field": self._header_name,
            "on_header_value": self._header_value, "on_header_end": self._header_ended, "on_headers_finished": self._named,
            "on_part_data": self._data, "on_part_end": self._part_ended, "on_end": self._ended,
        }  # fmt: skip

    def received(self, path: Path) -> Received:
        """Return what came. Raises ApiError where the file did not."""
        if self.filename is None:
            message = f"the form holds no file in {self.part!r}"
            raise ApiError(400, message, code="missing_required_parameter", param=self.part)
        return Received(self.fields, path, self.filename, self.bytes, self._digest.hexdigest())

    def _begun(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise bad_request(f"the form has more than {MAX_PARTS} parts", code="invalid_multipart")
        self._disposition, self._name, self._is_file = b"", "", False
        self._value.clear()

    def _header_begun(self) -> None:
        for text in self._header:
            text.clear()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _header_ended(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])

    def _named(self) -> None:
        kind, options = parse_options_header(self._disposition)
        if kind != b"form-data" or not options.get(b"name"):
            raise bad_request("a part of the form has no name", code="invalid_multipart")
        self._name = options[b"name"].decode("utf-8", "replace")
        self._is_file = self._name == self.part
        if self._is_file and self.filename is not None:
            raise bad_request(f"the form holds two files in {self.part!r}; send one at a time", self.part)
        if self._is_file:
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")
        elif self._name in self.fields:
            raise bad_request(f"the form gives {self._name[:60]!r} twice", self._name[:60])

    def _data(self, data: bytes, start: int, end: int) -> None:
        if not self._is_file:
            if len(self._value) + end - start > MAX_FIELD_BYTES:
                raise bad_request(f"{self._name[:60]!r} is longer than {MAX_FIELD_BYTES} bytes", self._name[:60])
            self._value.extend(data[start:end])
            return
        piece = memoryview(data)[start:end]
        self.bytes += len(piece)
        if self.bytes > self.max_bytes:
            raise too_large(self.part, self.max_bytes)
        self._digest.update(piece)
        while piece:  # an unbuffered file may take less than it is given
            piece = piece[self.out.write(piece) :]

    def _part_ended(self) -> None:
        if not self._is_file:
            value = self._value.decode("utf-8", "replace")
            self.check_field(self._name, value)
            self.fields[self._name] = value

    def _ended(self) -> None:
        self.ended = True


def too_large(part: str, max_bytes: int) -> ApiError:
    message = (
        f"{part} is larger than {max_bytes:,} bytes; /uploads takes larger files in parts"
        if part == "file"
        else (f"{part} is larger than {max_bytes:,} bytes")
    )
    return ApiError(413, message, code="file_too_large", param=part)


def _boundary_of(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", "").encode("latin-1"))
    if kind != b"multipart/form-data":
        raise ApiError(415, "the body must be multipart/form-data", code="unsupported_media")
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 200:
        raise bad_request("the content-type names no boundary of 1 to 200 bytes", code="invalid_multipart")
    return boundary


def _no_room(message: str) -> ApiError:
    return ApiError(400, message, code="insufficient_storage")


def _disk_full() -> ApiError:
    message = "the server's disk has no room for this; tell its operator"
    return ApiError(507, message, code="insufficient_storage", type="server_error", headers={"x-should-retry": "false"})


def form_schema(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    """Return what a route adds to the API's description: the framework does not see a form that is read while it arrives."""
    schema = {"type": "object", "required": required, "properties": properties, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


BINARY = {"type": "string", "format": "binary"}
KEY_REUSED = "The Idempotency-Key was used with another body."
NO_ROOM = "The server's disk has no room."
