"""Whose job is next: fair by tokens across tenants, in the order of arrival within one.

Start-time fair queueing (Goyal, Vin, Cheng 1996). Each tenant has two marks in tokens over its weight: `began`, where its last
job began, and `served`, where that one will end. The service's own time is the furthest `began`: a tenant that was away comes back
there, so that it gains nothing by waiting and owes nothing. The next job is of the tenant that would begin first. While tenants
have jobs waiting, what each got over its weight differs by no more than the largest job, and nobody waits for ever.

`Line` is the rule alone, without a database: a worker asks it for the next job, and the API for how long a job has to wait. Next:
`running.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import sqlalchemy as sa

from kivnun.jobs.config import Limits
from kivnun.jobs.database import Transaction
from kivnun.jobs.schema import jobs, tenants
from kivnun.jobs.states import ACTIVE


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job in the line, and the tokens that are left to train."""

    id: str
    tenant: str
    tokens: int
    queued_at: float


@dataclass(frozen=True, slots=True)
class Share:
    """A tenant's part of the service: its weight, its two marks, and how many of its jobs run of how many that may."""

    weight: float = 1.0
    began: float = 0.0
    served: float = 0.0
    active: int = 0
    active_limit: int = 1

    @property
    def has_room(self) -> bool:
        return self.active < self.active_limit


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job stands: 1 is next. `tokens_ahead` are those of jobs that run or come before it, `at_once` how many jobs run: as
    many as there are workers, where others wait."""

    position: int
    tokens_ahead: int
    at_once: int = 1

    def wait(self, seconds: float | None, tokens: int | None) -> float | None:
        """Return in how many seconds a job may begin, at the speed that was foretold of itself; None where none was."""
        return None if seconds is None or not tokens else seconds / tokens * self.tokens_ahead / self.at_once


class Line:
    """The jobs that wait, and the tenants' shares. `running` are jobs that have begun, the one that ends first at the front."""

    def __init__(self, shares: Mapping[str, Share], waiting: Iterable[Waiting], running: Iterable[Waiting] = ()) -> None:
        self.shares = dict(shares)
        self._waiting: dict[str, list[Waiting]] = {}
        for job in sorted(waiting, key=lambda job: (job.queued_at, job.id)):
            self._waiting.setdefault(job.tenant, []).append(job)
        self._running = list(running)

    @property
    def now(self) -> float:
        """Return the service's time: the furthest beginning."""
        return max((share.began for share in self.shares.values()), default=0.0)

    def next(self) -> Waiting | None:
        """Return whose turn it is, None where nobody who may begin waits."""
        now = self.now
        able = [line[0] for tenant, line in self._waiting.items() if line and self.shares[tenant].has_room]
        return min(able, key=lambda job: (max(now, self.shares[job.tenant].served), job.queued_at, job.id), default=None)

    def join(self, job: Waiting) -> None:
        """Put a job at the end of its tenant's line."""
        self._waiting.setdefault(job.tenant, []).append(job)

    def begin(self, job: Waiting) -> Share:
        """Take the job out of the line; return its tenant's share as it is then."""
        share = self.shares[job.tenant]
        began = max(self.now, share.served)
        cost = max(1, job.tokens) / share.weight
        share = replace(share, began=began, served=began + cost, active=share.active + 1)
        self.shares[job.tenant] = share
        self._waiting[job.tenant].remove(job)
        self._running.append(job)
        return share

    def finish(self, job: Waiting) -> None:
        """Give the room of a job that ended to its tenant."""
        self._running.remove(job)
        share = self.shares[job.tenant]
        self.shares[job.tenant] = replace(share, active=share.active - 1)

    def place_of(self, job_id: str) -> Place | None:
        """Return where a waiting job stands, None where it does not wait. Uses the line up."""
        return next((place for job, place in self.places() if job == job_id), None)

    def places(self) -> Iterator[tuple[str, Place]]:
        """Yield the waiting jobs in the order in which they begin, and where each stands. Uses the line up."""
        ahead = sum(job.tokens for job in self._running)
        position, at_once = 0, max(1, len(self._running))
        while any(self._waiting.values()):
            job = self.next()
            if job is None:  # all who wait have as many jobs running as they may: one of these has to end
                busy = next((job for job in self._running if self._waiting.get(job.tenant)), None)
                if busy is None:
                    return
                self.finish(busy)
                continue
            position += 1
            yield job.id, Place(position, ahead, at_once)
            self.begin(job)
            ahead += job.tokens


def left_of(planned: int | None, trained: int) -> int:
    """Return the tokens that a job has yet to train."""
    return max(0, (planned or 0) - trained)


def read_line(tx: Transaction, limits: Limits) -> Line:
    """Return the line as the database has it, in two statements however many tenants there are: workers look at it all the time.

    All tenants' shares are in it: the service's time is the furthest beginning of any."""
    columns = (jobs.c.id, jobs.c.tenant, jobs.c.planned_tokens, jobs.c.trained_tokens, jobs.c.queued_at, jobs.c.status)
    rows = tx.execute(sa.select(*columns).where(jobs.c.status.in_(["queued", *ACTIVE])).order_by(jobs.c.started_at, jobs.c.id))
    waiting: list[Waiting] = []
    running: list[Waiting] = []
    for row in rows:
        job = Waiting(row.id, row.tenant, left_of(row.planned_tokens, row.trained_tokens), row.queued_at or 0.0)
        (waiting if row.status == "queued" else running).append(job)
    active = Counter(job.tenant for job in running)
    shares: dict[str, Share] = {}
    for row in tx.execute(sa.select(tenants.c.id, tenants.c.weight, tenants.c.began, tenants.c.served, tenants.c.limits)):
        limit = row.limits.get("active_jobs", limits.active_jobs)
        shares[row.id] = Share(row.weight, row.began, row.served, active[row.id], limit)
    return Line(shares, waiting, running)


def begin_next(tx: Transaction, limits: Limits) -> str | None:
    """Return the id of the job whose turn it is, and charge its tenant's share for what is left of it; None where there is none."""
    line = read_line(tx, limits)
    job = line.next()
    if job is None:
        return None
    share = line.begin(job)
    tx.execute(sa.update(tenants).where(tenants.c.id == job.tenant).values(began=share.began, served=share.served))
    return job.id


def give_back(tx: Transaction, tenant: str, tokens: int) -> None:
    """Take back from a tenant's share the tokens that a job which stopped early did not train."""
    if tokens > 0:
        tx.execute(
            sa.update(tenants).where(tenants.c.id == tenant).values(served=tenants.c.served - float(tokens) / tenants.c.weight)
        )


def position(tx: Transaction, job_id: str, limits: Limits) -> Place | None:
    """Return where a queued job stands, None where it is not queued."""
    return read_line(tx, limits).place_of(job_id)


def position_of_new(tx: Transaction, job: Waiting, limits: Limits) -> Place | None:
    """Return where a job would stand that joined the queue now."""
    line = read_line(tx, limits)
    line.join(job)
    return line.place_of(job.id)
