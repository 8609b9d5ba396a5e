"""The tables by migration: what `schema.py` says on both databases, made once by any number of starts, kept by an upgrade."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from kivnun.jobs import tuning
from kivnun.jobs.database import Database
from kivnun.jobs.errors import DatabaseDown, SchemaError
from kivnun.jobs.ids import new_id
from kivnun.jobs.migrate import differences, prepare
from kivnun.jobs.schema import metadata
from kivnun.jobs.tenants import add_tenant
from later_version import later_version

JOB = tuning.Job(id="ftjob-1", tenant="default", created_at=1.0, model="toy", base="toy", training_file="file-1", method={}, seed=1)


@pytest.fixture
def db(empty_db_url: str) -> Iterator[Database]:
    database = Database(empty_db_url)
    yield database
    database.close()


def test_the_migrations_make_what_the_schema_says(db: Database) -> None:
    assert prepare(db)
    assert differences(db) == [], "python scripts/migration.py writes what is lacking"
    assert not prepare(db), "nothing is left to do"


def test_a_difference_between_the_tables_and_the_schema_is_found(db: Database) -> None:
    prepare(db)
    with db.engine.begin() as connection:
        connection.exec_driver_sql("alter table jobs add column stranger text")
    assert "stranger" in repr(differences(db))


def test_many_processes_that_start_at_once_make_the_tables_once(empty_db_url: str) -> None:
    made: list[bool] = []

    def start() -> None:
        own = Database(empty_db_url)
        made.append(prepare(own))
        own.close()

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 5 + [True]


def test_an_upgrade_keeps_every_row_and_the_earlier_version_then_refuses_the_database(db: Database, tmp_path: Path) -> None:
    prepare(db)
    db.write("tenant", lambda tx: add_tenant(tx, "default", 1.0))
    db.write("job", lambda tx: tuning.create(tx, JOB, new_id))
    db.write("queued", lambda tx: tuning.move(tx, JOB, "queued", 2.0, new_id))
    assert prepare(db, later_version(tmp_path / "later"))
    with db.engine.connect() as connection:
        assert connection.execute(sa.text("select note from jobs")).scalar_one() == "from before"
    job = db.read(lambda tx: tuning.find(tx, JOB.id))
    assert job is not None
    assert (job.status, job.num_events) == ("queued", 1)
    with pytest.raises(SchemaError, match="later version of Kivnun: it is at revision 9999") as refused:
        prepare(db)
    assert refused.value.hint is not None


def test_an_upgrade_that_fails_half_way_leaves_the_database_as_it_was(db: Database, tmp_path: Path) -> None:
    prepare(db)
    with pytest.raises(sa.exc.DBAPIError):
        prepare(db, later_version(tmp_path / "later", more='op.execute("update nothing set a = 1")'))
    assert differences(db) == []
    assert not prepare(db)


def test_a_database_of_something_else_is_refused(db: Database) -> None:
    db.write("tables", metadata.create_all)
    with pytest.raises(SchemaError, match="tables that Kivnun's migrations did not make"):
        prepare(db)


def test_a_database_that_does_not_answer_is_told_as_such() -> None:
    nobody = Database("postgresql://kivnun@127.0.0.1:1/none")
    with pytest.raises(DatabaseDown):
        prepare(nobody)
    nobody.close()
