"""Uploads: a file of up to 8 GB in parts of up to 64 MiB, put together when its client says in which order.

A part is kept like a file while it arrives; completing writes the whole to the scratch folder piece by piece, and hands it to the
store. Completing again answers the same. Next: `jobs/uploads.py`, `api/files.py`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from kivnun.jobs import files, retries, uploads
from kivnun.jobs.database import Transaction
from kivnun.jobs.files import File
from kivnun.jobs.retries import Sent, body_hash
from kivnun.jobs.tenants import limits_of
from kivnun.jobs.uploads import LIFE_S, MAX_PART_BYTES, Part, Upload
from kivnun.service.api.files import MAX_LIFE_S, MIN_LIFE_S, check_purpose, drafted, file_object
from kivnun.service.auth import DataOwner
from kivnun.service.context import Service, Shared
from kivnun.service.errors import ApiError, bad_request, not_found
from kivnun.service.filenames import kept_name
from kivnun.service.receiving import (
    BINARY,
    FRAME_BYTES,
    KEY_REUSED,
    NO_ROOM,
    Received,
    admit,
    check_disk,
    declared_bytes,
    disk_errors,
    drain,
    form_schema,
    received,
    too_large,
)
from kivnun.service.sent import once, sent_as

router = APIRouter()

MAX_PARTS = 10_000
_NO_ROOM: dict[int | str, dict[str, Any]] = {422: {"description": KEY_REUSED}, 507: {"description": NO_ROOM}}
Name = Annotated[str, Field(min_length=1, max_length=100)]


class ExpiresAfter(BaseModel):
    """For how long the file is kept that an upload becomes."""

    model_config = ConfigDict(extra="forbid", strict=True)
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_LIFE_S, le=MAX_LIFE_S)]


class NewUpload(BaseModel):
    """The body of POST /uploads."""

    model_config = ConfigDict(extra="forbid", strict=True)
    filename: Annotated[str, Field(min_length=1, max_length=8192)]
    purpose: Annotated[str, Field(max_length=100, json_schema_extra={"enum": list(files.PURPOSES)})]
    bytes: Annotated[int, Field(ge=1)]
    mime_type: Annotated[str, Field(max_length=256, pattern=r"^[\x20-\x7e]*$")]
    expires_after: ExpiresAfter | None = None


class Completion(BaseModel):
    """The body of POST /uploads/{id}/complete."""

    model_config = ConfigDict(extra="forbid", strict=True)
    part_ids: Annotated[list[Name], Field(min_length=1, max_length=MAX_PARTS)]
    md5: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{32}$")] | None = None


@router.post("/uploads", responses={422: {"description": KEY_REUSED}})
def create(request: Request, body: NewUpload, service: Shared, who: DataOwner) -> dict[str, Any]:
    sent = sent_as(request, body_hash(body.model_dump_json().encode()))
    check_purpose(body.purpose)
    now = service.clock()
    upload = Upload(
        id=service.new_id("upload_"),
        tenant=who.tenant,
        created_at=now,
        expires_at=now + LIFE_S,
        purpose=body.purpose,
        filename=kept_name(body.filename),
        mime_type=body.mime_type,
        bytes=body.bytes,
        file_expires_after=None if body.expires_after is None else body.expires_after.seconds,
    )

    def make(tx: Transaction) -> str:
        limits = limits_of(tx, who.tenant, service.config.limits)
        if body.bytes > limits.upload_bytes:
            raise ApiError(413, f"an upload has {limits.upload_bytes:,} bytes at most, not {body.bytes:,}",
                           code="file_too_large", param="bytes")  # fmt: skip
        admit(limits, files.storage_of(tx, who.tenant), body.bytes)
        uploads.add(tx, upload)
        return upload.id

    def work(tx: Transaction) -> Upload:
        made, _ = retries.accept(tx, who.tenant, "/uploads", sent, now, service.new_id, lambda: make(tx))
        return _found(tx, made, who.tenant)

    return upload_object(once(lambda: service.db.write("create upload", work)), None)


@router.post("/uploads/{upload_id}/parts", openapi_extra=form_schema({"data": BINARY}, ["data"]), responses=_NO_ROOM)
async def add_part(request: Request, upload_id: str, service: Shared, who: DataOwner) -> dict[str, Any]:
    """Receive one part in a multipart form (`data`)."""
    coming = declared_bytes(request) or 0
    try:
        await run_in_threadpool(_admit_part, service, upload_id, who.tenant, coming)
        if coming > MAX_PART_BYTES + FRAME_BYTES:
            raise too_large("data", MAX_PART_BYTES)
        check_disk(service.scratch, coming)
    except ApiError:
        await drain(request)
        raise
    async with received(request, "data", MAX_PART_BYTES, service.scratch, _no_field) as form:
        if not form.bytes:
            raise bad_request("the part is empty", "data")
        part = await run_in_threadpool(_keep_part, service, upload_id, who.tenant, form, sent_as(request, form.digest))
    return {"id": part.id, "object": "upload.part", "created_at": int(part.created_at), "upload_id": upload_id}


@router.post("/uploads/{upload_id}/complete", responses=_NO_ROOM)
async def complete(upload_id: str, body: Completion, service: Shared, who: DataOwner) -> dict[str, Any]:
    """Put the parts together, in the order given, and answer the upload with its file. A tenant's are done one after the other."""
    return await service.completions.run(lambda: _completed(service, upload_id, who.tenant, body), one_of=who.tenant)


@router.post("/uploads/{upload_id}/cancel")
def cancel(upload_id: str, service: Shared, who: DataOwner) -> dict[str, Any]:
    """Cancel an upload; one that is cancelled already is answered as it is."""

    def work(tx: Transaction) -> Upload:
        upload = _found(tx, upload_id, who.tenant)
        if upload.status != "cancelled":
            _check_open(upload, service.clock())
            uploads.end(tx, upload, "cancelled")
        return _found(tx, upload_id, who.tenant)

    return upload_object(service.db.write("cancel upload", work), None)


def upload_object(upload: Upload, file: File | None) -> dict[str, Any]:
    """Return an upload as the wire shows it."""
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.bytes,
        "created_at": int(upload.created_at),
        "expires_at": int(upload.expires_at),
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
        "file": None if file is None else file_object(file),
    }


def _completed(service: Service, upload_id: str, tenant: str, body: Completion) -> dict[str, Any]:
    now = service.clock()

    def look(tx: Transaction) -> tuple[Upload, dict[str, Part], File | None]:
        upload = _found(tx, upload_id, tenant)
        return upload, uploads.parts_of(tx, upload_id), _file_of(tx, upload)

    upload, parts, file = service.db.read(look)
    if upload.status == "completed":
        return upload_object(upload, file)
    _check_open(upload, now)
    with _assembled(service, _ordered(parts, body.part_ids, upload.bytes), body.md5) as whole:
        expires_at = None if upload.file_expires_after is None else now + upload.file_expires_after
        made = drafted(service, tenant, whole, upload.purpose, upload.filename, expires_at, now)

    def work(tx: Transaction) -> tuple[Upload, File | None]:
        open_still = _found(tx, upload_id, tenant)
        if open_still.status != "completed":  # else another request was faster: its file is the answer
            _check_open(open_still, now)
            uploads.end(tx, open_still, "completed", made.id)
            admit(limits_of(tx, tenant, service.config.limits), files.storage_of(tx, tenant), made.bytes)
            files.add(tx, made)
        ended = _found(tx, upload_id, tenant)
        return ended, _file_of(tx, ended)

    return upload_object(*service.db.write("complete upload", work))


def _found(tx: Transaction, upload_id: str, tenant: str) -> Upload:
    upload = uploads.find(tx, upload_id, tenant)
    if upload is None:
        raise not_found("upload", upload_id, "upload_id")
    return upload


def _file_of(tx: Transaction, upload: Upload) -> File | None:
    return None if upload.file is None else files.find(tx, upload.file, upload.tenant)


def _check_open(upload: Upload, now: float) -> None:
    status = "expired" if upload.status == "pending" and upload.expires_at <= now else upload.status
    if status != "pending":
        raise bad_request(f"the upload is {status}; create another", "upload_id", "upload_not_pending")


def _no_field(name: str, _value: str) -> None:
    raise ApiError(400, f"unknown field {name[:60]!r}; a part's form has data alone", code="unknown_parameter", param=name[:60])


def _admit_part(service: Service, upload_id: str, tenant: str, coming: int) -> None:
    def look(tx: Transaction) -> None:
        _check_open(_found(tx, upload_id, tenant), service.clock())
        _check_room(tx, service, upload_id, tenant, max(0, coming - FRAME_BYTES))

    service.db.read(look)


def _check_room(tx: Transaction, service: Service, upload_id: str, tenant: str, coming: int) -> None:
    admit(limits_of(tx, tenant, service.config.limits), files.storage_of(tx, tenant), coming)
    if len(uploads.parts_of(tx, upload_id)) >= MAX_PARTS:
        raise bad_request(f"an upload has {MAX_PARTS:,} parts at most; send larger ones", "data")


def _keep_part(service: Service, upload_id: str, tenant: str, form: Received, sent: Sent) -> Part:
    with disk_errors():
        blob = service.blobs.take(tenant, form.path, form.digest)
    now = service.clock()
    part = Part(service.new_id("part_"), upload_id, now, form.bytes, blob)

    def make(tx: Transaction) -> str:
        _check_room(tx, service, upload_id, tenant, part.bytes)
        uploads.add_part(tx, part)
        return part.id

    def work(tx: Transaction) -> Part:
        _check_open(_found(tx, upload_id, tenant), now)
        route = f"/uploads/{upload_id}/parts"
        made, _ = retries.accept(tx, tenant, route, sent, now, service.new_id, lambda: make(tx))
        return uploads.parts_of(tx, upload_id)[made]

    return once(lambda: service.db.write("add part", work))


def _ordered(parts: dict[str, Part], part_ids: Sequence[str], declared: int) -> list[Part]:
    """Return the parts in the order asked for. Raises ApiError where they are not exactly what was declared.

    A part may stand there twice: of two equal ones, the second is answered with the first where it came as a retry alone."""
    for part_id in part_ids:
        if part_id not in parts:
            raise bad_request(f"the upload has no part {part_id!r}", "part_ids")
    total = sum(parts[part_id].bytes for part_id in part_ids)
    if total != declared:
        raise bad_request(
            f"the parts have {total:,} bytes together, and {declared:,} were declared", "part_ids", "upload_size_mismatch"
        )
    return [parts[part_id] for part_id in part_ids]


@contextmanager
def _assembled(service: Service, parts: Sequence[Part], md5: str | None) -> Iterator[Received]:
    """Write the parts one after the other to a file of the scratch folder; remove it at the end, where it still is."""
    size = sum(part.bytes for part in parts)
    check_disk(service.scratch, size)
    with disk_errors():
        descriptor, name = tempfile.mkstemp(dir=service.scratch, prefix="assembled-", suffix=".jsonl")
    path = Path(name)
    try:
        digest, checksum = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        with disk_errors(), os.fdopen(descriptor, "wb") as out:
            for part in parts:
                for piece in service.blobs.read(part.blob):
                    out.write(piece)
                    digest.update(piece)
                    checksum.update(piece)
        if md5 is not None and not hmac.compare_digest(checksum.hexdigest(), md5.lower()):
            raise bad_request("the parts' MD5 is another than md5 says", "md5", "checksum_mismatch")
        yield Received({}, path, "", size, digest.hexdigest())
    finally:
        path.unlink(missing_ok=True)
