"""Jobs in the hands of workers: trained, killed, paused, cancelled, taken over; the adapter's bytes are those of a quiet run."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from disks import small_disk
from kivnun.errors import KivnunError
from kivnun.jobs import deployments, running
from kivnun.jobs import leases as leases_of_jobs
from kivnun.jobs.blobs import FolderBlobs
from kivnun.jobs.config import Limits
from kivnun.jobs.database import Database
from kivnun.jobs.errors import DatabaseDown, StaleLease, StoreDown
from kivnun.jobs.ids import new_id
from kivnun.jobs.place import Place
from kivnun.jobs.schema import leases, models, outbox, snapshots, tenants, usage
from kivnun.jobs.toy import ToySpec
from kivnun.worker import one_job, tune_jobs
from kivnun.worker.trainer import Trainers
from toy_jobs import (
    adapter_bytes,
    assert_whole,
    below,
    command,
    events_of,
    is_alive,
    job_of,
    queue_job,
    rows_of_database,
    toy_place,
    until,
    work_here,
    worker_process,
    worker_thread,
)

SLOW = ToySpec(seed=3, epochs=3, batch_rows=2, step_ms=40.0, checkpoint_every_steps=2)


@pytest.fixture
def place(tmp_path: Path, db_url: str) -> Place:
    return toy_place(tmp_path / "place", db_url)


@pytest.fixture
def quick(tmp_path: Path) -> Place:
    """A place on SQLite, for what is about processes and not about SQL."""
    return toy_place(tmp_path / "place")


@pytest.fixture(scope="module")
def trainers() -> Iterator[Trainers]:
    """Trainers of workers in this process: the process that they are forked from takes half a second to load."""
    made = Trainers(loads_torch=False)
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, trainers: Trainers) -> dict[str, str]:
    """Return the adapter of SLOW, trained without a stop."""
    made = toy_place(tmp_path_factory.mktemp("undisturbed"))
    job = queue_job(made, spec=SLOW.model_copy(update={"step_ms": 0.0}))
    work_here(made, trainers=trainers)
    db = made.database()
    assert_whole(made, db, job)
    found = adapter_bytes(made, db, job)
    db.close()
    return found


def trains(db: Database, job_id: str, step: int = 3) -> bool:
    return job_of(db, job_id).step >= step


def test_a_queued_job_is_trained_to_its_model_files_price_and_events(place: Place, trainers: Trainers) -> None:
    job_id = queue_job(place, held_out=True)
    work_here(place, trainers=trainers)
    db = place.database()
    assert_whole(place, db, job_id)
    job, said = job_of(db, job_id), [event.message for event in events_of(db, job_id)]
    assert said[:2] == [f"Created fine-tuning job: {job_id}", "Fine-tuning job started"]
    assert said[4] == "Step 3/9: training loss=1.64, full validation loss=1.08"
    assert said[-4:] == [
        "Step 9/9: training loss=0.42, full validation loss=1.13", "Checkpoint created at step 9",
        f"New fine-tuned model created: {job.tuned_model}", "The job has successfully completed",
    ]  # fmt: skip
    assert [row.type for row in db.read(lambda tx: tx.execute(sa.select(outbox)).all())] == ["fine_tuning.job.succeeded"]
    charged = db.read(lambda tx: tx.execute(sa.select(usage)).one())
    assert charged.cost_micros == 2 * job.trained_tokens
    shown = db.read(lambda tx: tx.execute(sa.select(models).where(models.c.checkpoint.is_not(None)).order_by(models.c.step)).all())
    assert [row.id.rpartition(":")[2] for row in shown] == ["ckpt-step-3", "ckpt-step-6", "ckpt-step-9"]
    assert [row.metrics["full_valid_loss"] for row in shown] == [1.084, 1.212, 1.134] or shown[0].metrics["step"] == 3
    assert len(db.read(lambda tx: running.newest(tx, job_id))) <= running.SNAPSHOTS_KEPT
    assert not any((place.data / "work").iterdir())
    db.close()


def test_two_workers_do_each_of_six_jobs_once_and_usage_is_what_was_trained(place: Place, trainers: Trainers) -> None:
    ids = [queue_job(place, "default" if n % 2 else "other") for n in range(6)]
    db = place.database()
    with worker_thread(place, concurrency=2, trainers=trainers), worker_thread(place, trainers=trainers):
        until(lambda: all(job_of(db, job).status == "succeeded" for job in ids))
    for job in ids:
        assert_whole(place, db, job)
        assert sum(event.message == "Fine-tuning job started" for event in events_of(db, job)) == 1
    epochs = db.read(lambda tx: tx.execute(sa.select(leases.c.epoch).where(leases.c.name.like("job:%"))).scalars().all())
    assert list(epochs) == [1] * 6
    db.close()


def test_a_job_goes_on_from_a_tuned_model_and_gives_other_bytes(quick: Place, trainers: Trainers) -> None:
    first = queue_job(quick)
    work_here(quick, trainers=trainers)
    db = quick.database()
    tuned = job_of(db, first).tuned_model
    second, third = queue_job(quick, model=tuned), queue_job(quick)
    work_here(quick, trainers=trainers)
    assert_whole(quick, db, second)
    assert adapter_bytes(quick, db, third) == adapter_bytes(quick, db, first)
    assert adapter_bytes(quick, db, second) != adapter_bytes(quick, db, first)
    db.close()


def test_a_worker_killed_twice_leaves_a_job_that_another_one_ends_to_the_same_bytes(
    quick: Place, trainers: Trainers, undisturbed: dict[str, str]
) -> None:
    job_id = queue_job(quick, spec=SLOW)
    db, draw = quick.database(), random.Random(1)
    for step in (2, 9):
        worker = worker_process(quick, term_s=0.6)
        until(lambda step=step: trains(db, job_id, step))
        time.sleep(draw.uniform(0, 0.1))
        children = below(worker.process.pid)
        worker.kill()
        assert children
        until(lambda children=children: not any(map(is_alive, children)))
    work_here(quick, term_s=0.6, trainers=trainers)
    assert_whole(quick, db, job_id)
    assert adapter_bytes(quick, db, job_id) == undisturbed
    assert sum(event.message.startswith("Worker lost, resumed from step") for event in events_of(db, job_id)) == 2
    db.close()


def test_a_worker_that_slept_past_its_lease_writes_nothing_and_its_trainer_is_gone(
    place: Place, trainers: Trainers, undisturbed: dict[str, str]
) -> None:
    job_id = queue_job(place, spec=SLOW)
    db = place.database()
    sleeper = worker_process(place, term_s=60)
    until(lambda: trains(db, job_id))
    sleeper.send(signal.SIGSTOP)
    children = [pid for pid in below(sleeper.process.pid) if "trainer" in Path(f"/proc/{pid}/cmdline").read_text()]
    work_here(place, term_s=0.6, trainers=trainers)
    assert_whole(place, db, job_id)
    assert adapter_bytes(place, db, job_id) == undisturbed
    before = rows_of_database(db)
    sleeper.send(signal.SIGCONT)
    assert len(children) == 2, "the origin and the trainer of the job"
    until(lambda: not is_alive(children[-1]))
    time.sleep(0.3)
    assert rows_of_database(db) == before
    sleeper.send(signal.SIGTERM)
    assert sleeper.wait() == 0
    db.close()


def test_a_job_is_paused_with_a_checkpoint_that_can_be_called_and_goes_on_to_the_same_bytes(
    quick: Place, trainers: Trainers, undisturbed: dict[str, str]
) -> None:
    job_id = queue_job(quick, spec=SLOW)
    db = quick.database()
    with worker_thread(quick, trainers=trainers):
        until(lambda: trains(db, job_id))
        assert command(db, job_id, "pause")
        until(lambda: job_of(db, job_id).status == "paused")
        at = job_of(db, job_id).step
        shown = db.read(lambda tx: tx.execute(sa.select(models.c.step).where(models.c.job == job_id)).scalars().all())
        assert at in shown
        assert db.read(lambda tx: running.newest_step(tx, job_id)) == at
        time.sleep(0.3)
        assert job_of(db, job_id).step == at
        assert command(db, job_id, "resume")
        until(lambda: job_of(db, job_id).status == "succeeded")
    assert_whole(quick, db, job_id)
    assert adapter_bytes(quick, db, job_id) == undisturbed
    db.close()


def test_a_cancelled_job_stops_at_once_and_is_charged_for_the_steps_told(place: Place, trainers: Trainers) -> None:
    job_id = queue_job(place, spec=SLOW)
    db = place.database()
    with worker_thread(place, trainers=trainers):
        until(lambda: trains(db, job_id))
        began = time.monotonic()
        command(db, job_id, "cancel")
        until(lambda: not db.read(lambda tx: running.left_alone(tx)))
        assert time.monotonic() - began < 5  # 2 s where the machine is not shared
    job = job_of(db, job_id)
    assert job.status == "cancelled"
    assert job.trained_tokens > 0
    charged = db.read(lambda tx: tx.execute(sa.select(usage).where(usage.c.job == job_id)).one())
    told = sum(event.data["trained_tokens"] for event in events_of(db, job_id) if event.type == "metrics")
    assert charged.tokens == job.trained_tokens == told
    assert db.read(lambda tx: tx.execute(sa.select(models).where(models.c.checkpoint.is_(None))).all()) == []
    db.close()


@pytest.mark.parametrize("trained_before", [False, True])
def test_a_job_cancelled_while_it_waits_is_charged_for_what_it_trained_before(
    quick: Place, trainers: Trainers, trained_before: bool
) -> None:
    job_id = queue_job(quick, spec=SLOW)
    db = quick.database()
    if trained_before:
        with worker_thread(quick, trainers=trainers):
            until(lambda: trains(db, job_id))
            command(db, job_id, "pause")
            until(lambda: job_of(db, job_id).status == "paused")
    command(db, job_id, "cancel")
    work_here(quick, trainers=trainers)
    job = job_of(db, job_id)
    charged = db.read(lambda tx: tx.execute(sa.select(usage.c.tokens)).scalars().all())
    assert job.status == "cancelled"
    assert list(charged) == ([job.trained_tokens] if trained_before else [])
    db.close()


def test_a_job_that_was_cancelled_never_succeeds_whatever_the_moment(quick: Place, trainers: Trainers) -> None:
    """The command comes around the last step of a job of a few milliseconds, at another moment each time."""
    db, ended = quick.database(), set[str]()
    with worker_thread(quick, trainers=trainers):
        for n in range(8):
            job_id = queue_job(quick, spec=ToySpec(seed=n, epochs=1, batch_rows=4, step_ms=5.0))
            until(lambda job_id=job_id: trains(db, job_id, 1))
            time.sleep(0.02 * n)
            accepted = command(db, job_id, "cancel")
            status = until(
                lambda job_id=job_id: job_of(db, job_id).status in ("succeeded", "cancelled") and job_of(db, job_id).status
            )
            ended.add(status)
            assert status == ("cancelled" if accepted else "succeeded")
            time.sleep(0.05)
            assert job_of(db, job_id).status == status
    assert "cancelled" in ended
    db.close()


def test_a_worker_told_to_end_hands_its_job_back_saved(quick: Place, trainers: Trainers, undisturbed: dict[str, str]) -> None:
    job_id = queue_job(quick, spec=SLOW)
    queued_at = job_of(quick.database(), job_id).queued_at
    db = quick.database()
    worker = worker_process(quick)
    until(lambda: trains(db, job_id))
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0
    job = job_of(db, job_id)
    assert (job.status, job.queued_at) == ("queued", queued_at)
    assert db.read(lambda tx: running.newest_step(tx, job_id)) == job.step, "nothing is trained twice"
    work_here(quick, term_s=60, trainers=trainers)
    assert_whole(quick, db, job_id)
    assert adapter_bytes(quick, db, job_id) == undisturbed
    db.close()


def test_a_trainer_that_does_not_heed_is_ended_when_the_worker_has_to(quick: Place, trainers: Trainers) -> None:
    job_id = queue_job(quick, spec=SLOW.model_copy(update={"ignores_stop": True, "step_ms": 400.0}))
    db = quick.database()
    with worker_thread(quick, drain_s=0.5, trainers=trainers):
        until(lambda: trains(db, job_id, 2))
    assert job_of(db, job_id).status == "queued"
    db.close()


def trainer_of(job_id: str) -> int | None:
    """Return the process that trains a job: the one that works in its folder."""
    for pid in below(os.getpid()):
        with contextlib.suppress(OSError):
            if Path(os.readlink(f"/proc/{pid}/cwd")).name.startswith(job_id):
                return pid
    return None


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_trainer_that_is_killed_goes_on_and_one_that_always_dies_fails_its_job(
    quick: Place, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is one whose origin is killed, from which all of a worker's trainers come."""
    monkeypatch.setattr(one_job, "KILLED_WAITS_S", (0.1, 0.1, 0.1))
    job_id = queue_job(quick, spec=SLOW)
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


def test_no_write_of_a_job_passes_under_a_lease_that_is_lost(place: Place) -> None:
    job_id = queue_job(place)
    db = place.database()
    claim = db.write("claim", lambda tx: running.claim_next(tx, "first", Limits(), 1.0, new_id))
    assert claim is not None
    seen = db.read(running.left_alone)[0][1]
    second = db.write("take over", lambda tx: running.take_over(tx, job_id, seen, "second", {}, 2.0, new_id))
    assert second is not None
    before = rows_of_database(db)
    adapter = running.Adapter(1, "default/" + "0" * 64, "hash", {})
    lease = claim.lease
    for late in (
        lambda tx: running.tell(tx, lease, job_id, [running.Told("late", step=1, trained_tokens=5)], None, 3.0, new_id),
        lambda tx: running.commit(tx, lease, job_id, running.Snapshot(1, "m"), adapter, "kivnun", 3.0, new_id),
        lambda tx: running.crashed(tx, lease, job_id),
        lambda tx: running.pause(tx, lease, job_id, 3.0, new_id),
        lambda tx: running.hand_back(tx, lease, job_id, {}, 3.0, new_id),
        lambda tx: running.settle_cancelled(tx, lease, job_id, {}, 3.0),
        lambda tx: running.fail(tx, lease, job_id, "code", "message", None, 3.0, new_id),
        lambda tx: running.succeed(tx, lease, job_id, adapter, [], "kivnun", {}, 3.0, new_id),
    ):
        with pytest.raises(StaleLease):
            db.write("late", late)
    assert rows_of_database(db) == before
    assert issubclass(StaleLease, KivnunError)
    db.close()


def test_a_cancelled_job_gives_back_its_share_once_whether_it_runs_or_was_interrupted_or_waits(place: Place) -> None:
    db = place.database()

    def served() -> float:
        return db.read(lambda tx: tx.execute(sa.select(tenants.c.served).where(tenants.c.id == "default")).scalar_one())

    def claimed() -> running.Claim:
        claim = db.write("claim", lambda tx: running.claim_next(tx, "first", Limits(), 1.0, new_id))
        assert claim is not None
        assert claim.job.planned_tokens
        told = [running.Told("Step 1", step=1, trained_tokens=5)]
        db.write("tell", lambda tx: running.tell(tx, claim.lease, claim.job.id, told, None, 2.0, new_id))
        return claim

    def settled(claim: running.Claim) -> float:
        command(db, claim.job.id, "cancel")
        for job_id, seen in db.read(running.left_alone):
            db.write("settle", lambda tx, j=job_id, s=seen: running.take_over(tx, j, s, "second", {}, 3.0, new_id))
        assert not db.read(running.left_alone)
        return served()

    queue_job(place)
    assert settled(claimed()) == pytest.approx(5)
    queue_job(place)
    interrupted = claimed()
    db.write("start", leases_of_jobs.release_all)
    assert settled(interrupted) == pytest.approx(10)
    queue_job(place)
    waits = claimed()
    db.write("back", lambda tx: running.hand_back(tx, waits.lease, waits.job.id, {}, 3.0, new_id))
    assert settled(waits) == pytest.approx(15)
    db.close()


def test_checkpoints_of_a_run_that_was_started_over_go_unless_they_are_in_use(place: Place) -> None:
    job_id, db = queue_job(place), place.database()
    claim = db.write("claim", lambda tx: running.claim_next(tx, "first", Limits(), 1.0, new_id))
    assert claim is not None

    def commit(step: int, content_hash: str) -> None:
        adapter = running.Adapter(step, "default/" + "0" * 64, content_hash, {"step": step})
        db.write("commit", lambda tx: running.commit(tx, claim.lease, job_id, None, adapter, "kivnun", 2.0, new_id))

    def shown() -> dict[int, str]:
        return {row.step: row.content_hash for row in db.read(lambda tx: tx.execute(sa.select(models)).all())}

    for step in (3, 6, 9):
        commit(step, "before")
    names = {row.step: row.id for row in db.read(lambda tx: tx.execute(sa.select(models)).all())}
    queue_job(place, model=names[6])
    db.write("deploy", lambda tx: deployments.put(tx, "default", "mine", names[9], {}, 2.0))
    db.write("over", lambda tx: running.start_over(tx, claim.lease, job_id, 3.0, new_id))
    assert shown() == {6: "before", 9: "before"}
    commit(3, "after")
    assert shown() == {3: "after", 6: "before", 9: "before"}
    db.close()
