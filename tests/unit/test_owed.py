"""Tokens of answers given while the database is away: usage is what was answered, once it is back, and never more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from kivnun.jobs.database import Database, Transaction, Work
from kivnun.jobs.errors import DatabaseDown
from kivnun.jobs.schema import usage
from kivnun.jobs.usage import Charge, Kind
from kivnun.service.context import Service
from kivnun.service.owed import Owed
from service_parts import place, service_at

PATIENT_S = 3600.0


@dataclass
class World:
    """A service whose database goes away and comes back, and whose clock the test turns."""

    service: Service
    real: Database
    away: threading.Event = field(default_factory=threading.Event)
    hour: int = 0

    def used(self) -> dict[tuple[str, Kind, int], int]:
        columns = (usage.c.model, usage.c.kind, usage.c.at, sa.func.sum(usage.c.tokens))
        rows = self.real.read(lambda tx: tx.execute(sa.select(*columns).group_by(*columns[:3])).all())
        return {(model, kind, int(at) // 3600): int(tokens) for model, kind, at, tokens in rows}


@pytest.fixture
def world(tmp_path: Path, db_url: str) -> Iterator[World]:
    service = service_at(place(tmp_path, db_url))
    made = World(service, service.db)

    def watch(point: str) -> None:
        if made.away.is_set() and point == "before answer used":
            raise DatabaseDown("the database does not answer", hint="wait")

    db = Database(db_url, watch)
    made.service = replace(service, db=db, clock=lambda: made.hour * 3600 + 59.0)
    yield made
    db.close()
    service.db.close()


def charge(tokens: int, model: str = "toy") -> Charge:
    return Charge("default", "toy", model, "key_1", (("prompt", tokens, 2.0), ("completion", 2 * tokens, 4.0)))


def test_what_was_answered_in_an_outage_is_written_with_the_next_answer_in_its_own_hour(world: World) -> None:
    owed = Owed(world.service, retry_s=PATIENT_S)
    owed.pay(charge(1))
    world.away.set()
    for tokens in (10, 20):
        owed.pay(charge(tokens))
    world.hour = 1
    owed.pay(charge(40, "other"))
    assert world.used() == {("toy", "prompt", 0): 1, ("toy", "completion", 0): 2}
    world.away.clear()
    owed.pay(charge(100))
    owed.pay(charge(1000))
    assert world.used() == {
        ("toy", "prompt", 0): 31, ("toy", "completion", 0): 62, ("other", "prompt", 1): 40, ("other", "completion", 1): 80,
        ("toy", "prompt", 1): 1100, ("toy", "completion", 1): 2200,
    }  # fmt: skip


def test_it_is_written_without_another_answer_and_by_many_threads_once(world: World) -> None:
    owed = Owed(world.service, retry_s=0.02)
    world.away.set()
    threads = [threading.Thread(target=owed.pay, args=(charge(n),)) for n in range(1, 21)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(0.05)
    assert world.used() == {}
    world.away.clear()
    _until(lambda: world.used() == {("toy", "prompt", 0): 210, ("toy", "completion", 0): 420})
    time.sleep(0.05)
    assert world.used()["toy", "prompt", 0] == 210


def test_no_more_is_kept_than_there_is_room_for_and_the_rest_is_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    owed = Owed(world.service, max_kept=4, retry_s=PATIENT_S)
    world.away.set()
    for n in range(3):
        owed.pay(charge(5, f"model-{n}"))
    owed.pay(charge(5, "model-0"))
    lost = [record.__dict__ for record in caplog.records if record.__dict__["action"] == "usage_lost"]
    told = [(one["tenant"], one.get("prompt"), one.get("completion")) for one in lost]
    assert told == [("default", 5, None), ("default", None, 10)]
    world.away.clear()
    owed.pay(charge(1, "model-1"))
    assert {key: tokens for key, tokens in world.used().items() if key[1] == "prompt"} == {
        ("model-0", "prompt", 0): 10, ("model-1", "prompt", 0): 6,
    }  # fmt: skip


def test_a_commit_whose_answer_was_lost_is_not_paid_twice(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """PostgreSQL may have made it. SQLite has no such moment: it says that it has not."""
    owed, write = Owed(world.service, retry_s=PATIENT_S), world.service.db.write
    is_sqlite = world.service.db.is_sqlite

    def broken(name: str, work: Work[None]) -> None:
        def whole(tx: Transaction) -> None:
            work(tx)
            if is_sqlite:
                raise DatabaseDown("the disk is full", hint="make room")

        write(name, whole)
        raise DatabaseDown("the connection broke", hint="wait")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.service.db, "write", broken)
        owed.pay(charge(7))
    owed.pay(charge(1))
    assert world.used() == {("toy", "prompt", 0): 8, ("toy", "completion", 0): 16}
    assert [record.__dict__["action"] for record in caplog.records] == (["usage_waits"] if is_sqlite else ["usage_lost"] * 2)


def _until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)
