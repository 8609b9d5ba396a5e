"""Processes that live for months keep nothing of what is gone: workers, jobs that others ended, deleted files and endpoints."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from answer_parts import worker
from kivnun.jobs import answerers, files, leases, running, webhooks
from kivnun.jobs.answerers import Answerer
from kivnun.jobs.config import Limits
from kivnun.jobs.database import Database
from kivnun.jobs.files import File
from kivnun.jobs.ids import new_id
from kivnun.jobs.leases import Seen, Watcher
from kivnun.jobs.place import Place
from kivnun.jobs.schema import webhook_endpoints
from kivnun.service.answers import Links
from kivnun.service.context import Service
from kivnun.service.delivering import PRUNE_EVERY_S, DeliverWebhooks
from kivnun.service.judging import JudgeFiles
from kivnun.service.outward import Outward
from kivnun.worker import tune_jobs
from kivnun.worker.trainer import Trainers
from service_parts import place as service_place
from service_parts import service_at
from toy_jobs import queue_job, toy_place, until, worker_thread

# What is looked into has no other way out: what a process remembers shows only in its memory.
# pyright: reportPrivateUsage=false


@pytest.fixture
def quick(tmp_path: Path) -> Place:
    return toy_place(tmp_path / "place")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = service_at(service_place(tmp_path))
    yield made
    made.db.close()


def test_a_watcher_keeps_what_is_there_and_its_term_and_forgets_ten_thousand_that_are_gone() -> None:
    now = [0.0]
    watcher = Watcher(lambda: now[0], term_s=10.0)
    stays = Seen("stays", 1, "owner", 0)
    for n in range(10_000):
        now[0] = n / 1000
        here = [stays, Seen(f"job:{n}", 1, "owner", 0)]
        watcher.forget_all_but(seen.name for seen in here)
        assert [watcher.is_dead(seen) for seen in here] == [False, False]
    assert len(watcher._first_seen) == 2
    now[0] = 10.0
    assert watcher.is_dead(stays)


def test_a_worker_forgets_the_jobs_of_others_once_they_have_ended(
    quick: Place, trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    watchers: list[Watcher] = []

    def made(*words: Any) -> Watcher:
        watchers.append(Watcher(*words))
        return watchers[-1]

    monkeypatch.setattr(tune_jobs, "Watcher", made)
    db, limits = quick.database(), Limits(active_jobs=100)
    for _ in range(20):
        queue_job(quick)
    claims = [db.write("claim", lambda tx: running.claim_next(tx, "another", limits, time.time(), new_id)) for _ in range(20)]
    with worker_thread(quick, term_s=600.0, trainers=trainers):
        until(lambda: watchers and len(watchers[0]._first_seen) == 20)
        for claim in claims:
            assert claim is not None
            db.write("end", lambda tx, c=claim: running.fail(tx, c.lease, c.job.id, "code", "message", None, time.time(), new_id))
        until(lambda: not watchers[0]._first_seen)
    db.close()


def test_the_judge_forgets_a_file_that_was_deleted_while_another_judged_it(service: Service) -> None:
    content = json.dumps({}).encode()
    for n in range(3):
        file = File(f"file-{n}", "default", float(n), "fine-tune", "a", 2, service.blobs.put_bytes("default", content))
        service.db.write("add", lambda tx, file=file: files.add(tx, file))
        service.db.write("claim", lambda tx, n=n: leases.claim(tx, f"file:file-{n}", "another"))
    duty = JudgeFiles(service)
    assert not duty.turn()
    assert len(duty._watcher._first_seen) == 3
    for n in range(2):
        service.db.write("delete", lambda tx, n=n: files.delete(tx, f"file-{n}", "default", 1.0))
    assert not duty.turn()
    assert list(duty._watcher._first_seen) == ["file:file-2"]


def test_deliveries_forget_the_rest_of_an_endpoint_that_was_deleted(service: Service) -> None:
    now = [0.0]
    duty = DeliverWebhooks(service, Outward(), monotonic=lambda: now[0])
    made = [webhooks.Endpoint(f"whep_{n}", "default", 1.0, 1.0, "test", "https://a.test", ["batch.failed"], []) for n in range(500)]
    service.db.write("create", lambda tx: [webhooks.create(tx, endpoint) for endpoint in made])
    for endpoint in made:
        duty._let_rest(endpoint, False, service.clock())
    duty.turn()
    assert len(duty._rests) == 500
    service.db.write(
        "delete",
        lambda tx: tx.execute(sa.update(webhook_endpoints).where(webhook_endpoints.c.id != "whep_7").values(deleted_at=1.0)),
    )
    now[0] += PRUNE_EVERY_S
    duty.turn()
    assert list(duty._rests) == ["whep_7"]
    duty.close()


def test_links_forget_a_thousand_workers_that_are_gone_and_find_the_connection_of_one_whose_row_comes_back(quick: Place) -> None:
    async def look(living: Answerer) -> None:
        links = Links()
        link = await links.best("toy", [living])
        assert link is not None
        for n in range(1000):
            dead = Answerer(f"gone-{n}", "toy", "127.0.0.1:1", "another machine", 1.0, "secret")
            assert await links.best("toy", [dead]) is None
            assert len(links._known["toy"]) == 2
            assert len(links._stillness["toy"]._seen) == 1
        assert await links.best("toy", [replace(living, beat=living.beat + 1)]) is link, "there is no second connection to it"
        link.close()
        assert await links.best("toy", []) is None
        assert links._known["toy"] == {}

    with worker(quick, "toy"):
        asyncio.run(look(only_row(quick.database())))


def only_row(db: Database) -> Answerer:
    (found,) = db.read(answerers.page)
    db.close()
    return found
