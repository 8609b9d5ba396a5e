"""A clerk that is killed at any durable point leaves nothing undone: another one ends the batch and delivers every event."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from clerk_scenario import LINES_AT_ONCE, is_done
from kivnun.jobs import batches, files, webhooks
from kivnun.jobs.batches import Batch
from kivnun.jobs.files import File
from kivnun.jobs.ids import new_id
from kivnun.jobs.place import Place, place_in
from kivnun.jobs.schema import deliveries, outbox
from service_parts import fill
from webhook_receiver import Receiver

NUM_LINES = 5
TESTS = Path(__file__).parents[1]


def prepared(folder: Path, db_url: str, receiver: Receiver) -> Place:
    """Return a place that holds a batch to run, an event to deliver, and an endpoint that wants both."""
    folder.mkdir()
    config = folder / "config.yaml"
    config.write_text(f"version: 1\nwebhook_hosts: ['{receiver.host}']\n")
    place = place_in(folder, db_url, config=config)
    db, blobs = place.database(), place.blobs()
    fill(db)
    rows = [
        {"custom_id": f"q{n}", "method": "POST", "url": "/v1/completions", "body": {"model": "toy", "prompt": f"word {n}"}}
        for n in range(NUM_LINES)
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = File("file-in", "default", 1.0, "batch", "in.jsonl", len(content), blobs.put_bytes("default", content), "processed")
    secrets = [{"secret": webhooks.new_secret(), "until": None}]
    types = ["batch.completed", "fine_tuning.job.succeeded"]
    endpoint = webhooks.Endpoint("whep_1", "default", 1.0, 1.0, "test", receiver.url, types, secrets)

    def write(tx: sa.Connection) -> None:
        files.add(tx, file)
        webhooks.create(tx, endpoint)
        webhooks.tell(tx, "default", "fine_tuning.job.succeeded", "ftjob-1", 1.0, new_id)
        batches.create(tx, Batch("batch_1", "default", time.time(), "/v1/completions", "key_1", "file-in", "24h"))

    db.write("prepare", write)
    db.close()
    return place


Run = Callable[[Place, str | None, int], dict[str, Any]]


@pytest.fixture
def run() -> Iterator[Run]:
    """Return a way to run clerks one after the other: killed at the n-th point of a name, or (None) until all is done."""
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    words = [sys.executable, str(TESTS / "clerk_scenario.py")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdin
        assert process.stdout
        stdin, stdout = process.stdin, process.stdout

        def clerk(place: Place, kill: str | None, at: int) -> dict[str, Any]:
            told = [str(place.data), place.db_url, str(place.config)]
            stdin.write(json.dumps({"place": told, "kill": kill, "at": at}) + "\n")
            stdin.flush()
            return json.loads(stdout.readline())

        yield clerk
        stdin.close()
        assert process.wait(10) == 0


def check(place: Place, receiver: Receiver) -> None:
    """Check that everything was done, and nothing twice that must not be."""
    db, blobs = place.database(), place.blobs()
    assert is_done(db)
    batch = db.read(lambda tx: batches.find(tx, "batch_1", "default"))
    assert batch is not None
    assert (batch.status, batch.total, batch.completed, batch.failed) == ("completed", NUM_LINES, NUM_LINES, 0)
    assert batch.usage == {"prompt_tokens": NUM_LINES, "completion_tokens": NUM_LINES}
    output = db.read(lambda tx: files.find(tx, batch.output_file or "", "default"))
    assert output is not None
    lines = [json.loads(line) for line in b"".join(blobs.read(output.blob)).splitlines()]
    assert [(line["custom_id"], line["response"]["body"]["choices"][0]["text"]) for line in lines] == [
        (f"q{n}", f"word {n}") for n in range(NUM_LINES)
    ]
    asked = Counter((place.data / "asked").read_text().split("\n")[:-1])
    assert set(asked) == {f"word {n}" for n in range(NUM_LINES)}
    assert sum(asked.values()) <= NUM_LINES + LINES_AT_ONCE, "no more is asked again than was being answered"
    events = db.read(lambda tx: tx.execute(sa.select(outbox.c.id, outbox.c.type)).all())
    assert sorted(event.type for event in events) == ["batch.completed", "fine_tuning.job.succeeded"]
    made = db.read(lambda tx: tx.execute(sa.select(deliveries.c.event, deliveries.c.status)).all())
    assert sorted(tuple(row) for row in made) == sorted((event.id, "delivered") for event in events)
    got = Counter(headers["webhook-id"] for headers, _ in receiver.got)
    assert set(got) == {event.id for event in events}
    assert sum(got.values()) <= 3, "one crash sends one event again at most"
    assert len({body for _, body in receiver.got}) == 2
    db.close()


def crashed_at(run: Run, folder: Path, db_url: str, kill: str, at: int) -> bool:
    """Kill a clerk at a point, let another one end it, check; return whether the point was reached."""
    receiver = Receiver()
    end = receiver.start()
    place = prepared(folder, db_url, receiver)
    first = run(place, kill, at)
    last = run(place, None, 1)
    end()
    assert last["status"] == 0
    check(place, receiver)
    return first["status"] == -9


def test_a_clerk_killed_between_an_answer_and_its_record_is_followed_by_one_that_ends_it(tmp_path: Path, run: Run) -> None:
    for n, kill in enumerate(("before settle", "after record answers", "before close batch")):
        assert crashed_at(run, tmp_path / str(n), f"sqlite:///{tmp_path / f'{n}.sqlite'}", kill, 1), kill


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_clerk_killed_at_any_durable_point_is_followed_by_one_that_ends_it(
    tmp_path: Path, request: pytest.FixtureRequest, run: Run
) -> None:
    from postgres import empty_database

    for kind in ("sqlite", "postgresql"):
        points = _points(run, tmp_path / kind, f"sqlite:///{tmp_path / kind}.sqlite")
        assert len(points) >= 26, points
        reached: set[str] = set()
        for n, (kill, at) in enumerate(points):
            folder = tmp_path / f"{kind}-{n}"
            if kind == "sqlite":
                killed = crashed_at(run, folder, f"sqlite:///{folder}.sqlite", kill, at)
            else:
                with empty_database(request.getfixturevalue("postgres")) as url:
                    killed = crashed_at(run, folder, url, kill, at)
            if killed:
                reached.add(kill)
        assert reached == {kill for kill, _ in points}, "each name was killed at; how often one comes depends on time"


def _points(run: Run, folder: Path, db_url: str) -> list[tuple[str, int]]:
    """Return the points that a clerk passes which nothing kills, each with how often it came before."""
    receiver = Receiver()
    end = receiver.start()
    place = prepared(folder, db_url, receiver)
    whole = run(place, None, 1)
    end()
    assert whole["status"] == 0
    check(place, receiver)
    counted: Counter[str] = Counter()
    found: list[tuple[str, int]] = []
    for point in whole["points"]:
        if not point.endswith((" beat", " release")):  # they come with time, or when all is done
            counted[point] += 1
            found.append((point, counted[point]))
    return found
