"""The clerk: its duties are done by one clerk at a time, outlive their own failures, and are taken over from one that died."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from kivnun.jobs import leases
from kivnun.jobs.database import Database
from kivnun.jobs.errors import DatabaseDown, StaleLease
from kivnun.jobs.place import Place
from kivnun.jobs.schema import tenants
from kivnun.service import clerk
from kivnun.service.context import Service
from kivnun.service.logs import JsonLines
from service_parts import place

TERM_S = 0.4


@pytest.fixture
def at(tmp_path: Path, db_url: str) -> Place:
    return place(tmp_path, db_url)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("IDLE_S", 0.005), ("STANDBY_S", 0.02), ("BEAT_S", 0.05), ("FIRST_BACK_OFF_S", 0.005)):
        monkeypatch.setattr(clerk, name, value)


@contextmanager
def running(at: Place, makers: Mapping[str, clerk.Maker]) -> Iterator[threading.Event]:
    stop = threading.Event()
    thread = threading.Thread(target=clerk.run, args=(at, stop), kwargs={"makers": makers, "term_s": TERM_S}, daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(10)
        assert not thread.is_alive()


def eventually(is_so: Callable[[], object], within_s: float = 10.0) -> None:
    until = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < until, "it did not come to be"
        time.sleep(0.005)


class Counting:
    """A duty that notes its turns and writes a number that only rises."""

    name = "counting"

    def __init__(self, service: Service, turns: list[str], who: str) -> None:
        self._db, self._turns, self._who = service.db, turns, who
        self.closed = False

    def turn(self) -> bool:
        self._db.write("count", lambda tx: tx.execute(sa.update(tenants).values(served=tenants.c.served + 1)))
        self._turns.append(self._who)
        return False


def test_two_clerks_never_do_one_duty_at_the_same_time_and_the_second_takes_over_at_once(at: Place) -> None:
    turns: list[str] = []
    with running(at, {"counting": lambda service: Counting(service, turns, "first")}) as stop:
        eventually(lambda: len(turns) > 2)
        with running(at, {"counting": lambda service: Counting(service, turns, "second")}):
            time.sleep(2 * TERM_S)  # more than a term: the first beats, so it is not taken for dead
            assert set(turns) == {"first"}
            stop.set()
            eventually(lambda: "second" in turns)
    assert turns.index("second") == turns.count("first"), "never turn about"


def test_a_lease_left_by_a_clerk_that_died_is_taken_after_its_term(at: Place) -> None:
    db = at.database()
    assert db.write("claim", lambda tx: leases.claim(tx, "duty:counting", "the dead one")) is not None
    turns: list[str] = []
    began = time.monotonic()
    with running(at, {"counting": lambda service: Counting(service, turns, "heir")}):
        eventually(lambda: turns)
        assert time.monotonic() - began >= TERM_S
    held = db.read(lambda tx: leases.look(tx, ["duty:counting"]))["duty:counting"]
    assert (held.epoch, held.owner) == (2, None), "given back at the end"
    db.close()


def test_a_duty_whose_lease_was_lost_can_write_nothing_and_is_closed(at: Place) -> None:
    made: list[Asleep] = []
    wake = threading.Event()

    class Asleep:
        name = "counting"

        def __init__(self, service: Service) -> None:
            self.service, self.outcome, self.closed = service, "", False
            made.append(self)

        def turn(self) -> bool:
            if len(made) > 1:
                return False
            assert wake.wait(10)
            try:
                self.service.db.write("late", lambda tx: tx.execute(sa.update(tenants).values(served=99.0)))
            except StaleLease as error:
                self.outcome = error.code
                raise
            return False

        def close(self) -> None:
            self.closed = True

    db = at.database()
    with running(at, {"counting": Asleep}):
        eventually(lambda: made)
        thief = Database(at.db_url)
        seen = thief.read(lambda tx: leases.look(tx, ["duty:counting"]))["duty:counting"]
        eventually(lambda: thief.write("steal", lambda tx: _stolen(tx)))
        assert seen.epoch == 1
        wake.set()
        eventually(lambda: made[0].closed)
        thief.close()
    assert made[0].outcome == "stale_lease"
    assert set(db.read(lambda tx: tx.execute(sa.select(tenants.c.served)).scalars().all())) == {0.0}
    db.close()


def _stolen(tx: sa.Connection) -> bool:
    seen = leases.look(tx, ["duty:counting"])["duty:counting"]
    return leases.claim(tx, "duty:counting", "thief", seen) is not None


def test_a_duty_outlives_its_failures_and_their_texts_stay_out_of_the_log(at: Place, caplog: pytest.LogCaptureFixture) -> None:
    turns: list[int] = []

    class Stumbling:
        name = "stumbling"

        def __init__(self, service: Service) -> None:
            self._service = service

        def turn(self) -> bool:
            turns.append(1)
            if len(turns) == 1:
                raise ValueError("CANARY: a row of somebody's file")
            if len(turns) == 2:
                raise DatabaseDown("the database does not answer", hint="see its log")
            return False

    with caplog.at_level(logging.INFO), running(at, {"stumbling": Stumbling}):
        eventually(lambda: len(turns) > 3)
    failed, waits = [json.loads(JsonLines().format(record)) for record in caplog.records]
    assert (failed["action"], failed["duty"], failed["error"]["type"]) == ("duty_failed", "stumbling", "builtins.ValueError")
    assert (waits["action"], waits["duty"]) == ("duty_waits", "stumbling")
    assert "CANARY" not in str((failed, waits))


def test_a_duty_that_cannot_be_made_holds_up_no_other(at: Place) -> None:
    turns: list[str] = []

    def broken(_service: Service) -> clerk.Duty:
        raise RuntimeError("no")

    with running(at, {"broken": broken, "counting": lambda service: Counting(service, turns, "good")}):
        eventually(lambda: len(turns) > 2)


def test_a_duty_that_hangs_at_the_end_loses_its_lease_and_can_write_nothing_more(at: Place) -> None:
    hangs, free, late = threading.Event(), threading.Event(), Future[object]()

    class Hanging(Counting):
        def turn(self) -> bool:
            hangs.set()
            free.wait(60)
            try:
                late.set_result(super().turn())
            except StaleLease as error:
                late.set_exception(error)
            return False

    turns: list[str] = []
    dbs: list[Database] = []
    stop = threading.Event()
    makers = {
        "hanging": lambda service: (dbs.append(service.db), Hanging(service, turns, "one"))[1],
        "other": lambda service: Counting(service, [], "one"),
    }
    thread = threading.Thread(target=clerk.run, args=(at, stop), kwargs={"makers": makers, "drain_s": 0.4}, daemon=True)
    thread.start()
    assert hangs.wait(10)
    began = time.monotonic()
    stop.set()
    thread.join(10)
    assert time.monotonic() - began < 2
    db = at.database()
    assert {seen.owner for seen in db.read(lambda tx: leases.look(tx, ["duty:hanging", "duty:other"])).values()} == {None}
    free.set()
    with pytest.raises(StaleLease):
        late.result(10)
    assert turns == []
    for one in (db, *dbs):
        one.close()
