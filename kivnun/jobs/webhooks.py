"""Who is told of what: endpoints, and the deliveries that the outbox's rows become. Every function is part of one transaction.

An event is written with what happened, to the outbox; one delivery for each endpoint that asked for it is made of it, once; a
delivery is tried until it succeeds or three days are over. Then it is dead, and can be replayed. Next: `schema.py`,
`kivnun/service/delivering.py`.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import sqlalchemy as sa

from kivnun.jobs.database import Transaction
from kivnun.jobs.ids import NewId
from kivnun.jobs.schema import deliveries, outbox, webhook_endpoints

EventType = Literal[
    "batch.completed", "batch.failed", "batch.expired", "batch.cancelled",
    "fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled",
]  # fmt: skip
EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)
DeliveryStatus = Literal["pending", "delivered", "dead"]

GIVE_UP_S = 72 * 3600.0
FIRST_DELAY_S, LAST_DELAY_S = 5.0, 3 * 3600.0
OLD_SECRET_S = 24 * 3600.0
KEPT_S = 30 * 24 * 3600.0  # how long what became of an event is known


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a tenant wants to be told. `secrets` holds `{"secret", "until"}`, the newest first;
    `rotated` in one says that it was not shown when the endpoint was made."""

    id: str
    tenant: str
    created_at: float
    updated_at: float
    name: str
    url: str
    event_types: list[str]
    secrets: list[dict[str, Any]]

    def valid_secrets(self, now: float) -> list[str]:
        """Return the secrets that a receiver may still check with, the newest first."""
        return [held["secret"] for held in self.secrets if held["until"] is None or held["until"] > now]


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event on its way to one endpoint."""

    id: str
    event: str
    event_type: str
    event_created_at: float
    event_data: dict[str, Any]
    endpoint: str
    tenant: str
    created_at: float
    status: DeliveryStatus
    attempts: int
    next_at: float
    give_up_at: float
    last_answer: str | None


def new_secret() -> str:
    """Return a new signing secret, in the form of Standard Webhooks."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


# --- endpoints --------------------------------------------------------------------------------------------------------------

_ENDPOINT = [column for column in webhook_endpoints.c if column.name != "deleted_at"]


def _endpoints(tenant: str) -> sa.Select[Any]:
    return sa.select(*_ENDPOINT).where(webhook_endpoints.c.tenant == tenant, webhook_endpoints.c.deleted_at.is_(None))


def create(tx: Transaction, endpoint: Endpoint) -> None:
    tx.execute(sa.insert(webhook_endpoints).values({column.name: getattr(endpoint, column.name) for column in _ENDPOINT}))


def count(tx: Transaction, tenant: str) -> int:
    return tx.execute(sa.select(sa.func.count()).select_from(_endpoints(tenant).subquery())).scalar_one()


def find(tx: Transaction, endpoint_id: str, tenant: str) -> Endpoint | None:
    row = tx.execute(_endpoints(tenant).where(webhook_endpoints.c.id == endpoint_id)).mappings().one_or_none()
    return None if row is None else Endpoint(**row)


def page(tx: Transaction, tenant: str, limit: int, after: str | None = None) -> tuple[list[Endpoint], bool]:
    """Return a tenant's endpoints, newest first, and whether more follow."""
    at = webhook_endpoints.c
    query = _endpoints(tenant).order_by(at.created_at.desc(), at.id.desc()).limit(limit + 1)
    if after is not None:
        last = find(tx, after, tenant)
        if last is None:
            return [], False
        query = query.where(sa.tuple_(at.created_at, at.id) < sa.tuple_(sa.literal(last.created_at), sa.literal(last.id)))
    found = [Endpoint(**row) for row in tx.execute(query).mappings()]
    return found[:limit], len(found) > limit


def living_endpoints(tx: Transaction) -> set[str]:
    """Return the ids of all endpoints that were not deleted, of every tenant."""
    return set(tx.execute(sa.select(webhook_endpoints.c.id).where(webhook_endpoints.c.deleted_at.is_(None))).scalars())


def update(tx: Transaction, endpoint: Endpoint, now: float, values: Mapping[str, Any]) -> Endpoint:
    """Change an endpoint's name, URL or types; what is as it was is no change, and leaves its time alone."""
    changed = {name: value for name, value in values.items() if getattr(endpoint, name) != value}
    return _change(tx, endpoint, {**changed, "updated_at": now}) if changed else endpoint


def rotate(tx: Transaction, endpoint: Endpoint, secret: str, now: float, *, keep_old: bool) -> Endpoint:
    """Give an endpoint a new secret. `keep_old` lets those before it sign for a day more; else they end now."""
    old = endpoint.valid_secrets(now) if keep_old else []
    until = {held["secret"]: held["until"] for held in endpoint.secrets}
    kept = [{"secret": one, "until": until[one] or now + OLD_SECRET_S} for one in old]
    new = {"secret": secret, "until": None, "rotated": True}
    return _change(tx, endpoint, {"secrets": [new, *kept], "updated_at": now})


def _change(tx: Transaction, endpoint: Endpoint, values: Mapping[str, Any]) -> Endpoint:
    tx.execute(sa.update(webhook_endpoints).where(webhook_endpoints.c.id == endpoint.id).values(values))
    changed = find(tx, endpoint.id, endpoint.tenant)
    assert changed is not None
    return changed


def delete(tx: Transaction, endpoint: Endpoint, now: float) -> None:
    """Remove an endpoint: nothing more is sent to it, and its secrets are gone."""
    tx.execute(
        sa.update(webhook_endpoints).where(webhook_endpoints.c.id == endpoint.id).values(deleted_at=now, secrets=[], updated_at=now)
    )
    tx.execute(
        sa.update(deliveries)
        .where(deliveries.c.endpoint == endpoint.id, deliveries.c.status == "pending")
        .values(status="dead", last_answer="the endpoint was deleted")
    )


# --- events and deliveries --------------------------------------------------------------------------------------------------


def tell(tx: Transaction, tenant: str, type: EventType, object_id: str, now: float, new_id: NewId) -> None:
    """Write an event to the outbox, in the transaction of what it tells."""
    tx.execute(sa.insert(outbox).values(id=new_id("evt_"), tenant=tenant, created_at=now, type=type, data={"id": object_id}))


def has_untold(tx: Transaction) -> bool:
    """Return whether there is an event that has no deliveries yet."""
    return tx.execute(sa.select(outbox.c.id).where(outbox.c.fanned_out_at.is_(None)).limit(1)).first() is not None


def fan_out(tx: Transaction, now: float, new_id: NewId, limit: int) -> int:
    """Make the deliveries of the oldest events that have none yet; return how many events there were."""
    events = tx.execute(sa.select(outbox).where(outbox.c.fanned_out_at.is_(None)).order_by(outbox.c.created_at).limit(limit)).all()
    for event in events:
        endpoints = [Endpoint(**row) for row in tx.execute(_endpoints(event.tenant)).mappings()]
        made = [
            {
                "id": new_id("whdl_"), "event": event.id, "endpoint": endpoint.id, "tenant": event.tenant, "created_at": now,
                "status": "pending", "attempts": 0, "next_at": now, "give_up_at": now + GIVE_UP_S, "last_answer": None,
            }
            for endpoint in endpoints if event.type in endpoint.event_types
        ]  # fmt: skip
        if made:
            tx.execute(sa.insert(deliveries), made)
        tx.execute(sa.update(outbox).where(outbox.c.id == event.id).values(fanned_out_at=now))
    return len(events)


_DELIVERY = (
    *deliveries.c,
    outbox.c.type.label("event_type"),
    outbox.c.created_at.label("event_created_at"),
    outbox.c.data.label("event_data"),
)


def due(tx: Transaction, now: float, without: Collection[str], at_once: int, limit: int) -> list[tuple[Delivery, Endpoint]]:
    """Return the next delivery of each endpoint that has one due and is not among `without`, `at_once` of a tenant at most.

    So neither an endpoint nor a tenant hides another's. A time further away than the longest delay was set by a clock that has
    jumped since, and is due as well."""
    at = deliveries.c
    ready = (
        sa.select(at.id, at.tenant, at.next_at, _place(at.endpoint, at.next_at, at.id))
        .where(at.status == "pending", at.endpoint.not_in(list(without)), (at.next_at <= now) | (at.next_at > now + LAST_DELAY_S))
        .subquery()
    )
    first = sa.select(ready.c.id, _place(ready.c.tenant, ready.c.next_at, ready.c.id)).where(ready.c.place == 1).subquery()
    query = (
        sa.select(*_DELIVERY)
        .join(outbox, outbox.c.id == at.event)
        .join(first, first.c.id == at.id)
        .where(first.c.place <= at_once)
        .order_by(at.next_at)
        .limit(limit)
    )
    found = [Delivery(**row) for row in tx.execute(query).mappings()]
    pairs = [(delivery, find(tx, delivery.endpoint, delivery.tenant)) for delivery in found]
    return [(delivery, endpoint) for delivery, endpoint in pairs if endpoint is not None]


def _place(of: sa.ColumnElement[Any], *order: sa.ColumnElement[Any]) -> sa.Label[int]:
    return sa.func.row_number().over(partition_by=of, order_by=order).label("place")


def settle(tx: Transaction, delivery: Delivery, *, delivered: bool, answer: str, now: float) -> None:
    """Record the outcome of an attempt, unless it was recorded already: delivered, to be tried again, or dead."""
    attempts = delivery.attempts + 1
    values: dict[str, Any] = {"attempts": attempts, "last_answer": answer}
    if delivered:
        values["status"] = "delivered"
    elif now >= delivery.give_up_at:
        values["status"] = "dead"
    else:
        values["next_at"] = min(now + delay_s(attempts), delivery.give_up_at)
    at = deliveries.c
    tx.execute(
        sa.update(deliveries).where(at.id == delivery.id, at.status == "pending", at.attempts == delivery.attempts).values(values)
    )


def delay_s(attempts: int) -> float:
    """Return how long to wait after so many attempts: 5 s, doubled each time, three hours at most."""
    return min(LAST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(attempts - 1, 30))


def deliveries_page(
    tx: Transaction, endpoint: Endpoint, status: DeliveryStatus | None, limit: int, after: str | None = None
) -> tuple[list[Delivery], bool]:
    """Return an endpoint's deliveries, newest first, and whether more follow."""
    at = deliveries.c
    query = sa.select(*_DELIVERY).join(outbox, outbox.c.id == at.event).where(at.endpoint == endpoint.id)
    query = query.order_by(at.created_at.desc(), at.id.desc()).limit(limit + 1)
    if status is not None:
        query = query.where(at.status == status)
    if after is not None:
        last = tx.execute(sa.select(at.created_at, at.id).where(at.id == after, at.endpoint == endpoint.id)).one_or_none()
        if last is None:
            return [], False
        query = query.where(sa.tuple_(at.created_at, at.id) < sa.tuple_(sa.literal(last.created_at), sa.literal(last.id)))
    found = [Delivery(**row) for row in tx.execute(query).mappings()]
    return found[:limit], len(found) > limit


def replay(tx: Transaction, endpoint: Endpoint, ids: Sequence[str] | None, now: float) -> list[str]:
    """Make dead deliveries (all of the endpoint's, or those of `ids`) pending for three days more; return their ids."""
    at = deliveries.c
    query = sa.update(deliveries).where(at.endpoint == endpoint.id, at.status == "dead")
    if ids is not None:
        query = query.where(at.id.in_(list(ids)))
    values = {"status": "pending", "attempts": 0, "next_at": now, "give_up_at": now + GIVE_UP_S}
    return sorted(tx.execute(query.values(values).returning(at.id)).scalars())


def prune(tx: Transaction, before: float, limit: int) -> int:
    """Forget events that were over at a moment, and their deliveries; return how many events."""
    pending = sa.select(deliveries.c.id).where(deliveries.c.event == outbox.c.id, deliveries.c.status == "pending")
    over = sa.select(outbox.c.id).where(outbox.c.created_at < before, outbox.c.fanned_out_at < before, ~pending.exists())
    ids = list(tx.execute(over.limit(limit)).scalars())
    tx.execute(sa.delete(deliveries).where(deliveries.c.event.in_(ids)))
    tx.execute(sa.delete(outbox).where(outbox.c.id.in_(ids)))
    return len(ids)
