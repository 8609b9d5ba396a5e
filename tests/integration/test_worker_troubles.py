"""Jobs whose trainer, disk, database, store or worker is in trouble: nothing is lost, and the bytes are those of a quiet run."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from disks import small_disk
from kivnun.jobs import leases as leases_of_jobs
from kivnun.jobs import running
from kivnun.jobs.blobs import FolderBlobs
from kivnun.jobs.database import Database
from kivnun.jobs.errors import DatabaseDown, StoreDown
from kivnun.jobs.place import Place
from kivnun.jobs.schema import leases, snapshots, usage
from kivnun.jobs.toy import ToySpec
from kivnun.worker import one_job, tune_jobs
from kivnun.worker.trainer import Trainers
from toy_jobs import (
    SLOW,
    adapter_bytes,
    assert_whole,
    command,
    events_of,
    job_of,
    parent_of,
    queue_job,
    trainer_of,
    trains,
    until,
    work_here,
    worker_thread,
)


def test_a_trainer_that_does_not_heed_is_ended_when_the_worker_has_to(quick: Place, trainers: Trainers) -> None:
    job_id = queue_job(quick, spec=SLOW.model_copy(update={"ignores_stop": True, "step_ms": 400.0}))
    db = quick.database()
    with worker_thread(quick, drain_s=0.5, trainers=trainers):
        until(lambda: trains(db, job_id, 2))
    assert job_of(db, job_id).status == "queued"
    db.close()


def test_a_trainer_that_is_killed_goes_on_and_one_that_always_dies_fails_its_job(
    quick: Place, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is one whose origin is killed, from which all of a worker's trainers come."""
    monkeypatch.setattr(one_job, "KILLED_WAITS_S", (0.1, 0.1, 0.1))
    job_id = queue_job(quick, spec=SLOW.model_copy(update={"step_ms": 200.0}))  # it is looked for and killed twice meanwhile
    always = queue_job(quick, "other", spec=SLOW.model_copy(update={"dies_at_step": 5, "step_ms": 0.0}))
    db = quick.database()
    with worker_thread(quick, concurrency=2):
        until(lambda: trains(db, job_id))
        trainer = until(lambda: trainer_of(job_id))
        os.kill(trainer, signal.SIGKILL)
        until(lambda: trainer_of(job_id) not in (trainer, None) and trains(db, job_id, 6))
        os.kill(parent_of(trainer_of(job_id) or 0), signal.SIGKILL)
        until(lambda: job_of(db, always).status == "failed")
        until(lambda: job_of(db, job_id).status == "succeeded")
    assert_whole(quick, db, job_id)
    assert adapter_bytes(quick, db, job_id) == undisturbed
    failed = job_of(db, always)
    assert failed.error is not None
    assert failed.error["code"] == "worker_crashed"
    assert failed.step == 4
    assert db.read(lambda tx: tx.execute(sa.select(usage).where(usage.c.job == always)).all()) == []
    db.close()


def test_a_job_whose_trainer_was_killed_twice_waits_for_minutes_and_can_be_paused_meanwhile(
    quick: Place, trainers: Trainers
) -> None:
    assert one_job.KILLED_WAITS_S[1] >= 60
    job_id = queue_job(quick, spec=SLOW.model_copy(update={"dies_at_step": 2, "step_ms": 0.0}))
    db = quick.database()
    with worker_thread(quick, trainers=trainers):
        until(lambda: job_of(db, job_id).crashes == 2)
        time.sleep(1.5)
        assert (job_of(db, job_id).status, job_of(db, job_id).crashes) == ("running", 2)
        command(db, job_id, "pause")
        until(lambda: job_of(db, job_id).status == "paused")
    db.close()


def test_a_run_that_fails_tells_its_owner_why_without_naming_the_service_s_folders(quick: Place, trainers: Trainers) -> None:
    job_id = queue_job(quick, spec=ToySpec(epochs=1, batch_rows=1, fails_at_step=3))
    work_here(quick, trainers=trainers)
    db = quick.database()
    job = job_of(db, job_id)
    assert job.status == "failed"
    assert job.error == {
        "code": "training_diverged", "message": "the loss of step 3 is nan; rows in it: training.jsonl:1", "param": None,
    }  # fmt: skip
    assert str(quick.data) not in str(events_of(db, job_id))
    db.close()


def test_a_step_made_again_with_other_numbers_fails_the_job(quick: Place, trainers: Trainers) -> None:
    job_id = queue_job(quick, spec=SLOW)
    db = quick.database()
    with worker_thread(quick, trainers=trainers):
        until(lambda: trains(db, job_id, 4))
    db.write("lie", lambda tx: tx.execute(sa.delete(snapshots)))
    db.write(
        "lie",
        lambda tx: tx.exec_driver_sql(
            "update job_events set data = replace(data, '\"epoch\": 0', '\"epoch\": 7') where type = 'metrics'"
        ),
    )
    work_here(quick, trainers=trainers)
    job = job_of(db, job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "not_reproduced"
    assert "step 1 was made again and differs in epoch" in job.error["message"]
    db.close()


def test_a_damaged_snapshot_falls_back_to_the_one_before(quick: Place, trainers: Trainers, undisturbed: dict[str, str]) -> None:
    job_id = queue_job(quick, spec=SLOW)
    db = quick.database()
    with worker_thread(quick, trainers=trainers):
        until(lambda: trains(db, job_id, 6))
    kept = db.read(lambda tx: running.newest(tx, job_id))
    assert len(kept) == 2
    quick.blobs().delete(kept[0].manifest)
    work_here(quick, trainers=trainers)
    assert_whole(quick, db, job_id)
    assert adapter_bytes(quick, db, job_id) == undisturbed
    db.close()


def test_a_job_begun_in_another_numeric_environment_starts_over_and_says_so(
    quick: Place, trainers: Trainers, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upgrade, or a worker on another processor: the bits could not be the same, so no part of the two is mixed."""
    job_id = queue_job(quick, spec=SLOW)
    db = quick.database()
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    with worker_thread(quick):
        until(lambda: trains(db, job_id, 7))
    monkeypatch.delenv("MKL_CBWR")
    at = job_of(db, job_id).step
    work_here(quick, trainers=trainers)
    job, events = job_of(db, job_id), events_of(db, job_id)
    assert job.status == "succeeded", job.error
    steps = [event.data["step"] for event in events if event.type == "metrics"]
    assert steps == [*range(1, at + 1), *range(1, 19)]
    assert sum("starts over" in event.message for event in events) == 1
    assert job.trained_tokens == job.planned_tokens
    charged = db.read(lambda tx: tx.execute(sa.select(usage.c.tokens).where(usage.c.job == job_id)).scalars().all())
    assert list(charged) == [job.planned_tokens]
    assert adapter_bytes(quick, db, job_id) == undisturbed
    db.close()


def test_training_goes_on_while_the_database_does_not_answer_and_nothing_is_lost(
    quick: Place, trainers: Trainers, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = queue_job(quick, spec=SLOW)
    db, down = quick.database(), threading.Event()
    before = Database.write

    def write(self: Database, name: str, work: object) -> object:
        if down.is_set():
            raise DatabaseDown("the database does not answer", hint="wait")
        return before(self, name, work)  # type: ignore[arg-type]

    monkeypatch.setattr(Database, "write", write)
    with worker_thread(quick, trainers=trainers):
        until(lambda: trains(db, job_id))
        down.set()
        at = job_of(db, job_id).step
        record = next((quick.data / "work").glob("*/run/events.jsonl"))
        length = record.stat().st_size
        until(lambda: record.stat().st_size > length + 500)
        assert job_of(db, job_id).step <= at + 1
        down.clear()
        until(lambda: job_of(db, job_id).status == "succeeded")
    assert_whole(quick, db, job_id)
    assert adapter_bytes(quick, db, job_id) == undisturbed
    db.close()


def test_a_store_that_fails_every_third_time_loses_nothing(
    quick: Place, trainers: Trainers, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = queue_job(quick, spec=SLOW)
    db, calls, put, fetch = quick.database(), itertools.count(1), FolderBlobs.put, FolderBlobs.fetch

    def may_fail() -> None:
        if next(calls) % 3 == 0:
            raise StoreDown("the store does not answer", hint="wait")

    def failing_put(self: FolderBlobs, tenant: str, source: Path) -> str:
        may_fail()
        return put(self, tenant, source)

    def failing_fetch(self: FolderBlobs, name: str, target: Path) -> None:
        fetch(self, name, target)
        may_fail()

    monkeypatch.setattr(FolderBlobs, "put", failing_put)
    monkeypatch.setattr(FolderBlobs, "fetch", failing_fetch)
    with worker_thread(quick, trainers=trainers):
        until(lambda: trains(db, job_id, 6))
    assert job_of(db, job_id).status == "queued"
    work_here(quick, trainers=trainers)
    assert_whole(quick, db, job_id)
    assert adapter_bytes(quick, db, job_id) == undisturbed
    assert next(calls) > 20
    db.close()


def test_a_full_disk_of_a_worker_makes_a_job_wait_and_with_room_it_ends_with_the_same_bytes(
    quick: Place, trainers: Trainers, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Full when the job is prepared, and again while it trains: then not even how the trainer ended can be written."""
    monkeypatch.setattr(one_job, "LONGEST_WAIT_S", 0.2)
    job_id, db = queue_job(quick, spec=SLOW), quick.database()
    with small_disk(quick.data / "work", 192 << 10) as disk:
        fill_up(disk)
        with worker_thread(quick, trainers=trainers, room_bytes=0):
            until(lambda: "the disk is full" in caplog.text)
            assert job_of(db, job_id).status == "running"
            (disk / "filler").unlink()
            until(lambda: trains(db, job_id))
            fill_up(disk)
            until(lambda: "a trainer waits" in caplog.text)
            time.sleep(0.5)
            assert job_of(db, job_id).status == "running"
            (disk / "filler").unlink()
            until(lambda: job_of(db, job_id).status != "running")
    assert_whole(quick, db, job_id)
    assert job_of(db, job_id).crashes == 0
    assert adapter_bytes(quick, db, job_id) == undisturbed
    db.close()


def fill_up(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_worker_takes_no_job_while_its_disk_has_little_room(
    quick: Place, trainers: Trainers, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = queue_job(quick)
    work_here(quick, trainers=trainers, room_bytes=1 << 60)
    db = quick.database()
    assert job_of(db, job_id).status == "queued"
    assert caplog.text.count("takes no job") == 1
    db.close()


def test_trouble_of_a_worker_s_own_loops_is_no_failure_of_the_job_that_runs(
    quick: Place, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while they last, nor when the process that trainers come from is lost and cannot be started, nor when they end."""
    monkeypatch.setattr(one_job, "CRASH_WAIT_S", 0.02)
    monkeypatch.setattr(tune_jobs, "AFTER_TROUBLE_S", 0.1)
    job_id, db, ails = queue_job(quick, spec=SLOW.model_copy(update={"step_ms": 120.0})), quick.database(), threading.Event()

    def ailing(act: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
        def acted(*words: Any, **named: Any) -> Any:
            if ails.is_set():
                raise error
            return act(*words, **named)

        return acted

    def beats() -> int:
        return db.read(lambda tx: tx.execute(sa.select(leases.c.beat)).scalar_one())

    monkeypatch.setattr(running, "something_waits", ailing(running.something_waits, RuntimeError("can't start new thread")))
    monkeypatch.setattr(leases_of_jobs, "beat", ailing(leases_of_jobs.beat, RuntimeError("out of memory")))
    monkeypatch.setattr(subprocess, "Popen", ailing(subprocess.Popen, BlockingIOError(11, "no more processes")))
    with worker_thread(quick, concurrency=2):
        until(lambda: trains(db, job_id))
        ails.set()
        os.kill(parent_of(trainer_of(job_id) or 0), signal.SIGKILL)
        time.sleep(0.5)
        ails.clear()
        before = beats()
        until(lambda: trains(db, job_id, 6) and beats() > before)
    assert (job_of(db, job_id).status, job_of(db, job_id).crashes) == ("queued", 0)
    monkeypatch.setattr(Trainers, "mend", ailing(Trainers.mend, KeyboardInterrupt()))
    at = job_of(db, job_id).step
    threading.Thread(target=lambda: until(lambda: trains(db, job_id, at + 1)) and ails.set()).start()
    with pytest.raises(KeyboardInterrupt):
        work_here(quick)
    assert job_of(db, job_id).status == "running"
    ails.clear()
    work_here(quick, term_s=1.5)
    assert_whole(quick, db, job_id)
    assert adapter_bytes(quick, db, job_id) == undisturbed
    db.close()


def test_a_job_cancelled_while_the_store_does_not_answer_stops_computing_at_once(
    quick: Place, trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, db, down = queue_job(quick, spec=SLOW.model_copy(update={"step_ms": 200.0})), quick.database(), threading.Event()

    def put(*_: object) -> str:
        down.set()
        raise StoreDown("the store does not answer", hint="wait")

    monkeypatch.setattr(FolderBlobs, "put", put)
    with worker_thread(quick, trainers=trainers):
        until(down.is_set)
        began = time.monotonic()
        command(db, job_id, "cancel")
        until(lambda: trainer_of(job_id) is None and not db.read(running.left_alone))
        assert time.monotonic() - began < 2
    assert db.read(lambda tx: tx.execute(sa.select(usage.c.tokens)).scalars().all()) == [job_of(db, job_id).trained_tokens]
    db.close()
