"""A hundred workers killed at random moments while they train for two tenants: every job ends once, with its own bytes."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from kivnun.jobs.toy import ToySpec
from toy_jobs import adapter_bytes, assert_whole, events_of, job_of, queue_job, toy_place, work_here, worker_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
KILLS = 100
JOBS = 6


def spec_of(number: int) -> ToySpec:
    return ToySpec(seed=number, epochs=2, batch_rows=1, step_ms=60.0, checkpoint_every_steps=3)


def test_a_hundred_random_kills_leave_every_adapter_as_it_was_to_be(tmp_path: Path, db_url: str) -> None:
    quiet = toy_place(tmp_path / "quiet")
    expected = [queue_job(quiet, spec=spec_of(number).model_copy(update={"step_ms": 0.0})) for number in range(JOBS)]
    work_here(quiet)
    quiet_db = quiet.database()
    place = toy_place(tmp_path / "place", db_url)
    ids: list[str] = []
    db, draw, kills = place.database(), random.Random(11), 0
    workers = [worker_process(place, term_s=0.5) for _ in range(2)]
    while kills < KILLS:
        if not ids or all(job_of(db, job).status == "succeeded" for job in ids):
            ids += [queue_job(place, ("default", "other")[number % 2], spec=spec_of(number)) for number in range(JOBS)]
        time.sleep(draw.uniform(0.3, 1.8))
        at = draw.randrange(len(workers))
        workers[at].kill()
        workers[at] = worker_process(place, term_s=0.5)
        kills += 1
    for worker in workers:
        worker.kill()
    work_here(place, term_s=0.5)
    lost = [event for job in ids for event in events_of(db, job) if event.message.startswith("Worker lost")]
    assert len(lost) >= 10, "workers were killed while they trained"
    for number, job in enumerate(ids):
        assert_whole(place, db, job)
        assert adapter_bytes(place, db, job) == adapter_bytes(quiet, quiet_db, expected[number % JOBS])
    db.close()
    quiet_db.close()
