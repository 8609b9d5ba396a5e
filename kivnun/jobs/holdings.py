"""What a tenant has at a moment, to be held against its limits. Next: `config.py` (the limits)."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from kivnun.jobs.database import Transaction
from kivnun.jobs.schema import files, jobs
from kivnun.jobs.states import ACTIVE

WAITING = ("validating_files", "queued")


@dataclass(frozen=True, slots=True)
class Holdings:
    """Counts; `storage_bytes` are those of its files."""

    active_jobs: int
    waiting_jobs: int
    files: int
    storage_bytes: int


def holdings_of(tx: Transaction, tenant: str) -> Holdings:
    """Return what a tenant has."""
    by_status = sa.select(jobs.c.status, sa.func.count()).where(jobs.c.tenant == tenant).group_by(jobs.c.status)
    counted = {row[0]: row[1] for row in tx.execute(by_status)}
    kept = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(files.c.bytes), 0))
    number, size = tx.execute(kept.where(files.c.tenant == tenant, files.c.deleted_at.is_(None))).one()
    active, waiting = (sum(counted.get(status, 0) for status in statuses) for statuses in (ACTIVE, WAITING))
    return Holdings(active, waiting, int(number), int(size))
