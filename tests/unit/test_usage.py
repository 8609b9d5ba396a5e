"""Usage on both databases: sums that are exact, training once per job, nothing of another tenant."""

from __future__ import annotations

import threading
from fractions import Fraction

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from kivnun.jobs import usage
from kivnun.jobs.database import Database, Transaction
from kivnun.jobs.schema import usage as table

DAY = 20_000 * usage.DAY_S


def _record(
    db: Database, kind: usage.Kind, tokens: int, at: float, *, tenant: str = "default", model: str = "m", price: float = 2.0,
    job: str | None = None,
) -> bool:  # fmt: skip
    return db.write("usage", lambda tx: usage.record(tx, tenant, kind, "base", model, tokens, price, at, api_key="key_1", job=job))


def _rows(db: Database) -> int:
    return db.read(lambda tx: tx.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


def test_answers_of_one_hour_are_one_row_and_another_hour_model_or_price_is_another(db: Database) -> None:
    for second in range(5):
        assert _record(db, "prompt", 3, DAY + second)
    assert _rows(db) == 1
    _record(db, "prompt", 3, DAY + 3600)
    _record(db, "prompt", 3, DAY, model="n")
    _record(db, "prompt", 3, DAY, price=4.0)
    _record(db, "completion", 3, DAY)
    assert _rows(db) == 5
    assert db.read(lambda tx: usage.summary(tx, "default", DAY, DAY + 7200)) == [
        usage.Used(None, "prompt", 24, 30 + 6 + 6 + 12), usage.Used(None, "completion", 3, 6)
    ]  # fmt: skip


def test_training_is_recorded_once_per_job_however_often_its_end_is_written(db: Database) -> None:
    assert _record(db, "training", 1000, DAY, job="ftjob-1")
    assert not _record(db, "training", 1000, DAY + 9999, job="ftjob-1", price=7.0)
    assert _record(db, "training", 500, DAY, job="ftjob-2")
    (total,) = db.read(lambda tx: usage.summary(tx, "default", 0, DAY + 99_999))
    assert (total.tokens, total.cost_micros) == (1500, 3000)


def test_many_threads_lose_no_token(db: Database) -> None:
    threads = [threading.Thread(target=lambda: [_record(db, "completion", 7, DAY) for _ in range(10)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (total,) = db.read(lambda tx: usage.summary(tx, "default", DAY, DAY + 1))
    assert (total.tokens, total.cost_micros) == (280, 560)


def test_sums_are_a_tenant_s_own_and_group_by_day_model_or_kind(db: Database) -> None:
    _record(db, "prompt", 10, DAY)
    _record(db, "prompt", 20, DAY + 5 * 3600, model="n")
    _record(db, "completion", 40, DAY + usage.DAY_S)
    _record(db, "prompt", 999, DAY, tenant="other")

    def grouped(by: usage.Grouping) -> list[tuple[object, str, int]]:
        found = db.read(lambda tx: usage.summary(tx, "default", DAY, DAY + 2 * usage.DAY_S, by))
        return [(used.group, used.kind, used.tokens) for used in found]

    assert grouped("day") == [(DAY, "prompt", 30), (DAY + usage.DAY_S, "completion", 40)]
    assert grouped("model") == [("m", "prompt", 10), ("m", "completion", 40), ("n", "prompt", 20)]
    assert grouped("kind") == [("completion", "completion", 40), ("prompt", "prompt", 30)]
    assert db.read(lambda tx: usage.summary(tx, "default", DAY + 3600, DAY + 7200)) == []
    assert db.read(lambda tx: usage.total_tokens(tx)) == {"prompt": 1029, "completion": 40}


@given(tokens=st.integers(0, 10**15), price=st.floats(0, 10_000, allow_nan=False).map(lambda value: round(value, 6)))
def test_a_cost_is_exact_to_half_a_millionth(tokens: int, price: float) -> None:
    exact = tokens * Fraction(repr(price))
    assert abs(usage.cost_micros(tokens, price) - exact) <= Fraction(1, 2)


def test_half_a_millionth_is_rounded_up() -> None:
    assert [usage.cost_micros(n, 0.5) for n in (0, 1, 2, 3)] == [0, 1, 1, 2]
    assert usage.cost_micros(3, 0.1) == 0  # as 0.3, not as the binary fraction nearest to 0.1


def test_a_failed_transaction_leaves_no_usage(db: Database) -> None:
    def half(tx: Transaction) -> None:
        usage.record(tx, "default", "prompt", "base", "m", 5, 1.0, DAY)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        db.write("usage", half)
    assert _rows(db) == 0
