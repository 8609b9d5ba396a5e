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
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from kivnun.jobs import webhooks
from kivnun.jobs.webhooks import Delivery, Endpoint
from kivnun.service.context import Service
from kivnun.service.outward import Outward, RefusedAddress, Unreachable

AT_ONCE = 24  # deliveries, of all tenants
AT_ONCE_A_TENANT = 6  # an endpoint has one at most, in the order of their times
EVENTS_AT_ONCE = 100


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


class DeliverWebhooks:
    """Makes deliveries of events and sends those that are due, each endpoint's one after the other."""

    name = "webhooks"

    def __init__(self, service: Service, outward: Outward | None = None) -> None:
        self._service = service
        self._outward = outward or Outward(service.config.webhook_hosts)
        self._pool = ThreadPoolExecutor(AT_ONCE, "webhook")
        self._lock = threading.Lock()
        self._busy: dict[str, str] = {}  # endpoint: its tenant
        self._failure: Exception | None = None

    def turn(self) -> bool:
        self._raise_failure()
        service, now = self._service, self._service.clock()
        told = 0
        if service.db.read(webhooks.has_untold):
            told = service.db.write("fan out", lambda tx: webhooks.fan_out(tx, now, service.new_id, EVENTS_AT_ONCE))
        with self._lock:
            busy = dict(self._busy)
        # More than can be sent at once are looked at, so that one tenant's many do not hide another's.
        for delivery, endpoint in service.db.read(lambda tx: webhooks.due(tx, now, busy, 20 * AT_ONCE)):
            self._start(delivery, endpoint)
        return told == EVENTS_AT_ONCE

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

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
            return False, error.message
        return 200 <= answer.status < 300, f"HTTP status {answer.status}"

    def _raise_failure(self) -> None:
        with self._lock:
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
