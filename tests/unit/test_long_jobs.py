"""Jobs of very many steps: what a worker holds of them does not grow with their number, and nothing of what is told changes."""

from __future__ import annotations

import csv
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kivnun.events import CheckpointSaved, DataLoaded, Event, StepDone, to_json
from kivnun.jobs import results, running
from kivnun.jobs.config import Limits
from kivnun.jobs.ids import new_id
from kivnun.jobs.place import Place
from kivnun.jobs.running import Told
from kivnun.worker import relay as relays
from kivnun.worker.relay import Relay, Saved
from toy_jobs import queue_job, toy_place

EVERY = 100  # steps between checkpoints


def write_record(record: Path, steps: int) -> None:
    def events() -> Iterator[Event]:
        yield DataLoaded("messages", 4, 0, 40, 28, 0, 0)
        for number in range(1, steps + 1):
            yield StepDone(number, steps, 0, 0.5, 1.0, 0.1, 1, 10, 7, 10, 0.01)
            if number % EVERY == 0:
                yield CheckpointSaved(number, f"checkpoints/step-{number:06d}", 0.1)

    with record.open("w", encoding="utf-8") as file:
        file.writelines(to_json(replace(event, time="2026-01-01T00:00:00.000Z")) + "\n" for event in events())


def peak_of(act: Callable[[], object]) -> int:
    """Return how many bytes of memory were taken at most."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_relay_reads_a_long_record_in_parts_and_in_the_memory_of_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relays, "READ_BYTES", 1 << 14)

    def read(steps: int, past: int = 0) -> tuple[int, int, int]:
        """Return how many steps were told and checkpoints found, and the last step that was read."""
        relay, told, saved = Relay(tmp_path / str(steps), {}, frozenset(), past), 0, 0
        relay.is_behind = True
        while relay.is_behind:
            found = relay.read()
            told += sum(isinstance(item, Told) for item in found)
            saved += sum(isinstance(item, Saved) and item.metrics["train_loss"] == 0.5 for item in found)
            assert len(relay._told) <= 2 * EVERY + 100  # pyright: ignore[reportPrivateUsage]
        return told, saved, relay.last["step"]

    for steps in (500, 2500):
        write_record(tmp_path / str(steps), steps)
        assert read(steps) == (steps, steps // EVERY, steps)
        assert read(steps, past=steps - 30) == (30, steps // EVERY, steps), "what a snapshot holds is not told again"
    assert peak_of(lambda: read(2500)) < peak_of(lambda: read(500)) + (1 << 16)


def test_the_tables_of_a_long_job_are_written_row_by_row(tmp_path: Path) -> None:
    def rows(count: int) -> Iterator[dict[str, Any]]:
        return ({"step": number, "train_loss": 1 / number, "valid_loss": None} for number in range(1, count + 1))

    peak = peak_of(lambda: results.write_tables(rows(20_000), tmp_path))
    assert peak < 1 << 20
    openai, azure = results.write_tables(rows(3), tmp_path)
    assert openai.read_bytes() == (
        b"step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,1.0,,,\n2,0.5,,,\n3,0.33333,,,\n"
    )
    with azure.open(encoding="utf-8") as file:
        assert [row["train_loss"] for row in csv.DictReader(file)] == ["1.0", "0.5", "0.33333"]


@pytest.fixture
def place(tmp_path: Path, db_url: str) -> Place:
    return toy_place(tmp_path / "place", db_url)


def test_the_records_give_the_steps_of_the_last_run_page_by_page_and_those_after_a_snapshot(place: Place) -> None:
    job_id, db = queue_job(place), place.database()
    claim = db.write("claim", lambda tx: running.claim_next(tx, "w", Limits(), 1.0, new_id))
    assert claim is not None

    def tell(steps: range, loss: float) -> None:
        told = [Told("x", type="metrics", data={"step": step, "train_loss": loss}, step=step) for step in steps]
        db.write("tell", lambda tx: running.tell(tx, claim.lease, job_id, told, None, 2.0, new_id))

    assert db.read(lambda tx: running.first_step_at(tx, job_id)) == 0
    tell(range(1, 8), 9.0)
    db.write("over", lambda tx: running.start_over(tx, claim.lease, job_id, 3.0, new_id))
    tell(range(1, 6), 0.5)
    found, number = [], db.read(lambda tx: running.first_step_at(tx, job_id))
    while page := db.read(lambda tx, number=number: running.metrics_page(tx, job_id, number, 2)):
        assert len(page) <= 2
        found += [data for _, data in page]
        number = page[-1][0] + 1
    assert found == [{"step": step, "train_loss": 0.5} for step in range(1, 6)]
    told = db.read(lambda tx: running.metrics_told(tx, job_id, 3))
    assert told == {step: {"step": step, "train_loss": 0.5} for step in (4, 5)}
    db.close()
