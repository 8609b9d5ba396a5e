"""Tuned models as rows: a job's final adapter and its checkpoints, each callable by its name until its owner deletes it.

A row is written with the end of its job (or with the checkpoint's commit), so a model is either absent or whole. A deleted one
keeps its row, which no query here finds again; its blobs are swept once no other row names them. Next: `deployments.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import sqlalchemy as sa

from kivnun.jobs.database import Transaction, holds
from kivnun.jobs.schema import jobs, models
from kivnun.jobs.states import TERMINAL


@dataclass(frozen=True, slots=True)
class Model:
    """A row of `models`; see the comments in `schema.py`. `checkpoint` is None for the final model of a job."""

    id: str
    tenant: str
    created_at: float
    job: str
    base: str
    step: int
    manifest: str
    content_hash: str
    checkpoint: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    deleted_at: float | None = None


def add(tx: Transaction, model: Model) -> None:
    """Record a new model."""
    tx.execute(sa.insert(models).values(**{column.name: getattr(model, column.name) for column in fields(Model)}))


def find(tx: Transaction, model_id: str, tenant: str) -> Model | None:
    """Return a tenant's model by its name; None where there is none, or it is another's, or deleted."""
    if not holds(model_id):
        return None
    row = tx.execute(_of(tenant).where(models.c.id == model_id)).mappings().one_or_none()
    return None if row is None else Model(**row)


def page(tx: Transaction, tenant: str, limit: int | None = None, after: str | None = None) -> tuple[list[Model], bool]:
    """Return a tenant's models, newest first, and whether more follow. `after` is the name of the last one already had."""
    query = _of(tenant).order_by(models.c.created_at.desc(), models.c.id.desc())
    if after is not None:
        last = _had(tx, models.c.tenant == tenant, models.c.id == after)
        if last is None:
            return [], False
        place = sa.tuple_(sa.literal(last.created_at), sa.literal(last.id))
        query = query.where(sa.tuple_(models.c.created_at, models.c.id) < place)
    return _limited(tx, query, limit)


def checkpoints_page(tx: Transaction, job_id: str, tenant: str, limit: int, after: str | None = None) -> tuple[list[Model], bool]:
    """Return a job's checkpoints, the last one first, and whether more follow. `after` is the `checkpoint` of the last one had."""
    query = _of(tenant).where(models.c.job == job_id, models.c.checkpoint.is_not(None))
    if after is not None:
        last = _had(tx, models.c.tenant == tenant, models.c.job == job_id, models.c.checkpoint == after)
        if last is None:
            return [], False
        query = query.where(models.c.step < last.step)
    return _limited(tx, query.order_by(models.c.step.desc()), limit)


def _had(tx: Transaction, *where: sa.ColumnElement[bool]) -> Model | None:
    """Return the model that a page ended with. One that was deleted since still marks its place."""
    row = tx.execute(sa.select(models).where(*where)).mappings().one_or_none()
    return None if row is None else Model(**row)


def delete(tx: Transaction, model_id: str, tenant: str, now: float) -> bool:
    """Mark a tenant's model as deleted; return whether there was one."""
    query = sa.update(models).where(models.c.id == model_id, models.c.tenant == tenant, models.c.deleted_at.is_(None))
    return tx.execute(query.values(deleted_at=now)).rowcount > 0


def was_deleted(tx: Transaction, model_id: str, tenant: str) -> bool:
    """Return whether a tenant had such a model, and deleted it."""
    gone = sa.select(models.c.id).where(models.c.id == model_id, models.c.tenant == tenant, models.c.deleted_at.is_not(None))
    return holds(model_id) and tx.execute(gone).first() is not None


def jobs_from(tx: Transaction, model_id: str, tenant: str) -> Sequence[str]:
    """Return the ids of a tenant's unfinished jobs that continue from a model: it cannot be deleted before they end."""
    query = sa.select(jobs.c.id).where(jobs.c.tenant == tenant, jobs.c.model == model_id, jobs.c.status.not_in(TERMINAL))
    return list(tx.execute(query.order_by(jobs.c.id)).scalars())


def _of(tenant: str) -> sa.Select[Any]:
    return sa.select(models).where(models.c.tenant == tenant, models.c.deleted_at.is_(None))


def _limited(tx: Transaction, query: sa.Select[Any], limit: int | None) -> tuple[list[Model], bool]:
    found = [Model(**row) for row in tx.execute(query if limit is None else query.limit(limit + 1)).mappings()]
    return (found, False) if limit is None else (found[:limit], len(found) > limit)
