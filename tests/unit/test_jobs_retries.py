"""The same create sent again gives the same object: by key, and by the count of retries of clients that send none."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kivnun.jobs.database import Database, Transaction
from kivnun.jobs.ids import new_id
from kivnun.jobs.retries import KEPT_S, RETRIED_WITHIN_S, KeyReused, Sent, accept


class Creates:
    """Creates of one kind, each with a new name."""

    def __init__(self, db: Database) -> None:
        self._db, self._names = db, itertools.count(1)

    def send(
        self, body: str = "body", retry: int = 0, key: str | None = None, at: float = 0.0, tenant: str = "default"
    ) -> tuple[str, bool]:
        def work(tx: Transaction) -> tuple[str, bool]:
            return accept(tx, tenant, "jobs", Sent(key, body, retry), at, new_id, lambda: f"object-{next(self._names)}")

        return self._db.write("create", work)


@pytest.fixture
def creates(db: Database) -> Creates:
    return Creates(db)


def test_a_retry_that_is_counted_gives_the_object_of_the_lost_answer(creates: Creates) -> None:
    first, new = creates.send()
    assert new
    assert [creates.send(retry=1), creates.send(retry=2)] == [(first, False), (first, False)]


def test_three_posts_that_each_ran_into_the_stock_clients_time_out_make_one_object(creates: Creates) -> None:
    first, _ = creates.send()
    waited = 600 + 120  # its time-out, and the longest pause that it lets a server ask for
    assert [creates.send(retry=n, at=n * waited) for n in (1, 2)] == [(first, False), (first, False)]


def test_the_same_body_sent_anew_is_a_new_object(creates: Creates) -> None:
    assert creates.send()[0] != creates.send()[0]


def test_two_lost_answers_to_equal_bodies_find_an_object_each(creates: Creates) -> None:
    made = {creates.send()[0], creates.send()[0]}
    assert {creates.send(retry=1)[0], creates.send(retry=1)[0]} == made
    assert creates.send(retry=1)[1], "both are matched with the first retry: a third one is of a create that never came"


def test_a_retry_of_a_create_that_never_came_makes_it_once(creates: Creates) -> None:
    made, new = creates.send(retry=1)
    assert new
    assert creates.send(retry=2) == (made, False)


def test_a_retry_matches_neither_another_body_nor_tenant_nor_what_is_long_past(creates: Creates) -> None:
    creates.send()
    assert creates.send("other", retry=1)[1]
    assert creates.send(retry=1, tenant="other")[1]
    assert creates.send(retry=1, at=RETRIED_WITHIN_S + 1)[1]


def test_a_key_gives_its_object_for_a_day_and_refuses_another_body(creates: Creates) -> None:
    made, _ = creates.send(key="k")
    assert creates.send(key="k", at=KEPT_S - 1) == (made, False)
    assert creates.send(key="k", tenant="other")[1], "another tenant's key is another key"
    with pytest.raises(KeyReused):
        creates.send("other", key="k")
    assert creates.send(retry=1)[1], "what came with a key is found by its key alone"
    creates.send("fresh", at=KEPT_S + 1)
    assert creates.send("other", key="k", at=KEPT_S + 2)[1], "a key of yesterday is forgotten"


def test_a_create_that_fails_leaves_its_key_free(db: Database, creates: Creates) -> None:
    def failing(tx: Transaction) -> None:
        def make() -> str:
            raise RuntimeError("no room")

        accept(tx, "default", "jobs", Sent("k", "body"), 0.0, new_id, make)

    with pytest.raises(RuntimeError, match="no room"):
        db.write("create", failing)
    assert creates.send("another body", key="k")[1]


def test_fifty_threads_with_one_key_make_one_object(creates: Creates) -> None:
    together = threading.Barrier(50)

    def send(_: int) -> tuple[str, bool]:
        together.wait()
        return creates.send(key="k")

    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(send, range(50)))
    assert len({made for made, _ in found}) == 1
    assert sum(new for _, new in found) == 1
