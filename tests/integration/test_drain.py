"""A store that hangs at a drain: every process ends within its time, hands over what it held, and nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import sqlalchemy as sa
from openai import OpenAI

from kivnun.jobs import leases, running
from kivnun.jobs.blobs import FolderBlobs
from kivnun.jobs.place import Place, place_in
from kivnun.jobs.schema import leases as lease_rows
from kivnun.jobs.schema import usage
from kivnun.jobs.toy import ToySpec
from kivnun.worker.trainer import Trainers
from s3_server import Valve, s3_server, s3_url_of
from service_process import TOY, create, ended, examples, wait_until
from service_process import running as running_service
from toy_jobs import (
    adapter_bytes,
    assert_whole,
    command,
    job_of,
    queue_job,
    toy_place,
    until,
    work_here,
    worker_thread,
)

SLOW = ToySpec(seed=3, epochs=3, batch_rows=2, step_ms=40.0, checkpoint_every_steps=2)


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def valve(s3_port: int) -> Iterator[Valve]:
    made = Valve(s3_port)
    yield made
    made.close()


def in_bucket(place: Place, url: str) -> Place:
    return place_in(place.data, place.db_url, url, place.config)


def test_a_worker_whose_store_hangs_ends_in_its_time_and_the_job_goes_on_to_the_same_bytes(
    tmp_path: Path, valve: Valve, trainers: Trainers
) -> None:
    quiet, place = toy_place(tmp_path / "quiet"), in_bucket(toy_place(tmp_path / "place"), s3_url_of(valve.port))
    expected = queue_job(quiet, spec=SLOW.model_copy(update={"step_ms": 0.0}))
    work_here(quiet, trainers=trainers)
    job_id, db = queue_job(place, spec=SLOW), place.database()
    words = ["worker", "tune", "--data", place.data, "--db", place.db_url, "--config", place.config, "--drain-s", "2"]
    worker = subprocess.Popen([sys.executable, "-m", "kivnun", *words], env={**os.environ, "KIVNUN_STORE": place.store_url})
    until(lambda: db.read(lambda tx: running.newest_step(tx, job_id)) >= 2)
    valve.hangs.set()
    assert valve.swallowed.wait(20), "no snapshot was about to be kept"
    began = time.monotonic()
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) == 0
    assert time.monotonic() - began < 8, "a request alone would hang for longer"
    assert job_of(db, job_id).status == "queued", "nobody has to wait for its lease to run out"
    assert db.read(lambda tx: tx.execute(sa.select(lease_rows.c.owner)).scalars().all()) == [None]

    valve.hangs.clear()
    work_here(place, term_s=60, trainers=trainers)
    assert_whole(place, db, job_id)
    other = quiet.database()
    assert adapter_bytes(place, db, job_id) == adapter_bytes(quiet, other, expected)
    db.close()
    other.close()


def uploads_in_vain(client: OpenAI) -> None:
    with pytest.raises(openai.APIError):
        client.files.create(file=b"{}\n" * 9, purpose="batch")


@pytest.mark.slow
def test_a_service_whose_store_hangs_ends_by_itself_within_its_drain_and_goes_on_afterwards(tmp_path: Path, valve: Valve) -> None:
    options = ("--drain-s", "15", "--store", s3_url_of(valve.port, "service"))
    with running_service(tmp_path, TOY, *options) as service:
        client = service.openai()
        file_id = client.files.create(file=examples(tmp_path), purpose="fine-tune").id
        undisturbed = ended(client, create(client, file_id, epochs=15))
        job_id = create(client, file_id, epochs=15)
        wait_until(lambda: client.fine_tuning.jobs.retrieve(job_id).status == "running", "it does not begin")
        valve.hangs.set()
        upload = threading.Thread(target=uploads_in_vain, args=(client,))
        upload.start()  # a request, and the clerk's and the worker's own calls
        assert valve.swallowed.wait(20)
        time.sleep(1.0)
        began = time.monotonic()
        assert service.stop() == 0
        assert time.monotonic() - began < 15
        log = service.log.read_text(encoding="utf-8")
        assert "part_killed" not in log, "each part ends by itself"
        upload.join()

        valve.hangs.clear()
        service.start()
        client = service.openai()
        job = ended(client, job_id)
        assert (job.status, job.trained_tokens) == ("succeeded", undisturbed.trained_tokens)


def test_a_worker_that_is_still_copying_files_ends_at_once(
    tmp_path: Path, db_url: str, trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = toy_place(tmp_path / "place", db_url)
    job_id, db, copies, free = queue_job(place), place.database(), threading.Event(), threading.Event()
    monkeypatch.setattr(FolderBlobs, "fetch", lambda *_: (copies.set(), free.wait(60)))
    with worker_thread(place, trainers=trainers):
        assert copies.wait(20)
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert job_of(db, job_id).status == "queued"
    free.set()
    db.close()


@pytest.mark.parametrize(("kind", "status"), [("pause", "paused"), ("cancel", "cancelled")])
def test_a_job_that_is_told_something_while_its_worker_ends_is_not_left_hanging(
    tmp_path: Path, db_url: str, kind: str, status: str, trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = toy_place(tmp_path / "place", db_url)
    job_id, db, hangs, free = queue_job(place, spec=SLOW), place.database(), threading.Event(), threading.Event()
    monkeypatch.setattr(FolderBlobs, "put", lambda *_: (hangs.set(), free.wait(60)))
    with worker_thread(place, drain_s=1.0, trainers=trainers) as stop:
        assert hangs.wait(20)
        stop.set()
        command(db, job_id, kind)
    assert job_of(db, job_id).status == status
    name = running.lease_name(job_id)
    assert db.read(lambda tx: leases.look(tx, [name]))[name].owner is None
    assert not db.read(running.left_alone), "there is nothing left for another worker to do"
    charged = db.read(lambda tx: tx.execute(sa.select(usage.c.tokens)).scalars().all())
    assert charged == ([job_of(db, job_id).trained_tokens] if kind == "cancel" else [])
    free.set()
    db.close()
