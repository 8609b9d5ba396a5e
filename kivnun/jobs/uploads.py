"""Uploads: files that come in parts, put together when their owner says in which order. Every function is part of one transaction.

Next: `files.py`, `service/api/uploads.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import sqlalchemy as sa

from kivnun.jobs.database import Transaction
from kivnun.jobs.schema import upload_parts, uploads

UploadStatus = Literal["pending", "completed", "cancelled", "expired"]

LIFE_S = 3600.0  # of an upload that is not completed
MAX_PART_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Upload:
    """A row of `uploads`. `bytes` is what was declared; `file` the id of the file it became."""

    id: str
    tenant: str
    created_at: float
    expires_at: float
    purpose: str
    filename: str
    mime_type: str
    bytes: int
    status: UploadStatus = "pending"
    file: str | None = None
    file_expires_after: int | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """A row of `upload_parts`."""

    id: str
    upload: str
    created_at: float
    bytes: int
    blob: str


def add(tx: Transaction, upload: Upload) -> None:
    """Record an upload that has no parts yet."""
    tx.execute(sa.insert(uploads).values(**{column.name: getattr(upload, column.name) for column in fields(Upload)}))


def find(tx: Transaction, upload_id: str, tenant: str) -> Upload | None:
    """Return an upload; None where it is another tenant's or not there."""
    row = tx.execute(sa.select(uploads).where(uploads.c.id == upload_id, uploads.c.tenant == tenant)).mappings().one_or_none()
    return None if row is None else Upload(**row)


def add_part(tx: Transaction, part: Part) -> None:
    """Record a part whose blob is in the store."""
    tx.execute(sa.insert(upload_parts).values(**{column.name: getattr(part, column.name) for column in fields(Part)}))


def parts_of(tx: Transaction, upload_id: str) -> dict[str, Part]:
    """Return an upload's parts by id, the oldest first."""
    query = sa.select(upload_parts).where(upload_parts.c.upload == upload_id)
    rows = tx.execute(query.order_by(upload_parts.c.created_at, upload_parts.c.id)).mappings()
    return {row["id"]: Part(**row) for row in rows}


def end(tx: Transaction, upload: Upload, status: UploadStatus, file: str | None = None) -> None:
    """End an upload that is pending. Its parts' rows go: what they name belongs to the file now, or to nobody."""
    ended = sa.update(uploads).where(uploads.c.id == upload.id, uploads.c.tenant == upload.tenant, uploads.c.status == "pending")
    tx.execute(ended.values(status=status, file=file))
    tx.execute(sa.delete(upload_parts).where(upload_parts.c.upload == upload.id))


def expired(tx: Transaction, now: float, limit: int) -> Sequence[Upload]:
    """Return uploads of all tenants whose time is over."""
    query = sa.select(uploads).where(uploads.c.status == "pending", uploads.c.expires_at <= now)
    return [Upload(**row) for row in tx.execute(query.order_by(uploads.c.expires_at).limit(limit)).mappings()]
