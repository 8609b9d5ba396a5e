"""What `/metrics` tells, in Prometheus' format: requests as they are answered, jobs and tokens as the database has them.

No label holds a tenant, an id or a name that anybody gave. The registry is this application's own, so that two in one process do
not meet. Next: `api/health.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kivnun.jobs import usage
from kivnun.jobs.database import Database, Transaction
from kivnun.jobs.schema import jobs
from kivnun.jobs.states import STATUSES, Status

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


@dataclass(frozen=True, slots=True)
class Standing:
    """How the whole service stands: jobs by status, the oldest one's time in the queue, tokens since the beginning."""

    jobs: dict[Status, int]
    oldest_queued_at: float | None
    tokens: dict[usage.Kind, int]


class Telemetry:
    """Counts requests, and reads the rest from the database when it is asked."""

    def __init__(self, db: Database, clock: Callable[[], float]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "kivnun_requests", "Requests answered; status 0: the client hung up.", ["method", "route", "status"],
            registry=self._registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "kivnun_request_seconds", "Time to the last byte of an answer.", ["method", "route"], buckets=SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._registry.register(_Records(db, clock))

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answer. `route` is a template."""
        method = method if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format. Raises DatabaseDown."""
        return generate_latest(self._registry)


class _Records:
    """The collector of what the database knows."""

    def __init__(self, db: Database, clock: Callable[[], float]) -> None:
        self._db, self._clock = db, clock

    def describe(self) -> list[Metric]:
        return []  # else the registry would read the database to learn the names

    def collect(self) -> Iterator[Metric]:
        standing = self._db.read(read_standing)
        by_status = GaugeMetricFamily("kivnun_jobs", "Fine-tuning jobs by status.", labels=["status"])
        for status, number in standing.jobs.items():
            by_status.add_metric([status], number)
        yield by_status
        yield GaugeMetricFamily("kivnun_queue_length", "Jobs that wait for a worker.", standing.jobs["queued"])
        waited = 0.0 if standing.oldest_queued_at is None else max(0.0, self._clock() - standing.oldest_queued_at)
        yield GaugeMetricFamily("kivnun_queue_oldest_seconds", "How long the first in the queue has waited.", waited)
        tokens = CounterMetricFamily("kivnun_tokens", "Tokens trained, asked and answered.", labels=["kind"])
        for kind in usage.KINDS:
            tokens.add_metric([kind], standing.tokens.get(kind, 0))
        yield tokens


def read_standing(tx: Transaction) -> Standing:
    """Return how the service stands, over all tenants."""
    counted = {row[0]: row[1] for row in tx.execute(sa.select(jobs.c.status, sa.func.count()).group_by(jobs.c.status))}
    oldest = tx.execute(sa.select(sa.func.min(jobs.c.queued_at)).where(jobs.c.status == "queued")).scalar()
    return Standing({status: counted.get(status, 0) for status in STATUSES}, oldest, usage.total_tokens(tx))
