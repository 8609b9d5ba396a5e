"""Which jobs wait for what, on both databases: for the judgement of their files, for their own validation, for room."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kivnun.jobs import files, tuning
from kivnun.jobs.database import Database
from kivnun.jobs.files import File
from kivnun.jobs.ids import new_id
from kivnun.jobs.models import Model
from kivnun.jobs.models import add as add_model
from kivnun.jobs.tuning import Job
from kivnun.service.turns import Turns

JOB = Job(id="ftjob-0", tenant="default", created_at=1.0, model="toy", base="toy", training_file="file-1", method={}, seed=1)
FILE = File("file-1", "default", 1.0, "fine-tune", "t.jsonl", 100, "default/" + "0" * 64, "processed")


def next_of(db: Database, *bounds: int | None) -> str | None:
    found = db.read(lambda tx: tuning.to_validate(tx, *bounds))  # type: ignore[arg-type]
    return found[0].id if found else None


def test_a_job_waits_for_both_its_files_and_the_oldest_that_does_not_is_next(db: Database) -> None:
    for file in (FILE, replace(FILE, id="file-2", bytes=5000), replace(FILE, id="file-3", status="uploaded")):
        db.write("file", lambda tx, file=file: files.add(tx, file))
    made = [
        replace(JOB, id="ftjob-a", validation_file="file-3"),
        replace(JOB, id="ftjob-b", created_at=3.0),
        replace(JOB, id="ftjob-c", created_at=2.0, training_file="file-2"),
        replace(JOB, id="ftjob-d", created_at=0.5, tenant="other", status="paused"),
        replace(JOB, id="ftjob-e", created_at=4.0, training_file="file-gone"),
    ]
    for job in made:
        db.write("job", lambda tx, job=job: tuning.create(tx, job, new_id))
    assert next_of(db) == "ftjob-c"
    assert (next_of(db, 0, 5000), next_of(db, 5000, None)) == ("ftjob-b", "ftjob-c")
    assert db.read(lambda tx: [tuning.num_waiting(tx, tenant) for tenant in ("default", "other")]) == [4, 1]
    db.write("judge", lambda tx: files.mark(tx, "file-3", "default", "error"))
    assert next_of(db) == "ftjob-a", "a file that was refused is judged too"
    for job_id in ("ftjob-a", "ftjob-b", "ftjob-c"):
        found = db.read(lambda tx, job_id=job_id: tuning.find(tx, job_id))
        assert found is not None
        db.write("queue", lambda tx, found=found: tuning.move(tx, found, "queued", 5.0, new_id))
    assert next_of(db) == "ftjob-e", "a file that was deleted keeps no job waiting"


def test_of_each_tenant_the_oldest_jobs_and_files_are_told(db: Database) -> None:
    for n in range(6):
        tenant = "other" if n == 4 else "default"
        job = replace(JOB, id=f"ftjob-{n}", tenant=tenant, created_at=float(n), training_file="file-gone")
        file = replace(FILE, id=f"file-{n}", tenant=tenant, created_at=float(n), bytes=n, status="uploaded")
        db.write("job", lambda tx, job=job: tuning.create(tx, job, new_id))
        db.write("file", lambda tx, file=file: files.add(tx, file))
    assert [job.id for job in db.read(lambda tx: tuning.to_validate(tx, of_each=2))] == ["ftjob-0", "ftjob-1", "ftjob-4"]
    assert [file.id for file in db.read(lambda tx: files.unjudged(tx, 2))] == ["file-0", "file-1", "file-4"]
    assert [file.id for file in db.read(lambda tx: files.unjudged(tx, 1, 2, 4))] == ["file-2"]


def test_tenants_take_turns_and_what_fails_lets_others_go_first_for_a_while() -> None:
    now = [0.0]
    turns = Turns(lambda: now[0])
    waiting = [replace(JOB, id=f"{tenant}{n}", tenant=tenant, created_at=float(n)) for tenant in "ab" for n in range(3)]
    order: list[str] = []
    while waiting:
        one = turns.in_turn(waiting)[0]
        with turns.serving(one):
            waiting.remove(one)
        order.append(one.id)
    assert order == ["a0", "b0", "a1", "b1", "a2", "b2"]
    bad, good = (replace(JOB, id=name, tenant="c", created_at=at) for name, at in (("bad", 0.0), ("good", 1.0)))

    def failing() -> None:
        with turns.serving(bad):
            raise InterruptedError

    for wait_s in (2.0, 4.0):
        assert turns.in_turn([bad, good])[0] is bad
        with pytest.raises(InterruptedError):
            failing()
        assert turns.in_turn([bad, good]) == [good, bad]
        now[0] += wait_s


def test_a_model_is_found_by_its_checkpoint_until_it_is_deleted_and_by_its_tenant_alone(db: Database) -> None:
    db.write("job", lambda tx: tuning.create(tx, JOB, new_id))
    model = Model("ft:toy:kivnun::a:ckpt-step-2", "default", 1.0, JOB.id, "toy", 2, "default/" + "0" * 64, "hash", "ftckpt_2")
    db.write("model", lambda tx: add_model(tx, model))
    db.write("model", lambda tx: add_model(tx, replace(model, id="ft:old", checkpoint="ftckpt_1", deleted_at=2.0)))

    def found(checkpoint: str, tenant: str) -> str | None:
        return db.read(lambda tx: tuning.model_of_checkpoint(tx, checkpoint, tenant))

    assert [found("ftckpt_2", "default"), found("ftckpt_2", "other"), found("ftckpt_1", "default")] == [model.id, None, None]
