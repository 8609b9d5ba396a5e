"""One job's life, in a process that ends itself at the k-th point of its durable effects; what must hold afterwards.

A worker is forked from the test's process. `killed_at` runs it to the point and says whether there was one; `assert_survived` lets
a fresh worker end the job and checks that nothing was lost, told twice or charged twice.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import sqlalchemy as sa

from kivnun.jobs.place import Place
from kivnun.jobs.schema import models, usage
from kivnun.jobs.toy import ToySpec
from kivnun.worker.trainer import Trainers
from toy_jobs import adapter_bytes, assert_whole, command, events_of, job_of, queue_job, rows_of_database, toy_place, work_here

Scenario = Literal["straight", "pause", "cancel"]
SPEC = ToySpec(seed=9, epochs=2, batch_rows=6, step_ms=30.0)
TERM_S = 0.05


@dataclass
class Counter:
    """A watch that kills this process at its `kill_at`-th point. `at_first_step` is done once, after the first steps are told."""

    kill_at: int
    at_first_step: Callable[[], object] = lambda: None
    count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _told: bool = False

    def __call__(self, point: str) -> None:
        with self._lock:
            self.count += 1
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            first, self._told = point == "after tell" and not self._told, self._told or point == "after tell"
        if first:
            self.at_first_step()


def new_place(folder: Path, db_url: str | None = None) -> tuple[Place, str]:
    """Return a place with one queued job."""
    made = toy_place(folder, db_url)
    return made, queue_job(made, spec=SPEC)


def killed_at(point: int, place: Place, job_id: str, scenario: Scenario) -> bool:
    """Run a worker until it kills itself; return whether it came to that point."""

    def give_command() -> None:
        if scenario != "straight":
            db = place.database()
            command(db, job_id, scenario)
            db.close()

    pid = os.fork()
    if pid == 0:
        try:
            work_here(place, Counter(point, give_command), beat_s=60.0, term_s=60.0)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def assert_survived(place: Place, job_id: str, scenario: Scenario, trainers: Trainers, undisturbed: dict[str, str]) -> None:
    """End the job with a worker that knows nothing of the one before; check what must hold."""
    db = place.database()
    try:
        before, at_kill = rows_of_database(db), job_of(db, job_id)
        work_here(place, term_s=TERM_S, trainers=trainers)
        job = job_of(db, job_id)
        if at_kill.status in ("succeeded", "paused"):
            assert rows_of_database(db) == before, "an end is an end"
        assert job.step >= at_kill.step
        if scenario == "cancel" and job.status == "cancelled":
            charged = db.read(lambda tx: tx.execute(sa.select(usage.c.tokens).where(usage.c.job == job_id)).scalars().all())
            told = sum(event.data["trained_tokens"] for event in events_of(db, job_id) if event.type == "metrics")
            assert list(charged) == [told]
            assert db.read(lambda tx: tx.execute(sa.select(models.c.id).where(models.c.checkpoint.is_(None))).all()) == []
            return
        if scenario == "pause" and job.status == "paused":
            assert command(db, job_id, "resume")
            work_here(place, term_s=TERM_S, trainers=trainers)
        assert_whole(place, db, job_id)
        assert adapter_bytes(place, db, job_id) == undisturbed
        assert not any((place.data / "work").iterdir())
    finally:
        db.close()
