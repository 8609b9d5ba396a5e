"""Whose turn it is: fair by tokens over weight, nobody starves, and the place told is the place it has."""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event

from kivnun.jobs import queue, running, tuning
from kivnun.jobs.config import Limits
from kivnun.jobs.database import Database, Transaction
from kivnun.jobs.ids import new_id
from kivnun.jobs.place import Place
from kivnun.jobs.queue import Line, Share, Waiting
from kivnun.jobs.schema import tenants
from kivnun.jobs.tuning import Job
from toy_jobs import job_of, queue_job, toy_place

Sizes = st.lists(st.integers(1, 500), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(
    lines=st.dictionaries(st.sampled_from("abcd"), Sizes, min_size=2),
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=4, max_size=4),
    slots=st.integers(1, 3),
)
def test_tenants_that_wait_get_the_same_over_their_weight_to_within_the_largest_job(
    lines: dict[str, list[int]], weights: list[float], slots: int
) -> None:
    weight = dict(zip("abcd", weights, strict=True))
    jobs = [Waiting(f"{tenant}{n}", tenant, size, n) for tenant, sizes in lines.items() for n, size in enumerate(sizes)]
    line = Line({tenant: Share(weight[tenant], active_limit=99) for tenant in lines}, jobs)
    left, got, running_now, order = Counter(job.tenant for job in jobs), Counter[str](), [], []
    largest = max(job.tokens / weight[job.tenant] for job in jobs)
    while (job := line.next()) is not None:
        line.begin(job)
        order.append(job)
        running_now.append(job)
        left[job.tenant] -= 1
        got[job.tenant] += job.tokens
        waiting = [tenant for tenant in lines if left[tenant] > 0]
        shares = [got[tenant] / weight[tenant] for tenant in waiting]
        if len(shares) > 1:
            assert max(shares) - min(shares) <= largest * (1 + 1e-9)
        if len(running_now) >= slots:
            line.finish(running_now.pop(0))
    assert sorted(job.id for job in order) == sorted(job.id for job in jobs), "each job begins once"
    for tenant in lines:
        own = [job.queued_at for job in order if job.tenant == tenant]
        assert own == sorted(own), "the order of arrival within a tenant"


@settings(max_examples=40, deadline=None)
@given(lines=st.dictionaries(st.sampled_from("abcd"), Sizes, min_size=1), limit=st.integers(1, 3), slots=st.integers(1, 4))
def test_the_place_that_is_told_is_the_place_in_which_it_begins(lines: dict[str, list[int]], limit: int, slots: int) -> None:
    jobs = [Waiting(f"{tenant}{n}", tenant, size, n) for tenant, sizes in lines.items() for n, size in enumerate(sizes)]
    shares = {tenant: Share(active_limit=limit) for tenant in lines}
    told = {job.id: Line(shares, jobs).place_of(job.id) for job in jobs}
    line, order = Line(shares, jobs), []
    while (job := line.next()) is not None:
        line.begin(job)
        order.append(job)
        if not line.shares[job.tenant].has_room or len(order) % slots == 0:
            line.finish(job)
    if limit > 1 or len(lines) == 1:
        return_places = {job_id: place.position for job_id, place in told.items() if place is not None}
        assert sorted(return_places.values()) == list(range(1, len(jobs) + 1))
    first = order[0]
    assert told[first.id] == queue.Place(1, 0)


def test_a_tenant_that_was_away_gains_nothing_and_owes_nothing() -> None:
    shares = {"busy": Share(began=900.0, served=1000.0, active_limit=9), "away": Share(began=0.0, served=10.0, active_limit=9)}
    jobs = [Waiting(f"b{n}", "busy", 100, n) for n in range(3)] + [Waiting(f"a{n}", "away", 100, 5 + n) for n in range(3)]
    line, order = Line(shares, jobs), []
    while (job := line.next()) is not None:
        line.begin(job)
        order.append(job.id)
    assert order == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_a_tenant_has_no_more_jobs_running_than_it_may() -> None:
    jobs = [Waiting(f"{tenant}{n}", tenant, 1, n) for tenant in ("one", "two") for n in range(3)]
    line = Line({"one": Share(active_limit=1), "two": Share(active_limit=2)}, jobs)
    begun = []
    while (job := line.next()) is not None:
        line.begin(job)
        begun.append(job)
    assert Counter(job.tenant for job in begun) == {"one": 1, "two": 2}
    line.finish(begun[0])
    following = line.next()
    assert following is not None
    assert following.tenant == begun[0].tenant


@pytest.fixture
def place(tmp_path: Path, db_url: str) -> Place:
    return toy_place(tmp_path / "place", db_url)


def test_the_database_gives_jobs_in_the_fair_order_and_tells_it_before(place: Place) -> None:
    first = [queue_job(place, id=f"ftjob-{n:024d}", queued_at=float(n), planned_tokens=100) for n in range(3)]
    other = queue_job(place, "other", id="ftjob-other", queued_at=50.0, planned_tokens=40)
    db, limits = place.database(), Limits(active_jobs=2)
    places = {job: db.read(lambda tx, j=job: queue.position(tx, j, limits)) for job in (*first, other)}
    assert [places[job] for job in (first[0], other, first[1])] == [queue.Place(1, 0), queue.Place(2, 100), queue.Place(3, 140)]
    claims = [db.write("claim", lambda tx: running.claim_next(tx, "w", limits, time.time(), new_id)) for _ in range(4)]
    assert [claim and claim.job.id for claim in claims] == [first[0], other, first[1], None], "two at once of one tenant"
    assert job_of(db, other).status == "running"
    rows = {row.id: row for row in db.read(lambda tx: tx.execute(sa.select(tenants)).all())}
    assert (rows["default"].served, rows["other"].served) == (200.0, 40.0)
    place_of_last = db.read(lambda tx: queue.position(tx, first[2], limits))
    assert place_of_last == queue.Place(1, 240, at_once=3)
    assert place_of_last is not None
    assert place_of_last.wait(60.0, 120) == 40.0, "three are trained at once"
    assert place_of_last.wait(None, 120) is None
    db.close()


def test_two_statements_read_the_line_of_any_number_of_tenants_each_with_its_own_limit_and_marks(place: Place) -> None:
    draw, db, limits = random.Random(6), place.database(), Limits(active_jobs=2)
    shares = {"default": Share(active_limit=2), "other": Share(active_limit=2)}
    waiting: list[Waiting] = []
    for numbers in (range(2), range(2, 50)):
        new = {f"t{n:02d}": drawn_share(draw) for n in numbers}
        jobs = [
            Waiting(f"ftjob-{tenant}-{at}", tenant, draw.randrange(1, 300), draw.randrange(100))
            for tenant in new
            for at in range(3)
        ]
        db.write("tenants", lambda tx, new=new, jobs=jobs: add_all(tx, new, jobs))
        shares |= new
        waiting += jobs
        with statements_of(db) as said:
            line = db.read(lambda tx: queue.read_line(tx, limits))
        assert len(said) == 2
        assert line.shares == shares
        assert list(line.places()) == list(Line(shares, waiting).places())
    db.close()


def drawn_share(draw: random.Random) -> Share:
    began = float(draw.randrange(500))
    return Share(draw.choice([0.5, 1.0, 2.0]), began, began + draw.randrange(400), active_limit=draw.choice([1, 2, 5]))


def add_all(tx: Transaction, shares: Mapping[str, Share], waiting: Iterable[Waiting]) -> None:
    """Write tenants of the configured limit of two jobs, or of limits of their own, and what they have waiting."""
    for tenant, share in shares.items():
        own = {} if share.active_limit == 2 else {"active_jobs": share.active_limit}
        marks = {"weight": share.weight, "began": share.began, "served": share.served}
        tx.execute(sa.insert(tenants).values(id=tenant, created_at=0.0, limits=own, **marks))
    for job in waiting:
        made = Job(job.id, job.tenant, 0.0, "toy", "toy", "file-1", {}, 1, status="queued", queued_at=job.queued_at,
                   planned_tokens=job.tokens)  # fmt: skip
        tuning.create(tx, made, new_id)


@contextlib.contextmanager
def statements_of(db: Database) -> Iterator[list[str]]:
    """Give the statements that are made meanwhile, but for those that begin transactions or set how they are made."""
    said: list[str] = []

    def hear(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if not statement.startswith(("BEGIN", "PRAGMA")):
            said.append(statement)

    event.listen(db.engine, "before_cursor_execute", hear)
    yield said
    event.remove(db.engine, "before_cursor_execute", hear)


def test_a_job_that_stops_early_gives_back_what_it_did_not_train(place: Place) -> None:
    job_id = queue_job(place, planned_tokens=100)
    db = place.database()
    claim = db.write("claim", lambda tx: running.claim_next(tx, "w", Limits(), time.time(), new_id))
    assert claim is not None
    db.write("step", lambda tx: tuning.update(tx, job_id, trained_tokens=30, step=3))
    db.write("back", lambda tx: running.hand_back(tx, claim.lease, job_id, {}, time.time(), new_id))
    served = db.read(lambda tx: tx.execute(sa.select(tenants.c.served).where(tenants.c.id == "default")).scalar_one())
    assert served == 30.0
    again = db.write("claim", lambda tx: running.claim_next(tx, "w", Limits(), time.time(), new_id))
    assert again is not None
    assert again.lease == replace(claim.lease, epoch=2)
    db.close()
