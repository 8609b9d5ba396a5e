"""The same create sent again gives the same object, for clients that say so and for those that only repeat themselves.

A client that sends `Idempotency-Key` is taken at its word. The stock `openai` client sends none, but counts its retries in
`x-stainless-retry-count`: a count above zero with the body of a create that was accepted a moment ago is that create, whose answer
was lost. A count of zero is a new wish, equal body or not. All of it is part of the create's own transaction. Next: `tuning.py`.

"A moment ago" is three quarters of an hour. That client waits ten minutes for an answer, then for as long as the server asked it to
(two minutes at most), and tries twice: its last try may come 24 minutes after the first, and a large body takes its time as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa

from kivnun.jobs.database import Transaction
from kivnun.jobs.ids import NewId
from kivnun.jobs.schema import accepted

RETRIED_WITHIN_S = 45 * 60
KEPT_S = 24 * 3600  # how long a key is known


class KeyReused(Exception):
    """An idempotency key came again with another body."""


@dataclass(frozen=True, slots=True)
class Sent:
    """How a create came: its key if it has one, the SHA-256 of its body, and the how-manieth retry the client says it is."""

    key: str | None
    body_hash: str
    retry_count: int = 0


def body_hash(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def accept(
    tx: Transaction, tenant: str, route: str, sent: Sent, now: float, new_id: NewId, make: Callable[[], str]
) -> tuple[str, bool]:
    """Return the id of the object that a create made or, the first time, makes by `make`, and whether it is new.

    Raises KeyReused."""
    known = _by_key(tx, tenant, route, sent) if sent.key is not None else _by_body(tx, tenant, route, sent, now)
    if known is not None:
        return known, False
    tx.execute(sa.delete(accepted).where(accepted.c.tenant == tenant, accepted.c.created_at < now - KEPT_S))
    made = make()
    tx.execute(
        sa.insert(accepted).values(
            id=new_id("acc_"), tenant=tenant, created_at=now, route=route, key=sent.key, body_hash=sent.body_hash,
            object_id=made, retries=sent.retry_count,
        )
    )  # fmt: skip
    return made, True


def _by_key(tx: Transaction, tenant: str, route: str, sent: Sent) -> str | None:
    of_key = (accepted.c.tenant == tenant, accepted.c.route == route, accepted.c.key == sent.key)
    row = tx.execute(sa.select(accepted).where(*of_key)).one_or_none()
    if row is None:
        return None
    if row.body_hash != sent.body_hash:
        raise KeyReused
    return row.object_id


def _by_body(tx: Transaction, tenant: str, route: str, sent: Sent, now: float) -> str | None:
    """Return the newest equal create that this count has not been matched with yet, and match it."""
    if sent.retry_count == 0:
        return None
    query = sa.select(accepted).where(
        accepted.c.tenant == tenant,
        accepted.c.route == route,
        accepted.c.body_hash == sent.body_hash,
        accepted.c.key.is_(None),
        accepted.c.retries < sent.retry_count,
        accepted.c.created_at >= now - RETRIED_WITHIN_S,
    )
    row = tx.execute(query.order_by(accepted.c.created_at.desc(), accepted.c.id.desc()).limit(1)).one_or_none()
    if row is None:
        return None
    tx.execute(sa.update(accepted).where(accepted.c.id == row.id).values(retries=sent.retry_count))
    return row.object_id
