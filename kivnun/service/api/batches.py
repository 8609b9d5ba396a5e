"""Batches: a file of questions, answered within a day, the answers in a file. Next: `kivnun/service/batching.py`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from kivnun.jobs import batches, files
from kivnun.jobs.batches import Batch
from kivnun.jobs.retries import KeyReused, accept
from kivnun.service.auth import Caller, Chatter, Reader
from kivnun.service.batch_files import ENDPOINTS, canonical
from kivnun.service.context import Shared
from kivnun.service.dialect import dialect_of
from kivnun.service.errors import ApiError, bad_request, not_found
from kivnun.service.paging import PageLimit, page_object
from kivnun.service.sent import Received, key_reused

router = APIRouter()

MAX_OPEN = 100  # of a tenant
_STATUSES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")

Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Metadata = dict[
    Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00]*$")],
    Annotated[str, StringConstraints(max_length=512, pattern=r"^[^\x00]*$")],
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ExpiresAfter(_Body):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class NewBatch(_Body):
    input_file_id: Id
    endpoint: str
    completion_window: Literal["24h"]
    metadata: Annotated[Metadata, Field(max_length=16)] | None = None
    output_expires_after: ExpiresAfter | None = None


@router.post("/batches")
def create_batch(request: Request, body: NewBatch, came: Received, who: Chatter, service: Shared) -> dict[str, Any]:
    """Ask for the answers to a file of requests. It is answered at once, and validated afterwards."""
    if canonical(body.endpoint) is None:
        raise bad_request(f"endpoint must be one of {', '.join(ENDPOINTS)}", "endpoint", "invalid_endpoint")
    now = service.clock()
    after = None if body.output_expires_after is None else body.output_expires_after.seconds
    made = Batch(
        service.new_id("batch_"), who.tenant, now, body.endpoint, who.key.id, body.input_file_id, body.completion_window,
        body.metadata, after, dialect=dialect_of(request),
    )  # fmt: skip

    def make(tx: batches.Transaction) -> str:
        file = files.find(tx, body.input_file_id, who.tenant)
        if file is None:
            raise bad_request(f"there is no file {body.input_file_id!r}", "input_file_id", "invalid_file")
        if file.purpose != "batch":
            raise bad_request(f"the file's purpose must be 'batch', got {file.purpose!r}", "input_file_id", "invalid_file_purpose")
        if batches.num_open(tx, who.tenant) >= MAX_OPEN:
            raise ApiError(
                429, f"{MAX_OPEN} batches have not ended yet; wait for one or cancel one", code="exceeded_active_batch_limit",
                headers={"x-should-retry": "false"},
            )  # fmt: skip
        batches.create(tx, made)
        return made.id

    def create(tx: batches.Transaction) -> Batch:
        batch_id, _ = accept(tx, who.tenant, "batches", came.sent, now, service.new_id, lambda: make(tx))
        return _found(tx, batch_id, who)

    try:
        return _shown(service.db.write("create batch", create))
    except KeyReused:
        raise key_reused() from None


@router.get("/batches")
def list_batches(who: Reader, service: Shared, limit: PageLimit = 20, after: str | None = None) -> dict[str, Any]:
    """List batches, newest first."""
    found, more = service.db.read(lambda tx: batches.page(tx, who.tenant, limit, after if after is None else _id(after)))
    return page_object(found, more, _shown)


@router.get("/batches/{batch_id}")
def retrieve_batch(batch_id: str, who: Reader, service: Shared) -> dict[str, Any]:
    """Show a batch."""
    return _shown(service.db.read(lambda tx: _found(tx, batch_id, who)))


@router.post("/batches/{batch_id}/cancel")
def cancel_batch(batch_id: str, who: Chatter, service: Shared) -> dict[str, Any]:
    """End a batch early. What was answered by then is in its output file."""

    def cancel(tx: batches.Transaction) -> Batch:
        batch = _found(tx, batch_id, who)
        cancelled = batches.cancel(tx, batch, service.clock())
        if cancelled is None:
            raise ApiError(400, f"the batch has ended: it is {batch.status}", code="batch_terminal", param="batch_id")
        return cancelled

    return _shown(service.db.write("cancel batch", cancel))


def _found(tx: batches.Transaction, batch_id: str, who: Caller) -> Batch:
    batch = batches.find(tx, _id(batch_id), who.tenant)
    if batch is None:
        raise not_found("batch", batch_id, "batch_id")
    return batch


def _id(given: str) -> str:
    """Return an id as the database may be asked for it: one with other letters is nobody's."""
    return given if given.isascii() and given.isprintable() else ""


def _shown(batch: Batch) -> dict[str, Any]:
    times = {f"{status}_at": batch.times.get(f"{status}_at") for status in _STATUSES}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": None if batch.errors is None else {"object": "list", "data": batch.errors},
        "input_file_id": batch.input_file,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file,
        "error_file_id": batch.error_file,
        "created_at": int(batch.created_at),
        "expires_at": int(batch.expires_at),
        **{name: None if time is None else int(time) for name, time in times.items()},
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "usage": None if batch.usage is None else _usage(batch.usage),
        "metadata": batch.metadata,
    }


def _usage(usage: dict[str, int]) -> dict[str, Any]:
    asked, answered = usage["prompt_tokens"], usage["completion_tokens"]
    return {
        "input_tokens": asked,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": answered,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": asked + answered,
    }
