"""Webhook endpoints: who is told of the ends of jobs and batches, with which secret, and what could not be delivered.

A secret is shown when it is made and never again. Next: `kivnun/service/delivering.py`, `kivnun/jobs/webhooks.py`.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from kivnun.jobs import webhooks
from kivnun.jobs.retries import KeyReused, accept
from kivnun.jobs.webhooks import EVENT_TYPES, Delivery, DeliveryStatus, Endpoint, EventType
from kivnun.service.auth import Caller, Reader, Tuner
from kivnun.service.context import Service, Shared
from kivnun.service.delivering import body_of, signed
from kivnun.service.errors import ApiError, bad_request, not_found
from kivnun.service.outward import Outward, RefusedAddress, Unreachable, target_of
from kivnun.service.paging import PageLimit, page_object
from kivnun.service.sent import Received, key_reused

router = APIRouter()

MAX_ENDPOINTS = 20  # of a tenant

Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
Url = Annotated[str, StringConstraints(min_length=1, max_length=2048)]
Types = Annotated[list[EventType], Field(min_length=1, max_length=100)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NewEndpoint(_Body):
    name: Name
    url: Url
    event_types: Types


class EndpointChange(_Body):
    name: Name | None = None
    url: Url | None = None
    event_types: Types | None = None


class Rotation(_Body):
    keep_old_secret_active_for_24_hours: bool = False


class Trial(_Body):
    event_type: EventType


class Replay(_Body):
    delivery_ids: Annotated[list[str], Field(min_length=1, max_length=1000)] | None = None


@router.get("/webhook_event_types")
def list_event_types(who: Reader) -> dict[str, Any]:
    """List the types of events that can be asked for."""
    return {"object": "list", "data": list(EVENT_TYPES)}


@router.post("/webhook_endpoints")
def create_endpoint(body: NewEndpoint, came: Received, who: Tuner, service: Shared) -> dict[str, Any]:
    """Make an endpoint. The answer shows its secret, once; sent again, the create shows it until it is replaced."""
    _check_url(service, body.url)
    now = service.clock()
    made = Endpoint(
        service.new_id("whep_"), who.tenant, now, now, body.name, body.url, _once(body.event_types),
        [{"secret": webhooks.new_secret(), "until": None}],
    )  # fmt: skip

    def make(tx: webhooks.Transaction) -> str:
        if webhooks.count(tx, who.tenant) >= MAX_ENDPOINTS:
            raise bad_request(
                f"there are {MAX_ENDPOINTS} webhook endpoints already; delete one first", code="too_many_webhook_endpoints"
            )
        webhooks.create(tx, made)
        return made.id

    def create(tx: webhooks.Transaction) -> Endpoint:
        endpoint_id, _ = accept(tx, who.tenant, "webhook_endpoints", came.sent, now, service.new_id, lambda: make(tx))
        found = webhooks.find(tx, endpoint_id, who.tenant)
        if found is None:
            raise bad_request(
                f"this create made {endpoint_id}, which was deleted since; for another, send it anew without the Idempotency-Key",
                code="webhook_endpoint_deleted",
            )
        return found

    try:
        created = service.db.write("create endpoint", create)
    except KeyReused:
        raise key_reused() from None
    secret = created.secrets[0]
    return _shown(created) if secret.get("rotated") else {**_shown(created), "signing_secret": secret["secret"]}


@router.get("/webhook_endpoints")
def list_endpoints(who: Reader, service: Shared, limit: PageLimit = 20, after: str | None = None) -> dict[str, Any]:
    """List endpoints, newest first."""
    found, more = service.db.read(lambda tx: webhooks.page(tx, who.tenant, limit, _id(after)))
    return page_object(found, more, _shown)


@router.get("/webhook_endpoints/{endpoint_id}")
def retrieve_endpoint(endpoint_id: str, who: Reader, service: Shared) -> dict[str, Any]:
    """Show an endpoint, without its secret."""
    return _shown(service.db.read(lambda tx: _found(tx, endpoint_id, who)))


@router.post("/webhook_endpoints/{endpoint_id}")
def update_endpoint(endpoint_id: str, body: EndpointChange, who: Tuner, service: Shared) -> dict[str, Any]:
    """Change an endpoint's name, URL or types of events."""
    values = body.model_dump(exclude_none=True)
    if body.url is not None:
        _check_url(service, body.url)
    if body.event_types is not None:
        values["event_types"] = _once(body.event_types)
    now = service.clock()
    return _shown(
        service.db.write("update endpoint", lambda tx: webhooks.update(tx, _found(tx, endpoint_id, who), now, values)),
    )


@router.delete("/webhook_endpoints/{endpoint_id}")
def delete_endpoint(endpoint_id: str, who: Tuner, service: Shared) -> dict[str, Any]:
    """Remove an endpoint, its secrets, and whatever was on its way to it."""
    now = service.clock()
    service.db.write("delete endpoint", lambda tx: webhooks.delete(tx, _found(tx, endpoint_id, who), now))
    return {"id": endpoint_id, "object": "webhook_endpoint.deleted", "deleted": True}


@router.post("/webhook_endpoints/{endpoint_id}/rotate_secret")
def rotate_secret(endpoint_id: str, who: Tuner, service: Shared, body: Rotation | None = None) -> dict[str, Any]:
    """Give an endpoint a new secret; the answer shows it, once. The old one may sign for 24 hours more."""
    keep_old = body is not None and body.keep_old_secret_active_for_24_hours
    secret, now = webhooks.new_secret(), service.clock()
    rotated = service.db.write(
        "rotate secret", lambda tx: webhooks.rotate(tx, _found(tx, endpoint_id, who), secret, now, keep_old=keep_old)
    )
    return {**_shown(rotated), "signing_secret": secret}


@router.post("/webhook_endpoints/{endpoint_id}/test")
def test_endpoint(endpoint_id: str, body: Trial, who: Tuner, service: Shared) -> dict[str, Any]:
    """Send a sample event now, and tell what the endpoint answered."""
    endpoint, now = service.db.read(lambda tx: _found(tx, endpoint_id, who)), service.clock()
    event_id = service.new_id("evt_")
    sample = body_of(
        event_id, body.event_type, now, {"id": "batch_sample" if body.event_type.startswith("batch.") else "ftjob-sample"}
    )
    headers = signed(event_id, sample, endpoint.valid_secrets(now), now)
    try:
        answer = Outward(service.config.webhook_hosts).send("POST", endpoint.url, headers, sample)
    except (RefusedAddress, Unreachable) as error:
        raise ApiError(400, f"the endpoint could not be asked: {error}", code="webhook_unreachable", param="url") from None
    return {
        "object": "webhook_endpoint.test",
        "webhook_endpoint_id": endpoint.id,
        "event_type": body.event_type,
        "status_code": answer.status,
        "success": True,
    }


@router.get("/webhook_endpoints/{endpoint_id}/x_deliveries")
def list_deliveries(
    endpoint_id: str,
    who: Reader,
    service: Shared,
    status: DeliveryStatus | None = None,
    limit: PageLimit = 20,
    after: str | None = None,
) -> dict[str, Any]:
    """List what was sent to an endpoint, newest first; `status=dead` are those that were given up."""
    found, more = service.db.read(lambda tx: webhooks.deliveries_page(tx, _found(tx, endpoint_id, who), status, limit, _id(after)))
    return page_object(found, more, _shown_delivery)


@router.post("/webhook_endpoints/{endpoint_id}/x_replay")
def replay_deliveries(endpoint_id: str, who: Tuner, service: Shared, body: Replay | None = None) -> dict[str, Any]:
    """Send dead deliveries again: those that are named, or all of the endpoint's."""
    ids = None if body is None or body.delivery_ids is None else [given for given in body.delivery_ids if _id(given)]
    now = service.clock()
    replayed = service.db.write("replay", lambda tx: webhooks.replay(tx, _found(tx, endpoint_id, who), ids, now))
    return {"object": "webhook_endpoint.replay", "webhook_endpoint_id": endpoint_id, "delivery_ids": replayed}


def _found(tx: webhooks.Transaction, endpoint_id: str, who: Caller) -> Endpoint:
    endpoint = webhooks.find(tx, _id(endpoint_id) or "", who.tenant)
    if endpoint is None:
        raise not_found("webhook endpoint", endpoint_id, "webhook_endpoint_id")
    return endpoint


def _id(given: str | None) -> str | None:
    """Return an id as the database may be asked for it: one with other letters is nobody's."""
    return given if given is None or (given.isascii() and given.isprintable()) else ""


def _check_url(service: Service, url: str) -> None:
    try:
        target_of(url, service.config.webhook_hosts)
    except RefusedAddress as error:
        raise bad_request(str(error), "url", "invalid_webhook_url") from None


def _once(types: list[EventType]) -> list[str]:
    return list(dict.fromkeys(types))


def _shown(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "object": "webhook_endpoint",
        "created_at": int(endpoint.created_at),
        "updated_at": int(endpoint.updated_at),
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": endpoint.event_types,
        "signing_secret_hint": f"whsec_...{endpoint.secrets[0]['secret'][-4:]}",
    }


def _shown_delivery(delivery: Delivery) -> dict[str, Any]:
    return {
        "id": delivery.id,
        "object": "webhook_endpoint.delivery",
        "created_at": int(delivery.created_at),
        "event_id": delivery.event,
        "event_type": delivery.event_type,
        "data": delivery.event_data,
        "status": delivery.status,
        "attempts": delivery.attempts,
        "next_attempt_at": int(delivery.next_at) if delivery.status == "pending" else None,
        "last_answer": delivery.last_answer,
    }
