"""A wall clock that jumps by a day ends, forgets and locks out nothing; one that stays there is believed in the end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kivnun.jobs import files, leases, uploads
from kivnun.jobs.database import Database, Transaction
from kivnun.jobs.files import File
from kivnun.jobs.ids import new_id
from kivnun.jobs.retries import RETRIED_WITHIN_S, Sent, accept
from kivnun.jobs.uploads import Upload
from kivnun.service.context import Service
from kivnun.service.errors import ApiError
from kivnun.service.settled import JUMP_S, SETTLE_S, SettledClock
from kivnun.service.sweeping import Sweep
from service_parts import fill, place, service_at

DAY_S = 86_400.0


@dataclass
class Clocks:
    """A wall clock that the test turns, and a steady one that only goes on."""

    wall: float = 1e9
    steady: float = 50.0

    def pass_by(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds

    def settled(self) -> SettledClock:
        return SettledClock(lambda: self.wall, lambda: self.steady)


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_a_jump_shows_once_it_has_held_and_one_that_is_undone_never_does(jump_s: float) -> None:
    clocks = Clocks()
    clock = clocks.settled()
    assert (clock(), clock.over()) == (clocks.wall, -math.inf), "nothing to compare with yet"
    clocks.pass_by(SETTLE_S)
    assert clock() == clock.over() == clocks.wall
    for _ in range(3):
        clocks.wall += jump_s
        clocks.pass_by(SETTLE_S - 1)
        assert (clock(), clock.over()) == (clocks.wall - jump_s, -math.inf)
        clocks.wall -= jump_s
        assert clock() == clock.over() == clocks.wall
    clocks.wall += jump_s
    clock()
    clocks.pass_by(SETTLE_S)
    assert clock() == clock.over() == clocks.wall


def test_two_jumps_that_disagree_confirm_nothing_and_two_looks_far_apart_are_two() -> None:
    clocks = Clocks()
    clock = clocks.settled()
    clock()
    clocks.pass_by(2 * SETTLE_S)
    clock()
    clocks.pass_by(100 * SETTLE_S)
    for jump_s in (DAY_S, DAY_S, -3 * DAY_S):
        clocks.wall += jump_s
        clocks.pass_by(SETTLE_S + 1)
        assert clock.over() == -math.inf, "each was seen once"
    clocks.pass_by(SETTLE_S)
    assert clock.over() == clocks.wall


def test_a_clock_that_is_set_just_after_the_start_is_taken_at_once_and_must_settle() -> None:
    clocks = Clocks(wall=0.0)
    clock = clocks.settled()
    clock()
    clocks.pass_by(5)
    clocks.wall += 1e9
    assert (clock(), clock.over()) == (clocks.wall, -math.inf)
    clocks.pass_by(SETTLE_S - 1)
    assert clock.over() == -math.inf
    clocks.pass_by(1)
    assert clock.over() == clocks.wall


@given(st.lists(st.tuples(st.floats(0, 2 * SETTLE_S), st.sampled_from([0.0, 0.0, 1.0, -1.0, DAY_S, -DAY_S])), max_size=60))
def test_a_time_is_certain_only_by_a_clock_that_stood_there_a_while_ago(steps: list[tuple[float, float]]) -> None:
    clocks = Clocks()
    clock = clocks.settled()
    looks: list[tuple[float, float]] = []
    for seconds, jump_s in steps:
        clocks.pass_by(seconds)
        clocks.wall += jump_s
        over = clock.over()
        looks.append((clocks.steady, clocks.wall))
        if over == -math.inf:
            continue
        assert over == pytest.approx(clocks.wall)
        ahead = clocks.wall - clocks.steady
        alike = [steady for steady, wall in looks if abs(wall - steady - ahead) <= 2 * JUMP_S]
        assert clocks.steady - alike[0] >= SETTLE_S, "the clock stood there a while ago already"


@dataclass
class World:
    service: Service
    clocks: Clocks
    sweep: Sweep = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.sweep = Sweep(self.service, lambda: self.clocks.steady)

    def left(self) -> tuple[bool, str]:
        """Return whether the file is there, and the upload's status."""
        self.sweep.turn()
        db = self.service.db
        upload = db.read(lambda tx: uploads.find(tx, "upload_1", "default"))
        assert upload is not None
        return db.read(lambda tx: files.find(tx, "file-1", "default")) is not None, upload.status


@pytest.fixture
def world(tmp_path: Path, db_url: str) -> Iterator[World]:
    clocks = Clocks()
    service = replace(service_at(place(tmp_path, db_url)), clock=lambda: clocks.wall)
    ends = clocks.wall + 3600
    file = File("file-1", "default", clocks.wall, "user_data", "a", 1, "default/" + "0" * 64, "processed", expires_at=ends)
    service.db.write("file", lambda tx: files.add(tx, file))
    service.db.write("upload", lambda tx: uploads.add(tx, Upload("upload_1", "default", 1.0, ends, "batch", "a", "b", 4)))
    yield World(service, clocks)
    service.db.close()


def test_files_and_uploads_outlive_a_jump_and_end_when_their_time_has_come(world: World) -> None:
    there, gone = (True, "pending"), (False, "expired")
    assert world.left() == there
    world.clocks.pass_by(SETTLE_S)
    assert world.left() == there
    world.clocks.wall += DAY_S
    assert world.left() == there
    world.restart()
    assert world.left() == there, "a clerk that starts within the jump knows no better, and waits"
    world.clocks.wall -= DAY_S
    assert world.left() == there
    world.clocks.pass_by(3600 - SETTLE_S - 1)
    assert world.left() == there
    world.clocks.pass_by(1)
    assert world.left() == gone


def test_a_clock_that_was_wrong_before_ends_what_is_over_once_it_has_settled(world: World) -> None:
    world.left()
    world.clocks.pass_by(SETTLE_S)
    world.clocks.wall += DAY_S
    world.left()
    world.clocks.pass_by(SETTLE_S - 1)
    assert world.left() == (True, "pending")
    world.clocks.pass_by(1)
    assert world.left() == (False, "expired")


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_a_retry_across_a_jump_finds_its_object_by_key_and_by_count(db_url: str, jump_s: float) -> None:
    db, clocks = Database(db_url), Clocks()
    fill(db)
    clock = clocks.settled()

    def send(name: str, retry: int = 0, key: str | None = None) -> str:
        def work(tx: Transaction) -> tuple[str, bool]:
            return accept(tx, "default", "jobs", Sent(key, "body", retry), clock(), new_id, lambda: name)

        return db.write("create", work)[0]

    clock()
    clocks.pass_by(SETTLE_S)
    assert (send("keyed", key="k"), send("counted")) == ("keyed", "counted")
    clocks.wall += jump_s
    clocks.pass_by(1)
    assert send("of another wish") == "of another wish", "a new create, which forgets old keys"
    assert send("twice", key="k") == "keyed"
    assert send("twice", retry=1) == "of another wish"
    assert send("twice", retry=1) == "counted"
    clocks.wall -= jump_s
    assert send("twice", key="k") == "keyed"
    assert send("twice", retry=2) == "of another wish", "what was made within the jump is found after it"
    clocks.pass_by(RETRIED_WITHIN_S + 1)
    assert send("new", retry=2) == "new"
    db.close()


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_limits_and_leases_do_not_hear_of_the_wall_clock(
    tmp_path: Path, db_url: str, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    service = service_at(place(tmp_path, db_url))
    db, watcher = service.db, leases.Watcher(time.monotonic, leases.TERM_S)

    @dataclass
    class Payer:
        tenant: str = "default"
        limits = service.config.limits.model_copy(update={"requests_per_minute": 1})

    lease = db.write("claim", lambda tx: leases.claim(tx, "job:1", "holder"))
    assert lease is not None

    def is_dead() -> bool:
        return watcher.is_dead(db.read(lambda tx: leases.look(tx, ["job:1"]))["job:1"])

    assert not is_dead()
    service.limits.take_request(Payer())
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    assert not is_dead()
    db.write("beat", lambda tx: leases.beat(tx, lease))
    with pytest.raises(ApiError) as refused:
        service.limits.take_request(Payer())
    assert 0 < float(refused.value.headers["retry-after"]) <= 60, "neither let through nor locked out for a day"
    assert db.write("claim", lambda tx: leases.claim(tx, "job:1", "other")) is None
    db.close()
