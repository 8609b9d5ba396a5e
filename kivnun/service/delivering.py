"""The duty that delivers webhooks: signed as Standard Webhooks says, at least once, to each endpoint independently of the others.

A crash between an answer and its record sends the event again, under the same `webhook-id`: receivers keep the ids they have
seen. Whatever is not 2xx, redirects too, is tried again later. Next: `kivnun/jobs/webhooks.py`, `outward.py`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kivnun.jobs import webhooks
from kivnun.jobs.webhooks import Delivery, Endpoint
from kivnun.service.context import Service
from kivnun.service.outward import Outward, RefusedAddress, Unreachable

AT_ONCE = 24  # deliveries, of all tenants
AT_ONCE_A_TENANT = 6  # an endpoint has one at most, in the order of their times
LONGEST_REST_S = 300.0  # of an endpoint that fails
EVENTS_AT_ONCE = 100
PRUNED_AT_ONCE = 500
PRUNE_EVERY_S = 3600.0


def body_of(event_id: str, type: str, created_at: float, data: Mapping[str, object]) -> bytes:
    """Return an event as it is sent: the same bytes at every attempt."""
    event = {"id": event_id, "object": "event", "created_at": int(created_at), "type": type, "data": dict(data)}
    return json.dumps(event, separators=(",", ":")).encode()


def signed(event_id: str, body: bytes, secrets: Sequence[str], now: float) -> dict[str, str]:
    """Return the headers that let a receiver check who sent a body and when: one signature for each secret."""
    at = str(int(now))
    told = b".".join((event_id.encode(), at.encode(), body))
    keys = [base64.b64decode(secret.removeprefix("whsec_")) for secret in secrets]
    signatures = [base64.b64encode(hmac.new(key, told, hashlib.sha256).digest()).decode() for key in keys]
    return {
        "Content-Type": "application/json",
        "webhook-id": event_id,
        "webhook-timestamp": at,
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


@dataclass(frozen=True, slots=True)
class _Rest:
    """An endpoint that failed so often in a row is left alone until then."""

    failures: int
    until: float


class DeliverWebhooks:
    """Makes deliveries of events and sends those that are due, each endpoint's one after the other.

    An endpoint that fails rests as a whole, so that many events on their way to it cost no more than one."""

    name = "webhooks"

    def __init__(self, service: Service, outward: Outward | None = None, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._service, self._monotonic = service, monotonic
        self._outward = outward or Outward(service.config.webhook_hosts)
        self._pool = ThreadPoolExecutor(AT_ONCE, "webhook")
        self._lock = threading.Lock()
        self._busy: dict[str, str] = {}  # endpoint: its tenant
        self._rests: dict[str, _Rest] = {}
        self._failure: Exception | None = None
        self._next_prune = monotonic()

    def turn(self) -> bool:
        self._raise_failure()
        service, now = self._service, self._service.clock()
        told = 0
        if service.db.read(webhooks.has_untold):
            told = service.db.write("fan out", lambda tx: webhooks.fan_out(tx, now, service.new_id, EVENTS_AT_ONCE))
        left_alone = self._left_alone(now)
        if left_alone is not None:
            for delivery, endpoint in service.db.read(
                lambda tx: webhooks.due(tx, now, left_alone, AT_ONCE_A_TENANT, AT_ONCE * AT_ONCE_A_TENANT)
            ):
                self._start(delivery, endpoint)
        return told == EVENTS_AT_ONCE or self._prune(now)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _left_alone(self, now: float) -> set[str] | None:
        """Return the endpoints that are being sent to or that rest; None where there is room for no other."""
        with self._lock:
            if len(self._busy) >= AT_ONCE:
                return None
            resting = {endpoint for endpoint, rest in self._rests.items() if now < rest.until <= now + LONGEST_REST_S}
            return resting | set(self._busy)

    def _start(self, delivery: Delivery, endpoint: Endpoint) -> None:
        with self._lock:
            if len(self._busy) >= AT_ONCE or Counter(self._busy.values())[endpoint.tenant] >= AT_ONCE_A_TENANT:
                return
            self._busy[endpoint.id] = endpoint.tenant
        self._pool.submit(self._deliver, delivery, endpoint)

    def _deliver(self, delivery: Delivery, endpoint: Endpoint) -> None:
        service = self._service
        try:
            delivered, answer = self._send(delivery, endpoint)
            now = service.clock()
            self._let_rest(endpoint, delivered, now)
            service.db.write("settle", lambda tx: webhooks.settle(tx, delivery, delivered=delivered, answer=answer, now=now))
        except Exception as error:  # of the record: the next turn raises it, and the clerk waits before there is another
            with self._lock:
                self._failure = error
        finally:
            with self._lock:
                del self._busy[endpoint.id]

    def _send(self, delivery: Delivery, endpoint: Endpoint) -> tuple[bool, str]:
        """Return whether an endpoint took a delivery, and what it answered or why it did not."""
        body = body_of(delivery.event, delivery.event_type, delivery.event_created_at, delivery.event_data)
        now = self._service.clock()
        try:
            answer = self._outward.send("POST", endpoint.url, signed(delivery.event, body, endpoint.valid_secrets(now), now), body)
        except (RefusedAddress, Unreachable) as error:
            return False, str(error)
        return 200 <= answer.status < 300, f"HTTP status {answer.status}"

    def _let_rest(self, endpoint: Endpoint, delivered: bool, now: float) -> None:
        with self._lock:
            before = self._rests.pop(endpoint.id, None)
            if not delivered:
                failures = 1 if before is None else before.failures + 1
                self._rests[endpoint.id] = _Rest(failures, now + min(LONGEST_REST_S, webhooks.delay_s(failures)))

    def _prune(self, now: float) -> bool:
        """From time to time forget what is long over; return whether there may be more of it."""
        if self._monotonic() < self._next_prune:
            return False
        living = self._service.db.read(webhooks.living_endpoints)
        with self._lock:
            self._rests = {endpoint: rest for endpoint, rest in self._rests.items() if endpoint in living}
        pruned = self._service.db.write("prune", lambda tx: webhooks.prune(tx, now - webhooks.KEPT_S, PRUNED_AT_ONCE))
        if pruned < PRUNED_AT_ONCE:
            self._next_prune = self._monotonic() + PRUNE_EVERY_S
        return pruned == PRUNED_AT_ONCE

    def _raise_failure(self) -> None:
        with self._lock:
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
