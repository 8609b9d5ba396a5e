"""The durable core on both databases: whole transactions, events without gaps, leases that a stale holder cannot write under."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError

from kivnun.jobs import leases, tuning
from kivnun.jobs.database import Database
from kivnun.jobs.errors import DatabaseDown, StaleLease
from kivnun.jobs.ids import new_id

JOB = tuning.Job(id="ftjob-1", tenant="default", created_at=1.0, model="toy", base="toy", training_file="file-1", method={}, seed=1)


def test_events_written_by_many_threads_have_numbers_without_gaps(db: Database) -> None:
    db.write("create", lambda tx: tuning.create(tx, JOB, new_id))

    def write() -> None:
        for _ in range(10):
            db.write("event", lambda tx: tuning.append_event(tx, JOB.id, 2.0, "said", new_id))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events, more = db.read(lambda tx: tuning.events_page(tx, JOB.id, 100))
    assert [event.number for event in events] == list(range(41, 0, -1))
    assert not more


def test_a_transaction_that_raises_leaves_nothing(db: Database) -> None:
    def half(tx: tuning.Transaction) -> None:
        tuning.create(tx, JOB, new_id)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        db.write("create", half)
    assert db.read(lambda tx: tuning.find(tx, JOB.id)) is None


def test_what_only_reads_can_write_nothing_and_what_follows_it_can(db: Database) -> None:
    for _ in range(3):
        with pytest.raises(DBAPIError, match=r"read-?only"):
            db.read(lambda tx: tuning.create(tx, JOB, new_id))
        assert db.read(lambda tx: tuning.find(tx, JOB.id)) is None
    db.write("create", lambda tx: tuning.create(tx, JOB, new_id))
    with pytest.raises(DBAPIError, match=r"read-?only"):
        db.read(lambda tx: tuning.update(tx, JOB.id, step=1))
    with db.engine.begin() as connection:  # as migrations do
        tuning.update(connection, JOB.id, step=2)
    found = db.read(lambda tx: tuning.find(tx, JOB.id))
    assert found is not None
    assert found.step == 2


def test_a_database_without_a_free_connection_does_not_answer(db_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kivnun.jobs.database.FREE_S", 0.05)
    db = Database(db_url)
    with ExitStack() as held:
        for _ in range(64 if db.is_sqlite else 16):
            held.enter_context(db.engine.connect())
        with pytest.raises(DatabaseDown) as refused:
            db.read(lambda tx: tx.execute(sa.select(1)).scalar())
        assert refused.value.hint
    assert db.read(lambda tx: tx.execute(sa.select(1)).scalar()) == 1
    db.close()


def test_a_postgresql_that_is_cut_off_is_given_up_within_seconds(postgres: str) -> None:
    db = Database(postgres)
    with db.engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        told = driver.info.get_parameters()
        assert int(told["tcp_user_timeout"]) <= 15_000
        asked = int(told["keepalives_idle"]) + int(told["keepalives_interval"]) * int(told["keepalives_count"])
        assert told["keepalives"] == "1"
        assert asked <= 15
        assert connection.exec_driver_sql("show statement_timeout").scalar() == "1min"
    db.close()


def test_one_of_many_claims_of_a_lease_succeeds(db: Database) -> None:
    got: list[leases.Lease | None] = []
    threads = [
        threading.Thread(target=lambda name=str(n): got.append(db.write("claim", lambda tx: leases.claim(tx, "job:1", name))))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [lease for lease in got if lease] == [leases.Lease("job:1", 1)]
    assert len(got) == 8


def test_a_holder_whose_beat_stands_still_for_a_term_loses_the_lease_and_can_write_nothing(db: Database) -> None:
    now = [0.0]
    watcher = leases.Watcher(lambda: now[0], term_s=10.0)
    first = db.write("claim", lambda tx: leases.claim(tx, "job:1", "first"))
    assert first is not None
    seen = db.read(lambda tx: leases.look(tx, ["job:1"]))["job:1"]
    assert not watcher.is_dead(seen)
    now[0] = 9.0
    assert not watcher.is_dead(seen)
    db.write("beat", lambda tx: leases.beat(tx, first))
    beaten = db.read(lambda tx: leases.look(tx, ["job:1"]))["job:1"]
    now[0] = 15.0
    assert not watcher.is_dead(beaten)
    now[0] = 25.0
    assert watcher.is_dead(beaten)
    assert db.write("claim", lambda tx: leases.claim(tx, "job:1", "second", seen)) is None, "it has beaten since it was seen"
    second = db.write("claim", lambda tx: leases.claim(tx, "job:1", "second", beaten))
    assert second is not None
    assert second == leases.Lease("job:1", 2)
    for write in (leases.beat, leases.check, leases.release):
        with pytest.raises(StaleLease):
            db.write("late", lambda tx, write=write: write(tx, first))
    db.write("release", lambda tx: leases.release(tx, second))
    assert db.write("claim", lambda tx: leases.claim(tx, "job:1", "third")) == leases.Lease("job:1", 3)


def test_jobs_are_paged_newest_first_within_a_tenant_and_by_metadata(db: Database) -> None:
    for n in range(5):
        job = replace(JOB, id=f"ftjob-{n}", created_at=float(n // 2), metadata={"odd": str(n % 2)} if n else None)
        db.write("create", lambda tx, job=job: tuning.create(tx, job, new_id))
    db.write("create", lambda tx: tuning.create(tx, replace(JOB, id="ftjob-x", tenant="other"), new_id))
    first, more = db.read(lambda tx: tuning.page(tx, "default", 3))
    rest, end = db.read(lambda tx: tuning.page(tx, "default", 3, first[-1].id))
    assert [job.id for job in first + rest] == ["ftjob-4", "ftjob-3", "ftjob-2", "ftjob-1", "ftjob-0"]
    assert (more, end) == (True, False)
    odd, _ = db.read(lambda tx: tuning.page(tx, "default", 10, None, {"odd": "1"}))
    none, _ = db.read(lambda tx: tuning.page(tx, "default", 10, None, {}))
    assert ([job.id for job in odd], [job.id for job in none]) == (["ftjob-3", "ftjob-1"], ["ftjob-0"])
    assert db.read(lambda tx: tuning.page(tx, "default", 3, "ftjob-x")) == ([], False)


HELD: list[dict[str, str] | None] = [
    {"a": "1"}, {"a": "1", "b": "2"}, {"a": "2"}, {"a": ""}, {"b": "1"}, {"": ""}, {"$.a": "1"}, {'"': "'"}, {"a.b[0]": "%"},
    {'a"b\\': "\\u0041\\"}, {"שלום": "🦆"}, {"a": "null"}, {"a": "1.0"}, {"a": "true"}, {"a": "{}"}, {}, None,
]  # fmt: skip
WANTED = [*(held for held in HELD if held is not None), {"a": "1", "c": "3"}, {"a": "\0"}, {"a": "\ud800"}, {"A": "1"}, {"_": "1"}]


def test_metadata_is_filtered_in_the_database_as_python_compares_it(db: Database) -> None:
    for n, held in enumerate(HELD):
        job = replace(JOB, id=f"ftjob-{n:02}", created_at=float(n), metadata=held)
        db.write("create", lambda tx, job=job: tuning.create(tx, job, new_id))
    for wanted in WANTED:
        found, more = db.read(lambda tx, wanted=wanted: tuning.page(tx, "default", 100, None, wanted))
        alike = [wanted.items() <= (held or {}).items() if wanted else not held for held in HELD]
        assert [int(job.id[-2:]) for job in reversed(found)] == [n for n, is_alike in enumerate(alike) if is_alike], wanted
        assert not more


def test_a_page_by_metadata_takes_no_more_rows_from_the_database_than_it_shows(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(60):
        job = replace(JOB, id=f"ftjob-{n:02}", created_at=float(n), metadata={"of": "few" if n in (3, 31, 57) else "many"})
        db.write("create", lambda tx, job=job: tuning.create(tx, job, new_id))
    made: list[str] = []
    whole = tuning.Job
    monkeypatch.setattr(tuning, "Job", lambda **row: made.append(row["id"]) or whole(**row))
    statements: list[str] = []
    event.listen(db.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))

    def page(limit: int, wanted: dict[str, str], after: str | None = None) -> tuple[list[str], bool]:
        found, more = db.read(lambda tx: tuning.page(tx, "default", limit, after, wanted))
        return [job.id for job in found], more

    assert page(2, {"of": "few"}) == (["ftjob-57", "ftjob-31"], True)
    assert len(made) == 3
    assert len([one for one in statements if "FROM jobs" in one]) == 1
    assert page(2, {"of": "few"}, "ftjob-31") == (["ftjob-03"], False)
    assert page(5, {"of": "none"}) == ([], False)
    assert len(made) == 5, "and the one that marks the place"


def test_an_error_of_the_database_tells_nothing_of_what_rows_hold(db: Database) -> None:
    job = replace(JOB, suffix="canaryXq7")
    db.write("create", lambda tx: tuning.create(tx, job, new_id))
    with pytest.raises(IntegrityError) as failed:
        db.write("create", lambda tx: tuning.create(tx, job, new_id))
    assert "canaryXq7" not in str(failed.value)
