"""Jobs in the hands of workers: trained, killed, paused, cancelled, taken over; the adapter's bytes are those of a quiet run."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from kivnun.errors import KivnunError
from kivnun.jobs import deployments, running
from kivnun.jobs import leases as leases_of_jobs
from kivnun.jobs.config import Limits
from kivnun.jobs.errors import StaleLease
from kivnun.jobs.ids import new_id
from kivnun.jobs.place import Place
from kivnun.jobs.schema import leases, models, outbox, tenants, usage
from kivnun.jobs.toy import ToySpec
from kivnun.worker.trainer import Trainers
from toy_jobs import (
    SLOW,
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
    trains,
    until,
    work_here,
    worker_process,
    worker_thread,
)


@pytest.fixture
def place(tmp_path: Path, db_url: str) -> Place:
    return toy_place(tmp_path / "place", db_url)


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


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ([0.9, 0.4, 0.6, 0.7, 0.8, 0.9], {2, 4, 5, 6}),
        ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], {4, 5, 6}),
        ([0.5, 0.6, 0.4, 0.7, 0.8, 0.9], {3, 4, 5, 6}),
        ([None, None, None, None, None, None], {4, 5, 6}),
    ],
    ids=["an early one is the best", "the last is the best", "the best is replaced by a better one", "without validation"],
)
def test_the_last_three_checkpoints_stay_and_the_one_of_the_lowest_validation_loss(
    quick: Place, losses: list[float | None], kept: set[int]
) -> None:
    job_id, db = queue_job(quick), quick.database()
    claim = db.write("claim", lambda tx: running.claim_next(tx, "first", Limits(), 1.0, new_id))
    assert claim is not None
    for step, loss in enumerate(losses, 1):
        measured = {"step": step} if loss is None else {"step": step, "full_valid_loss": loss}
        adapter = running.Adapter(step, "default/" + "0" * 64, "hash", measured)
        db.write("commit", lambda tx, a=adapter: running.commit(tx, claim.lease, job_id, None, a, "kivnun", 2.0, new_id))
    shown = sa.select(models.c.step).where(models.c.deleted_at.is_(None))
    assert set(db.read(lambda tx: tx.execute(shown).scalars().all())) == kept
    db.close()
