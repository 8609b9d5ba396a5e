"""Files of a tenant as rows: added, found, listed, judged, deleted. Every function is part of one transaction.

A row names its content by a blob. A deleted file stays as a row that nobody finds, so that jobs may still name it; its bytes are
erased by `service/sweeping.py` once no row names them. Next: `uploads.py` (files that come in parts), `blobs.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import sqlalchemy as sa

from kivnun.jobs.database import Transaction
from kivnun.jobs.schema import batches, files, jobs, upload_parts, uploads
from kivnun.jobs.states import TERMINAL

FileStatus = Literal["uploaded", "processed", "error"]
Order = Literal["asc", "desc"]

PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
"""What a client may upload files for. The service itself makes `fine-tune-results` and `batch_output`."""
JUDGED = frozenset({"batch", "fine-tune"})
"""Purposes whose files are read line by line before they count as processed."""
BATCH_TERMINAL = frozenset({"completed", "failed", "expired", "cancelled"})


@dataclass(frozen=True, slots=True)
class File:
    """A row of `files`; see the comments in `schema.py`. `facts` is what the judgement found, `report` the blob of all it says."""

    id: str
    tenant: str
    created_at: float
    purpose: str
    filename: str
    bytes: int
    blob: str
    status: FileStatus = "uploaded"
    expires_at: float | None = None
    deleted_at: float | None = None
    status_details: str | None = None
    facts: dict[str, Any] | None = None
    report: str | None = None


@dataclass(frozen=True, slots=True)
class Storage:
    """What a tenant keeps: its files, and the bytes of them and of the parts of its uploads that are not complete."""

    files: int
    bytes: int


def add(tx: Transaction, file: File) -> None:
    """Record a file whose blob is in the store."""
    tx.execute(sa.insert(files).values(**{column.name: getattr(file, column.name) for column in fields(File)}))


def find(tx: Transaction, file_id: str, tenant: str) -> File | None:
    """Return a file; None where it is another tenant's, deleted, or not there at all."""
    query = sa.select(files).where(files.c.id == file_id, files.c.tenant == tenant, files.c.deleted_at.is_(None))
    row = tx.execute(query).mappings().one_or_none()
    return None if row is None else File(**row)


def page(
    tx: Transaction,
    tenant: str,
    limit: int,
    after: str | None = None,
    order: Order = "desc",
    purpose: str | None = None,
) -> tuple[list[File], bool]:
    """Return a tenant's files, newest first (`asc`: oldest first), and whether more follow. `after` is the last one already had."""
    place = sa.tuple_(files.c.created_at, files.c.id)
    query = sa.select(files).where(files.c.tenant == tenant, files.c.deleted_at.is_(None)).limit(limit + 1)
    if purpose is not None:
        query = query.where(files.c.purpose == purpose)
    if after is not None:  # one that was deleted since still marks its place
        last = tx.execute(sa.select(files.c.created_at, files.c.id).where(files.c.id == after, files.c.tenant == tenant)).first()
        if last is None:
            return [], False
        here = sa.tuple_(sa.literal(last.created_at), sa.literal(last.id))
        query = query.where(place < here if order == "desc" else place > here)
    columns = (files.c.created_at, files.c.id)
    query = query.order_by(*(column.desc() if order == "desc" else column.asc() for column in columns))
    found = [File(**row) for row in tx.execute(query).mappings()]
    return found[:limit], len(found) > limit


def mark(
    tx: Transaction,
    file_id: str,
    tenant: str,
    status: FileStatus,
    status_details: str | None = None,
    facts: dict[str, Any] | None = None,
    report: str | None = None,
) -> None:
    """Record a judgement. One of a file that was deleted meanwhile changes nothing."""
    judged = sa.update(files).where(files.c.id == file_id, files.c.tenant == tenant, files.c.deleted_at.is_(None))
    tx.execute(judged.values(status=status, status_details=status_details, facts=facts, report=report))


def user_of(tx: Transaction, file_id: str, tenant: str) -> str | None:
    """Return the id of a job or batch that has not ended and needs the file; None where there is none."""
    job = sa.select(jobs.c.id).where(_job_needs(file_id, tenant))
    batch = sa.select(batches.c.id).where(_batch_needs(file_id, tenant))
    return tx.execute(job.limit(1)).scalar() or tx.execute(batch.limit(1)).scalar()


def _job_needs(file_id: str | sa.Column[Any], tenant: str | sa.Column[Any]) -> sa.ColumnElement[bool]:
    is_named = sa.or_(jobs.c.training_file == file_id, jobs.c.validation_file == file_id)
    return sa.and_(jobs.c.tenant == tenant, jobs.c.status.not_in(TERMINAL), is_named)


def _batch_needs(file_id: str | sa.Column[Any], tenant: str | sa.Column[Any]) -> sa.ColumnElement[bool]:
    return sa.and_(batches.c.tenant == tenant, batches.c.status.not_in(BATCH_TERMINAL), batches.c.input_file == file_id)


def delete(tx: Transaction, file_id: str, tenant: str, now: float) -> None:
    """Let nobody find a file any more, and forget its name and what was found in it. Whoever calls asks `user_of` before, in the
    same transaction."""
    gone = sa.update(files).where(files.c.id == file_id, files.c.tenant == tenant, files.c.deleted_at.is_(None))
    tx.execute(gone.values(deleted_at=now, filename="", status_details=None, facts=None))


def storage_of(tx: Transaction, tenant: str) -> Storage:
    """Return how much a tenant keeps."""
    kept = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(files.c.bytes), 0))
    count, size = tx.execute(kept.where(files.c.tenant == tenant, files.c.deleted_at.is_(None))).one()
    coming = (
        sa.select(sa.func.coalesce(sa.func.sum(upload_parts.c.bytes), 0))
        .join(uploads, uploads.c.id == upload_parts.c.upload)
        .where(uploads.c.tenant == tenant, uploads.c.status == "pending")
    )
    return Storage(int(count), int(size) + int(tx.execute(coming).scalar_one()))


def was_deleted(tx: Transaction, file_id: str, tenant: str) -> bool:
    """Return whether a tenant had such a file, and deleted it."""
    gone = sa.select(files.c.id).where(files.c.id == file_id, files.c.tenant == tenant, files.c.deleted_at.is_not(None))
    return tx.execute(gone).first() is not None


def unjudged(tx: Transaction, of_each: int, least_bytes: int = 0, below_bytes: int | None = None) -> Sequence[File]:
    """Return files that wait for their judgement and are as large as asked for: the oldest `of_each` tenant."""
    order = (files.c.created_at, files.c.id)
    place = sa.func.row_number().over(partition_by=files.c.tenant, order_by=order).label("place")
    query = sa.select(files.c.id, place).where(
        files.c.status == "uploaded", files.c.purpose.in_(JUDGED), files.c.deleted_at.is_(None), files.c.bytes >= least_bytes
    )
    if below_bytes is not None:
        query = query.where(files.c.bytes < below_bytes)
    placed = query.subquery()
    first = sa.select(files).join(placed, placed.c.id == files.c.id).where(placed.c.place <= of_each)
    return [File(**row) for row in tx.execute(first.order_by(*order)).mappings()]


def expired(tx: Transaction, now: float, limit: int) -> Sequence[File]:
    """Return files of all tenants whose time is over, but those that a job or batch needs which has not ended."""
    job = sa.exists().where(_job_needs(files.c.id, files.c.tenant))
    batch = sa.exists().where(_batch_needs(files.c.id, files.c.tenant))
    query = sa.select(files).where(files.c.expires_at <= now, files.c.deleted_at.is_(None), ~job, ~batch)
    return [File(**row) for row in tx.execute(query.order_by(files.c.expires_at).limit(limit)).mappings()]
