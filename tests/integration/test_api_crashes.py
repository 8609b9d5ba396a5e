"""An API killed around each durable effect of each write: a stock client's retry has the result of an undisturbed call, once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from openai import DefaultHttpxClient, OpenAI

from kivnun.jobs import models
from kivnun.jobs.database import Database
from kivnun.jobs.ids import new_id
from kivnun.jobs.models import Model
from kivnun.jobs.place import Place
from kivnun.jobs.schema import files, metadata, upload_parts
from kivnun.jobs.snapshots import keep_files
from kivnun.service.run import service_of
from kivnun.service.sweeping import Sweep
from service_jobs import conversations, lines
from service_parts import KEY
from toy_jobs import queue_job, toy_place

TESTS = Path(__file__).parents[1]
CHAT = "/v1/chat/completions"


class World:
    """A place, an API on it that can be killed at a point, and a stock client."""

    def __init__(self, place: Place, process: subprocess.Popen[str]) -> None:
        assert process.stdin
        assert process.stdout
        self.place, self._stdin, self._stdout = place, process.stdin, process.stdout
        self.db = place.database()
        unkept = DefaultHttpxClient(limits=httpx2.Limits(max_keepalive_connections=0))  # no connection outlives its API
        address = f"http://127.0.0.1:{self._stdout.readline().strip()}/v1"
        self.client = OpenAI(base_url=address, api_key=KEY, max_retries=3, http_client=unkept)
        self._count = 0

    def close(self) -> None:
        self.client.close()
        self.db.close()
        self._stdin.close()

    def begin(self, kill_at: int = 0) -> list[str]:
        """Start another API; return the points that those before it have passed."""
        self._stdin.write(f"{kill_at}\n")
        self._stdin.flush()
        return json.loads(self._stdout.readline())

    def name(self) -> str:
        """Return a name that nobody gave before: an equal create of a moment ago is what a retry is taken for."""
        self._count += 1
        return f"{self._count}.jsonl"

    def rows(self) -> bytes:
        """Return examples that nobody sent before."""
        self._count += 1
        return conversations(10, 10_000 + 10 * self._count)  # as many bytes each time

    def file(self) -> str:
        return self.client.files.create(file=("a.jsonl", self.rows()), purpose="fine-tune").id

    def questions(self) -> str:
        body = {"model": "toy", "messages": [{"role": "user", "content": self.name()}]}
        content = lines([{"custom_id": "q", "method": "POST", "url": CHAT, "body": body}])
        return self.client.files.create(file=("q.jsonl", content), purpose="batch").id

    def upload(self) -> str:
        return self.client.uploads.create(bytes=1000, filename=self.name(), mime_type="text/jsonl", purpose="fine-tune").id

    def parts(self) -> tuple[str, list[str]]:
        """Return an upload that can be completed, and its parts."""
        content = self.rows()
        halves = (content[:100], content[100:])
        made = self.client.uploads.create(bytes=len(content), filename=self.name(), mime_type="text/jsonl", purpose="fine-tune")
        return made.id, [self.client.uploads.parts.create(made.id, data=half).id for half in halves]

    def batch(self) -> str:
        return self.client.batches.create(input_file_id=self.questions(), endpoint=CHAT, completion_window="24h").id

    def job(self, **columns: Any) -> str:
        return queue_job(self.place, method={"type": "supervised", "supervised": {"hyperparameters": {}}}, **columns)

    def model(self) -> str:
        """Return a tuned model without files."""
        name, (manifest, _) = new_id("ft:toy:kivnun::"), keep_files(self.place.blobs(), "default", {})
        made = Model(name, "default", 1.0, self.job(), "toy", 9, manifest, "hash")
        self.db.write("model", lambda tx: models.add(tx, made))
        return name


@dataclass(frozen=True)
class Write:
    """What a client asks for, what must be there before, and the transaction that makes it."""

    prepare: Callable[[World], Any]
    ask: Callable[[OpenAI, Any], Any]
    transaction: str


WRITES = {
    "a file": Write(World.rows, lambda c, rows: c.files.create(file=("a.jsonl", rows), purpose="fine-tune"), "add file"),
    "a file's end": Write(World.file, lambda c, file: c.files.delete(file), "delete file"),
    "an upload": Write(
        World.name, lambda c, name: c.uploads.create(bytes=9, filename=name, mime_type="", purpose="fine-tune"), "create upload"
    ),
    "a part": Write(World.upload, lambda c, upload: c.uploads.parts.create(upload, data=os.urandom(100)), "add part"),
    "an upload's whole": Write(World.parts, lambda c, made: c.uploads.complete(made[0], part_ids=made[1]), "complete upload"),
    "an upload's end": Write(World.upload, lambda c, upload: c.uploads.cancel(upload), "cancel upload"),
    "a job": Write(World.file, lambda c, file: c.fine_tuning.jobs.create(model="toy", training_file=file), "create job"),
    "a job's pause": Write(World.job, lambda c, job: c.fine_tuning.jobs.pause(job), "pause job"),
    "a job's resumption": Write(
        lambda world: world.job(status="paused"), lambda c, job: c.fine_tuning.jobs.resume(job), "resume job"
    ),
    "a job's end": Write(World.job, lambda c, job: c.fine_tuning.jobs.cancel(job), "cancel job"),
    "a model's end": Write(World.model, lambda c, model: c.models.delete(model), "model deleted"),
    "a batch": Write(
        World.questions,
        lambda c, file: c.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h"),
        "create batch",
    ),
    "a batch's end": Write(World.batch, lambda c, batch: c.batches.cancel(batch), "cancel batch"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    place = toy_place(tmp_path_factory.mktemp("service"))
    words = [sys.executable, str(TESTS / "api_scenario.py"), str(place.data), place.db_url, str(place.config)]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True) as process:
        made = World(place, process)
        made.client.models.list()  # the key's first use is noted once
        yield made
        made.close()
        assert process.wait(10) == 0


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def census(db: Database) -> Counter[tuple[str, ...]]:
    """Return how many rows there are of each kind and state."""

    def read(tx: sa.Connection) -> Counter[tuple[str, ...]]:
        found: Counter[tuple[str, ...]] = Counter()
        for table in metadata.sorted_tables:
            states = [table.c[name] for name in ("status", "deleted_at", "type") if name in table.c]
            for row in tx.execute(sa.select(*states, sa.literal(1))):
                found[table.name, *(str(value is not None) if type(value) is float else str(value) for value in row)] += 1
        return found

    return db.read(read)


def told(answer: Any) -> dict[str, Any]:
    """Return what an answer says apart from names, times and the place in a line."""
    return {
        key: value
        for key, value in answer.to_dict().items()
        if not key.endswith(("id", "_at", "seed", "file", "filename", "queue"))
    }


def undisturbed(world: World, write: Write) -> tuple[list[str], Counter[tuple[str, ...]], dict[str, Any]]:
    """Return the points that a write passes, what it changes, and its answer."""
    given = write.prepare(world)
    world.begin()
    before = census(world.db)
    answer = write.ask(world.client, given)
    change = census(world.db)
    change.subtract(before)
    return world.begin(), change, told(answer)


def killed_at(world: World, write: Write, point: int) -> tuple[Counter[tuple[str, ...]], dict[str, Any]]:
    """Kill the API at a point of a write; return what has changed in the end, and what the client was answered."""
    given = write.prepare(world)
    world.begin(point)
    before = census(world.db)
    answer = write.ask(world.client, given)
    change = census(world.db)
    change.subtract(before)
    return change, told(answer)


def assert_nothing_is_left_over(world: World) -> None:
    """Check that a sweep leaves the blobs that rows name, each whole, and no others."""
    service = service_of(world.place, world.place.data)
    Sweep(service, young_s=-60.0, settle_s=0.0, every_s=0.0).turn()

    def named(tx: sa.Connection) -> set[str]:
        kept = [sa.select(column).where(files.c.deleted_at.is_(None)) for column in (files.c.blob, files.c.report)]
        return {blob for query in (*kept, sa.select(upload_parts.c.blob)) for blob in tx.execute(query).scalars() if blob}

    expected = world.db.read(named)
    assert {name for name, _ in service.blobs.names()} == expected
    for name in expected:
        target = service.scratch / name.partition("/")[2]
        service.blobs.fetch(name, target)
        target.unlink()
    service.db.close()


def test_a_write_whose_answer_a_crash_took_is_answered_again_and_done_once(world: World) -> None:
    for name in ("a file's end", "a job"):
        write = WRITES[name]
        points, change, answer = undisturbed(world, write)
        assert killed_at(world, write, points.index(f"after {write.transaction}") + 1) == (change, answer), name
        assert points[-1] in world.begin()
    assert_nothing_is_left_over(world)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITES)
def test_an_api_killed_at_any_point_of_a_write_leaves_what_an_undisturbed_one_does(world: World, name: str) -> None:
    write = WRITES[name]
    points, change, answer = undisturbed(world, write)
    assert points.count(f"after {write.transaction}") == 1
    for number, point in enumerate(points, 1):
        assert killed_at(world, write, number) == (change, answer), point
        assert world.begin()[:number] == points[:number], "it was killed there"
    assert_nothing_is_left_over(world)
