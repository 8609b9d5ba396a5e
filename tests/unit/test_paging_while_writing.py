"""Lists read page by page while rows come and go: what was there all the time is there once, in one order."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest

from kivnun.jobs import batches, files, models, tuning
from kivnun.jobs.database import Database, Transaction
from kivnun.jobs.files import Order
from kivnun.jobs.ids import new_id
from service_parts import fill

JOB = tuning.Job(id="ftjob-0", tenant="default", created_at=1.0, model="toy", base="toy", training_file="file-1", method={}, seed=1)
FILE = files.File("", "default", 1.0, "batch", "a", 1, "default/" + "0" * 64, "processed")
BATCH = batches.Batch("", "default", 1.0, "/v1/completions", "key_1", "file-1", "24h")
MODEL = models.Model("", "default", 1.0, JOB.id, "toy", 1, "default/" + "0" * 64, "hash")
KEPT, CHURN = 30, 120


@dataclass
class Listed:
    """A list: how a row comes, how one goes (None: it never does), and how it is read."""

    add: Callable[[Transaction, str, float], object]
    page: Callable[[Transaction, str | None], tuple[list[Any], bool]]
    remove: Callable[[Transaction, str], object] | None = None
    id_of: Callable[[Any], str] = field(default=lambda row: row.id)


def _file(tx: Transaction, name: str, at: float) -> None:
    files.add(tx, replace(FILE, id=name, created_at=at))


def _delete_file(tx: Transaction, name: str) -> None:
    files.delete(tx, name, "default", 9.0)


def _batch(tx: Transaction, name: str, at: float) -> None:
    batches.create(tx, replace(BATCH, id=name, created_at=at))


def _job(tx: Transaction, name: str, at: float) -> None:
    tuning.create(tx, replace(JOB, id=name, created_at=at, metadata={"of": "mine"}), new_id)


def _model(tx: Transaction, name: str, at: float) -> None:
    models.add(tx, replace(MODEL, id=name, created_at=at))


def _checkpoint(tx: Transaction, name: str, at: float) -> None:
    models.add(tx, replace(MODEL, id=name, step=int(at * 1000), checkpoint=name))


def _delete_model(tx: Transaction, name: str) -> None:
    models.delete(tx, name, "default", 9.0)


def _event(tx: Transaction, name: str, at: float) -> None:
    tuning.append_event(tx, JOB.id, at, name, new_id)


def _files(order: Order) -> Listed:
    return Listed(_file, lambda tx, after: files.page(tx, "default", 4, after, order), _delete_file)


LISTS = {
    "files": _files("desc"),
    "files, oldest first": _files("asc"),
    "batches": Listed(_batch, lambda tx, after: batches.page(tx, "default", 4, after)),
    "jobs": Listed(_job, lambda tx, after: tuning.page(tx, "default", 4, after)),
    "jobs by metadata": Listed(_job, lambda tx, after: tuning.page(tx, "default", 4, after, {"of": "mine"})),
    "models": Listed(_model, lambda tx, after: models.page(tx, "default", 4, after), _delete_model),
    "checkpoints": Listed(_checkpoint, lambda tx, after: models.checkpoints_page(tx, JOB.id, "default", 4, after), _delete_model),
    "events": Listed(_event, lambda tx, after: tuning.events_page(tx, JOB.id, 4, after)),
}


@pytest.fixture
def db(db_url: str) -> Iterator[Database]:
    database = Database(db_url)
    fill(database)
    database.write("job", lambda tx: tuning.create(tx, JOB, new_id))
    yield database
    database.close()


@pytest.mark.parametrize("name", LISTS)
def test_what_was_there_all_the_time_is_listed_once_and_in_one_order(db: Database, name: str) -> None:
    listed, pick = LISTS[name], random.Random(name)
    at = iter(pick.sample(range(1000, 9000), KEPT + CHURN))

    def moment() -> float:  # old and new ones alike, some at the same moment: clocks differ between processes
        return next(at) / 1000 if "checkpoints" in name else pick.randrange(1, 40) / 4

    def add(row: str) -> None:
        when = moment()
        db.write("add", lambda tx: listed.add(tx, row, when))

    for n in range(KEPT):
        add(f"kept-{n:03}")
    kept = {listed.id_of(row) for row in _all(db, listed)}
    assert len(kept) >= KEPT
    begun, stop = threading.Event(), threading.Event()
    came: list[str] = []

    def churn() -> None:
        for n in range(CHURN):
            if stop.is_set():
                return
            add(f"churn-{n:03}")
            came.append(f"churn-{n:03}")
            if listed.remove is not None and n % 3:
                gone = came.pop(pick.randrange(len(came)))
                db.write("remove", lambda tx, gone=gone: cast("Any", listed.remove)(tx, gone))
            begun.set()

    writer = threading.Thread(target=churn)
    writer.start()
    begun.wait(10)
    try:
        rounds = 0
        while rounds < 2 or (writer.is_alive() and rounds < 12):
            found = [listed.id_of(row) for row in _all(db, listed)]
            assert len(found) == len(set(found)), "a row came twice"
            assert kept <= set(found), "a row that was there all the time was missed"
            rounds += 1
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize("name", LISTS)
def test_a_row_that_is_deleted_after_its_page_still_marks_its_place(db: Database, name: str) -> None:
    listed = LISTS[name]
    for n in range(9):
        db.write("add", lambda tx, n=n: listed.add(tx, f"row-{n}", float(n + 2)))
    whole = [listed.id_of(row) for row in _all(db, listed)]
    first, more = db.read(lambda tx: listed.page(tx, None))
    assert more
    last = listed.id_of(first[-1])
    if listed.remove is not None:
        db.write("remove", lambda tx: cast("Any", listed.remove)(tx, last))
    rest = [listed.id_of(row) for row in _all(db, listed, last)]
    assert [listed.id_of(row) for row in first] + rest == whole


def _all(db: Database, listed: Listed, after: str | None = None) -> list[Any]:
    """Read a list to its end, page by page, each in a transaction of its own."""
    found: list[Any] = []
    while True:
        page, more = db.read(lambda tx, after=after: listed.page(tx, after))
        found += page
        assert page or not more
        if not more:
            return found
        after = listed.id_of(page[-1])
