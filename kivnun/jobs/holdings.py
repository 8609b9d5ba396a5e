"""What a tenant has at a moment, to be held against its limits. Next: `config.py` (the limits), `files.py`."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from kivnun.jobs.database import Transaction
from kivnun.jobs.files import storage_of
from kivnun.jobs.schema import jobs
from kivnun.jobs.states import ACTIVE
from kivnun.jobs.tuning import num_waiting


@dataclass(frozen=True, slots=True)
class Holdings:
    """Counts; `storage_bytes` are those of its files and of the parts of unfinished uploads."""

    active_jobs: int
    waiting_jobs: int
    files: int
    storage_bytes: int


def holdings_of(tx: Transaction, tenant: str) -> Holdings:
    """Return what a tenant has."""
    running = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.tenant == tenant, jobs.c.status.in_(ACTIVE))
    stored = storage_of(tx, tenant)
    return Holdings(tx.execute(running).scalar_one(), num_waiting(tx, tenant), stored.files, stored.bytes)
