"""Files: uploaded, listed, read back, deleted, and what their judgement says line by line.

Next: `service/receiving.py` (how a body comes in), `service/judging.py`, `jobs/files.py`.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from kivnun.jobs import files, retries
from kivnun.jobs.database import Transaction
from kivnun.jobs.files import JUDGED, PURPOSES, File
from kivnun.jobs.retries import Sent, body_hash
from kivnun.jobs.tenants import limits_of
from kivnun.service.auth import DataOwner, Reader
from kivnun.service.context import Service, Shared
from kivnun.service.dialect import Dialect, dialect_of
from kivnun.service.errors import ApiError, bad_request, not_found
from kivnun.service.filenames import content_disposition, kept_name
from kivnun.service.judging import AT_ONCE_BYTES, AT_ONCE_ROWS, judge
from kivnun.service.paging import page_object
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

Encoding = Literal["raw", "base64"]
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
MIN_LIFE_S, MAX_LIFE_S = 3600, 2_592_000
RESULTS = "fine-tune-results"
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


_FORM = form_schema(
    {
        "file": BINARY,
        "purpose": {"type": "string", "enum": list(PURPOSES)},
        ANCHOR: {"type": "string", "enum": ["created_at"]},
        SECONDS: {"type": "integer", "minimum": MIN_LIFE_S, "maximum": MAX_LIFE_S},
    },
    ["file", "purpose"],
)


@router.post("/files", openapi_extra=_FORM, responses={422: {"description": KEY_REUSED}, 507: {"description": NO_ROOM}})
async def upload(request: Request, service: Shared, who: DataOwner) -> dict[str, Any]:
    """Receive a file in a multipart form (`file`, `purpose`, `expires_after`) and answer its object, judged if it is small."""
    limits, kept = await run_in_threadpool(
        service.db.read, lambda tx: (limits_of(tx, who.tenant, service.config.limits), files.storage_of(tx, who.tenant))
    )
    coming = declared_bytes(request) or 0
    try:
        if coming > limits.file_bytes + FRAME_BYTES:
            raise too_large("file", limits.file_bytes)
        admit(limits, kept, max(0, coming - FRAME_BYTES))
        check_disk(service.scratch, coming)
    except ApiError:
        await drain(request)
        raise
    async with received(request, "file", limits.file_bytes, service.scratch, _check_field) as form:
        life = life_of(form.fields.get(ANCHOR), form.fields.get(SECONDS))
        if "purpose" not in form.fields:
            raise ApiError(400, "purpose is missing", code="missing_required_parameter", param="purpose")
        purpose, filename = form.fields["purpose"], kept_name(form.filename)
        sent = sent_as(request, body_hash(json.dumps([form.digest, filename, purpose, life]).encode()))
        file = await run_in_threadpool(_keep, service, who.tenant, form, purpose, filename, life, sent)
    return file_object(file)


@router.get("/files")
def page(
    service: Shared,
    who: Reader,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    after: str | None = None,
    order: files.Order = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    found, more = service.db.read(lambda tx: files.page(tx, who.tenant, limit, after, order, purpose))
    return page_object(found, more, file_object)


@router.post("/files/import")
def bring_in(who: DataOwner) -> None:
    """Azure's import from a URL: not offered, so that the service fetches nothing that its tenants name."""
    raise bad_request("files are not imported from URLs; send the file itself to POST /files, or in parts to POST /uploads",
                      code="unsupported")  # fmt: skip


@router.get("/files/{file_id}")
def retrieve(file_id: str, service: Shared, who: Reader) -> dict[str, Any]:
    return file_object(_found(service, file_id, who.tenant))


@router.delete("/files/{file_id}")
def delete(request: Request, file_id: str, service: Shared, who: DataOwner) -> dict[str, Any]:
    """Delete a file that no job or batch in progress needs. A deletion whose answer was lost is answered again."""
    is_retry = sent_as(request, "").retry_count > 0

    def work(tx: Transaction) -> None:
        if is_retry and files.was_deleted(tx, file_id, who.tenant):
            return
        if files.find(tx, file_id, who.tenant) is None:
            raise not_found("file", file_id, "file_id")
        user = files.user_of(tx, file_id, who.tenant)
        if user is not None:
            raise bad_request(f"the file is needed by {user}, which has not ended; cancel it first", "file_id", "file_in_use")
        files.delete(tx, file_id, who.tenant, service.clock())

    service.db.write("delete file", work)
    return {"id": file_id, "object": "file", "deleted": True}


_BYTES = {"application/octet-stream": {"schema": BINARY}, "text/plain": {"schema": {"type": "string", "format": "byte"}}}
_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file; results in base64 unless encoding=raw.", "content": _BYTES},
    206: {"description": "The range that was asked for.", "content": _BYTES},
    416: {"description": "The range lies outside the file."},
}


@router.get("/files/{file_id}/content", response_class=StreamingResponse, responses=_CONTENT)
def content(request: Request, file_id: str, service: Shared, who: Reader, encoding: Encoding | None = None) -> Response:
    """Stream a file, whole or a range of it; results in base64 where clients written for OpenAI expect it."""
    file = _found(service, file_id, who.tenant)
    headers = {"content-disposition": content_disposition(file.filename)}
    if encoding_of(file, encoding, service.config.results_encoding, dialect_of(request)) == "base64":
        headers["content-length"] = str(-(-file.bytes // 3) * 4)
        return StreamingResponse(_base64(_begun(service.blobs.read(file.blob))), headers=headers, media_type="text/plain")
    start, end = _range(request.headers.get("range"), file.bytes)
    headers |= {"accept-ranges": "bytes", "content-length": str(end - start)}
    status = 200
    if end - start < file.bytes:
        status = 206
        headers["content-range"] = f"bytes {start}-{end - 1}/{file.bytes}"
    pieces = _begun(service.blobs.read(file.blob, start, end - start))
    return StreamingResponse(pieces, status, headers, media_type="application/octet-stream")


@router.get("/files/{file_id}/x_report")
def report(file_id: str, service: Shared, who: Reader) -> Response:
    """Answer all that the judgement found, line by line; before it is done, that it is not."""
    file = _found(service, file_id, who.tenant)
    if file.purpose not in JUDGED:
        raise bad_request(f"files for {file.purpose} are not judged; those for fine-tune and batch are", "file_id", "no_report")
    if file.report is None:
        nothing: dict[str, Any] = {"format": None, "rows": None, "problems": [], "problems_total": 0, "warnings": []}
        return JSONResponse({"file": file.id, "status": file.status, **nothing})
    found = json.loads(b"".join(service.blobs.read(file.report)))
    return JSONResponse({**found, "file": file.id})


def file_object(file: File) -> dict[str, Any]:
    """Return a file as the wire shows it."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at),
        "expires_at": None if file.expires_at is None else int(file.expires_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": file.status,
        "status_details": file.status_details,
    }


def _keep(service: Service, tenant: str, form: Received, purpose: str, filename: str, life: int | None, sent: Sent) -> File:
    """Judge what came if it is small, put it into the store and record it, unless this is an upload sent again."""
    now = service.clock()
    file = drafted(service, tenant, form, purpose, filename, None if life is None else now + life, now)

    def work(tx: Transaction) -> File | None:
        def make() -> str:
            admit(limits_of(tx, tenant, service.config.limits), files.storage_of(tx, tenant), file.bytes)
            files.add(tx, file)
            return file.id

        file_id, _ = retries.accept(tx, tenant, "/files", sent, now, service.new_id, make)
        return files.find(tx, file_id, tenant)

    kept = once(lambda: service.db.write("add file", work))
    if kept is None:
        raise bad_request("this upload was accepted before, and its file is deleted by now; send it as a new one", "file")
    return kept


def drafted(
    service: Service, tenant: str, form: Received, purpose: str, filename: str, expires_at: float | None, now: float
) -> File:
    """Return the record of a file that came, with its blobs in the store; who calls writes it."""
    file_id = service.new_id("file-")
    findings = None
    if purpose in JUDGED and form.bytes <= AT_ONCE_BYTES:
        findings = judge(form.path, purpose, max_rows=AT_ONCE_ROWS)
    with disk_errors():
        blob = service.blobs.take(tenant, form.path, form.digest)
        if findings is None:
            status: files.FileStatus = "uploaded" if purpose in JUDGED else "processed"
            return File(file_id, tenant, now, purpose, filename, form.bytes, blob, status, expires_at)
        told = service.blobs.put_bytes(tenant, findings.report(file_id))
    return File(
        file_id, tenant, now, purpose, filename, form.bytes, blob, findings.status, expires_at,
        status_details=findings.details, facts=findings.facts, report=told,
    )  # fmt: skip


def check_purpose(purpose: str) -> None:
    if purpose not in PURPOSES:
        raise bad_request(f"purpose must be one of {', '.join(PURPOSES)}, got {purpose[:60]!r}", "purpose")


def life_of(anchor: str | None, seconds: str | None) -> int | None:
    """Return for how many seconds a file is kept; None for ever. Raises ApiError."""
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise bad_request("expires_after.anchor must be 'created_at'", ANCHOR)
    number = int(seconds) if seconds is not None and re.fullmatch(r"\d{1,9}", seconds, re.ASCII) else 0
    if not MIN_LIFE_S <= number <= MAX_LIFE_S:
        raise bad_request(f"expires_after.seconds must be a whole number from {MIN_LIFE_S:,} to {MAX_LIFE_S:,}", SECONDS)
    return number


def encoding_of(file: File, asked: Encoding | None, configured: Encoding, dialect: Dialect) -> Encoding:
    """Return how a file's content is sent: as asked for; else tables of results as configured in OpenAI's dialect, all else raw."""
    if asked is not None:
        return asked
    is_table = file.purpose == RESULTS and file.filename.endswith(".csv")
    return configured if is_table and dialect == "openai" else "raw"


def _check_field(name: str, value: str) -> None:
    if name == "purpose":
        check_purpose(value)
    elif name not in (ANCHOR, SECONDS):
        raise ApiError(400, f"unknown field {name[:60]!r}; a form has file, purpose, {ANCHOR} and {SECONDS}",
                       code="unknown_parameter", param=name[:60])  # fmt: skip


def _found(service: Service, file_id: str, tenant: str) -> File:
    file = service.db.read(lambda tx: files.find(tx, file_id, tenant))
    if file is None:
        raise not_found("file", file_id, "file_id")
    return file


def _range(header: str | None, size: int) -> tuple[int, int]:
    """Return where the part that is asked for begins and has ended. Several parts at once are answered by the whole."""
    found = _RANGE.fullmatch(header or "")
    if found is None or not (found[1] or found[2]):
        return 0, size
    if not found[1]:
        return max(0, size - int(found[2])), size
    start, end = int(found[1]), min(size, int(found[2]) + 1 if found[2] else size)
    if start >= size or end <= start:
        raise ApiError(416, f"the file has {size:,} bytes; that range lies outside", code="invalid_range",
                       headers={"content-range": f"bytes */{size}"})  # fmt: skip
    return start, end


def _begun(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Return the same pieces, with the first already there: what fails at the start is an error's answer, not a torn one."""
    first = next(pieces, b"")
    return chain((first,), pieces)


def _base64(pieces: Iterator[bytes]) -> Iterator[bytes]:
    left = b""
    for piece in pieces:
        left += piece
        whole = len(left) - len(left) % 3
        yield base64.b64encode(left[:whole])
        left = left[whole:]
    yield base64.b64encode(left)
