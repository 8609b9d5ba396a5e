"""Real training in a worker's hands: killed at any moment, resumed in another folder by another worker, the same bits."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml

from kivnun.jobs import tuning
from kivnun.jobs.place import Place
from kivnun.jobs.schema import models
from kivnun.worker.trainer import Trainers
from toy_jobs import (
    adapter_bytes,
    assert_whole,
    command,
    events_of,
    job_of,
    queue_job,
    toy_place,
    until,
    work_here,
    worker_process,
    worker_thread,
)

BASE = "kivnun/tiny-phi"
SPEC: dict[str, Any] = {
    "version": 1,
    "base": BASE,
    "data": {"train": "training.jsonl", "validation": "validation.jsonl", "format": "messages"},
    "adapter": {"kind": "lora", "rank": 4, "dropout": 0.1},
    "schedule": {"epochs": 10, "batch_rows": 2, "learning_rate": 0.001},
    "evaluation": {"samples": 0, "bootstrap": 100, "forgetting": None},
    "checkpoints": {"every_steps": 4},
    "compute": {"kind": "local", "device": "cpu", "threads": 1},
    "seed": 7,
}
STEPS = 50  # of 20 ms: whoever kills or pauses must come before the last one


@pytest.fixture(scope="module")
def trainers() -> Iterator[Trainers]:
    made = Trainers(loads_torch=True)
    yield made
    made.close()


def real_job(folder: Path, **changes: Any) -> tuple[Place, str]:
    """Return a place with one queued job of the built-in base."""
    made = toy_place(folder)
    assert made.config is not None
    made.config.write_text(yaml.safe_dump({"version": 1, "bases": {BASE: {}}}), encoding="utf-8")
    job_id = queue_job(made, base=BASE, model=BASE, held_out=True, rows=10, spec_text=yaml.safe_dump({**SPEC, **changes}))
    return made, job_id


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, trainers: Trainers) -> dict[str, str]:
    place, job_id = real_job(tmp_path_factory.mktemp("undisturbed"))
    work_here(place, trainers=trainers)
    db = place.database()
    assert_real(place, job_id)
    found = adapter_bytes(place, db, job_id)
    db.close()
    return found


def assert_real(place: Place, job_id: str) -> None:
    db = place.database()
    trained = sum(event.data["trained_tokens"] for event in events_of(db, job_id) if event.type == "metrics")
    db.write("plan", lambda tx: tuning.update(tx, job_id, planned_tokens=trained))
    assert_whole(place, db, job_id)
    db.close()


def test_a_real_job_killed_with_its_worker_and_paused_ends_with_the_same_bytes(
    tmp_path: Path, trainers: Trainers, undisturbed: dict[str, str]
) -> None:
    place, job_id = real_job(tmp_path)
    db = place.database()
    worker = worker_process(place)
    until(lambda: job_of(db, job_id).step >= 5)
    worker.kill()
    killed_at, asked = job_of(db, job_id).step, threading.Event()

    def pause(point: str) -> None:
        """Ask by the worker's own thread, once it has told a new step: another thread may come when the last one is done."""
        if point == "after tell" and not asked.is_set() and job_of(db, job_id).step > killed_at:
            assert command(db, job_id, "pause")
            asked.set()

    with worker_thread(place, watch=pause, term_s=0.5, trainers=trainers):
        until(lambda: job_of(db, job_id).status in ("paused", "succeeded", "failed"))
        assert killed_at < job_of(db, job_id).step < STEPS
        assert command(db, job_id, "resume")
        until(lambda: job_of(db, job_id).status in ("succeeded", "failed"))
    assert_real(place, job_id)
    assert adapter_bytes(place, db, job_id) == undisturbed
    rows = db.read(lambda tx: tx.execute(sa.select(models).where(models.c.job == job_id)).all())
    final = next(row for row in rows if row.checkpoint is None)
    assert final.step == STEPS
    assert final.metrics["full_valid_loss"] == final.metrics["valid_loss"] > 0
    assert 0 <= final.metrics["full_valid_mean_token_accuracy"] == final.metrics["valid_mean_token_accuracy"] <= 1
    assert all(0 <= event.data["train_mean_token_accuracy"] <= 1 for event in events_of(db, job_id) if event.type == "metrics")
    db.close()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_random_kills_of_workers_in_one_real_job(tmp_path: Path, trainers: Trainers, undisturbed: dict[str, str]) -> None:
    place, job_id = real_job(tmp_path)
    db, draw = place.database(), random.Random(4)
    for kill in range(10):
        worker = worker_process(place, term_s=0.5)
        at = job_of(db, job_id).step
        until(lambda at=at: job_of(db, job_id).step > min(at, STEPS - 3))
        time.sleep(draw.uniform(0, 0.3))
        worker.send(signal.SIGKILL if kill % 3 else signal.SIGTERM)
        worker.wait()
        if job_of(db, job_id).status == "succeeded":
            break
    work_here(place, term_s=0.5, trainers=trainers)
    assert_real(place, job_id)
    assert adapter_bytes(place, db, job_id) == undisturbed
    db.close()


@pytest.mark.slow
def test_a_job_goes_on_with_a_checkpoint_of_another(tmp_path: Path, trainers: Trainers) -> None:
    place, first = real_job(tmp_path)
    work_here(place, trainers=trainers)
    db = place.database()
    shown = db.read(lambda tx: tx.execute(sa.select(models.c.id).where(models.c.checkpoint.is_not(None))).scalars().first())
    spec = {**SPEC, "adapter": {"kind": "lora", "start_from": "start"}}
    second = queue_job(place, base=BASE, model=shown, held_out=True, rows=10, spec_text=yaml.safe_dump(spec))
    work_here(place, trainers=trainers)
    assert_real(place, first)
    assert_real(place, second)
    assert adapter_bytes(place, db, first) != adapter_bytes(place, db, second)
    db.close()
