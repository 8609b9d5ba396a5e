"""What an owner hears of a run: each step once and with its score, whatever is made again; when it will end; no server's paths."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from kivnun.events import (
    CheckpointSaved,
    DataLoaded,
    Evaluated,
    Event,
    Resumed,
    RunFinished,
    RunStarted,
    StepDone,
    Warned,
    to_json,
)
from kivnun.jobs.running import Told
from kivnun.worker.relay import NotReproduced, Pace, Relay, Saved, without_paths

AT = datetime(2026, 1, 1, tzinfo=UTC).timestamp()


def stamped(event: Event, at: float = 0.0) -> Event:
    return replace(event, time=datetime.fromtimestamp(AT + at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"))


def step(number: int, loss: float = 0.5, seconds: float = 1.0, steps: int = 4) -> StepDone:
    return StepDone(number, steps, 0, loss, 1.0, 0.1, 1, 10, 7, 10, seconds)


def data(held_out: int) -> DataLoaded:
    return DataLoaded("messages", 4, held_out, 40, 28, 0, 0)


def scored(number: int, nll: float, accuracy: float = 0.75) -> Evaluated:
    return Evaluated("tuned", number, nll, 2, {}, {}, [], accuracy=accuracy)


def saved(number: int) -> CheckpointSaved:
    return CheckpointSaved(number, f"checkpoints/step-{number:06d}", 0.1)


def write(record: Path, *events: Event) -> None:
    with record.open("a", encoding="utf-8") as file:
        file.writelines(to_json(stamped(event)) + "\n" for event in events)


def heard(found: list[Told | Saved]) -> list[str | int]:
    return [item.message if isinstance(item, Told) else item.step for item in found]


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def test_without_held_out_rows_a_step_is_told_at_once(record: Path) -> None:
    relay = Relay(record, {}, frozenset())
    assert relay.read() == []
    write(record, RunStarted("run", "hash"), data(0), step(1), saved(1))
    assert heard(relay.read()) == ["Step 1/4: training loss=0.50", 1]
    assert relay.read() == []


def test_with_held_out_rows_a_step_waits_for_its_score(record: Path) -> None:
    relay = Relay(record, {}, frozenset())
    write(record, RunStarted("run", "hash"), data(2), step(1), step(2))
    assert heard(relay.read()) == ["Step 1/4: training loss=0.50"]
    write(record, scored(2, 0.4), saved(2), step(3), step(4))
    told = relay.read()
    assert heard(told) == ["Step 2/4: training loss=0.50, full validation loss=0.40", 2, "Step 3/4: training loss=0.50"]
    assert isinstance(told[0], Told)
    assert {name: told[0].data[name] for name in told[0].data if "valid" in name} == {
        "valid_loss": 0.4, "valid_mean_token_accuracy": 0.75, "full_valid_loss": 0.4, "full_valid_mean_token_accuracy": 0.75,
    }  # fmt: skip
    write(record, saved(4))
    assert heard(relay.read()) == [4], "the last step's score follows its checkpoint"
    write(record, scored(4, 0.3), RunFinished("succeeded", 4, 28, 4.0, 0))
    assert heard(relay.read()) == ["Step 4/4: training loss=0.50, full validation loss=0.30"]


def test_a_torn_line_waits_for_its_rest(record: Path) -> None:
    relay = Relay(record, {}, frozenset())
    write(record, data(0))
    line = to_json(stamped(step(1))) + "\n"
    with record.open("a", encoding="utf-8") as file:
        file.write(line[:50])
    assert relay.read() == []
    with record.open("a", encoding="utf-8") as file:
        file.write(line[50:])
    assert heard(relay.read()) == ["Step 1/4: training loss=0.50"]


def test_steps_made_again_are_not_told_again_and_must_be_the_same(record: Path) -> None:
    first = Relay(record, {}, frozenset())
    write(record, RunStarted("run", "hash"), data(2), step(1), saved(1), step(2), step(3))
    assert heard(first.read()) == ["Step 1/4: training loss=0.50", 1, "Step 2/4: training loss=0.50"]
    write(
        record, RunStarted("run", "hash"), data(2), Resumed(1, "checkpoints/step-000001"), step(2), step(3), scored(3, 0.2), step(4)
    )
    assert heard(first.read()) == ["Step 3/4: training loss=0.50, full validation loss=0.20"]
    told = {item.data["step"]: item.data for item in Relay(record, {}, frozenset()).read() if isinstance(item, Told)}
    again = Relay(record, told, frozenset())
    assert [item for item in again.read() if isinstance(item, Told)] == []
    lied = {**told, 2: {**told[2], "train_loss": 0.51}}
    with pytest.raises(NotReproduced, match="step 2 was made again and differs in train_loss"):
        Relay(record, lied, frozenset()).read()


def test_a_job_half_way_at_an_upgrade_goes_on_though_more_is_told_of_a_step_than_before(record: Path) -> None:
    before = Relay(record, {}, frozenset())
    write(record, data(2), step(1), scored(1, 0.4), step(2))
    before.read()
    old = {name: value for name, value in before.last.items() if not name.startswith("valid")}
    old["full_valid_mean_token_accuracy"] = None
    assert Relay(record, {1: old}, frozenset()).read() == []
    with pytest.raises(NotReproduced, match="differs in full_valid_loss"):
        Relay(record, {1: {**old, "full_valid_loss": 0.41}}, frozenset()).read()


def test_an_accuracy_that_was_not_measured_is_null(record: Path) -> None:
    write(record, data(2), step(1), scored(1, 0.4, math.nan), saved(1))
    told = Relay(record, {}, frozenset()).read()[0]
    assert isinstance(told, Told)
    assert (told.data["valid_loss"], told.data["valid_mean_token_accuracy"]) == (0.4, None)


def test_a_warning_is_told_once_over_all_workers_of_a_job(record: Path) -> None:
    write(record, Warned("look out"), Warned("look out"), Warned("it lies in /srv/kivnun/scratch/ftjob-1/training.jsonl"))
    found = Relay(record, {}, frozenset()).read()
    assert heard(found) == ["look out", "it lies in training.jsonl"]
    assert Relay(record, {}, frozenset({"look out", "it lies in training.jsonl"})).read() == []


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("cannot write /srv/data/jobs/x: the disk is full", "cannot write x: the disk is full"),
        ("rows in it: training.jsonl:1, training.jsonl:2", "rows in it: training.jsonl:1, training.jsonl:2"),
        ("base '/models/phi/' is 4/5 done", "base 'phi/' is 4/5 done"),
        ("see microsoft/phi-4 or 1/2", "see microsoft/phi-4 or 1/2"),
    ],
)
def test_paths_of_the_service_are_cut_to_their_last_name(said: str, told: str) -> None:
    assert without_paths(said) == told


@pytest.mark.parametrize("lengths", [[1.0], [0.5, 1.5, 1.0, 0.7, 9.0, 1.1], [3.0, 1.0]], ids=["even", "uneven", "two lengths"])
@pytest.mark.parametrize("score_every", [None, 10])
def test_the_end_is_foretold_within_a_quarter_after_a_tenth_of_the_steps(lengths: list[float], score_every: int | None) -> None:
    steps, now, foretold, pace = 120, 5.0, list[float](), Pace()
    pace.hear(stamped(RunStarted("run", "hash"), 0.0))
    pace.hear(stamped(data(9), 2.0))
    pace.hear(stamped(Evaluated("base", 0, 1.0, 9, {}, {}, []), now))
    assert pace.finish() is None
    for number in range(1, steps + 1):
        seconds = lengths[number % len(lengths)]
        now += seconds
        pace.hear(stamped(step(number, 0.5, seconds, steps), now))
        if score_every is not None and number % score_every == 0:
            now += 3.0
            pace.hear(stamped(scored(number, 0.4), now))
        if number * 10 >= steps:
            end = pace.finish()
            assert end is not None
            foretold.append(end - AT)
    ended = now + 3.0
    assert max(abs(end - ended) for end in foretold) <= 0.25 * ended


def test_a_first_step_that_warms_up_and_a_stall_are_not_taken_for_the_rule_and_what_lasts_is() -> None:
    pace, now = Pace(), 0.0
    pace.hear(stamped(RunStarted("run", "hash"), 0.0))
    for number in range(1, 4001):
        seconds = 30.0 if number == 1 else 5.0 if number == 90 else 1.0 if number <= 1000 else 3.0
        now += seconds
        pace.hear(stamped(step(number, 0.5, seconds, 4000), now))
        if number in (2, 100, 1000):
            assert pace.step_s == pytest.approx(1.0, rel=0.05)
    assert pace.step_s == pytest.approx(3.0, rel=0.01)
