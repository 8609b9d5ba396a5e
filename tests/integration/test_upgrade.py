"""An upgrade in place: a job that an earlier version trained half of is finished by a later one, to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from kivnun.jobs.database import Database
from kivnun.jobs.errors import SchemaError
from kivnun.jobs.migrate import MIGRATIONS, prepare
from kivnun.jobs.toy import ToySpec
from later_version import later_version
from toy_jobs import adapter_bytes, assert_whole, job_of, queue_job, toy_place, until, work_here, worker_thread


def test_a_job_trained_half_before_an_upgrade_is_finished_after_it_to_the_same_bits(empty_db_url: str, tmp_path: Path) -> None:
    db = Database(empty_db_url)
    prepare(db)
    place = toy_place(tmp_path / "data", empty_db_url)
    alone = queue_job(place, spec=ToySpec(seed=3, epochs=12, batch_rows=4))
    work_here(place)
    job_id = queue_job(place, spec=ToySpec(seed=3, epochs=12, batch_rows=4, step_ms=30))
    with worker_thread(place):
        until(lambda: job_of(db, job_id).step >= 10)
    half = job_of(db, job_id)
    assert half.status == "queued", "the worker handed it over"
    assert 10 <= half.step < 36

    assert prepare(db, later_version(tmp_path / "later"))
    with pytest.raises(SchemaError):
        prepare(db, MIGRATIONS)
    work_here(place)
    assert_whole(place, db, job_id)
    assert adapter_bytes(place, db, job_id) == adapter_bytes(place, db, alone)
    db.close()
