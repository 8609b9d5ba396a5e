"""The record of a run survives kills, full disks and torn lines, and damage is named by its line."""

from __future__ import annotations

import json
import math
import random
import resource
import subprocess
import sys
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disks import forbidden_folder, read_only, small_disk
from kivnun.errors import IntegrityError, RunFolderError, StorageError
from kivnun.events import (
    EVENTS,
    AdapterOpened,
    BaseLoaded,
    CheckpointSaved,
    DataLoaded,
    Evaluated,
    Event,
    EventLog,
    PassesShortened,
    Planned,
    Resumed,
    RunFailed,
    RunFinished,
    RunInterrupted,
    RunStarted,
    StepDone,
    Warned,
    from_json,
    read_events,
    to_json,
    utc_now,
)


def clock() -> datetime:
    return datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)


def step(number: int, loss: float = 1.5) -> StepDone:
    return StepDone(number, 10, 0, loss, 0.25, 1e-3, 8, 100, 40, 100, 0.5)


def evaluated(which: str, number: int) -> Evaluated:
    assert which in ("base", "tuned")
    return Evaluated(which, number, 2.5, 3, {"chrf": 41.0}, {"nll": (2.0, 3.0)}, [{"prompt": "שלום", "exact": True}])


ONE_OF_EACH: list[Event] = [
    RunStarted("demo", "ab" * 32),
    DataLoaded("messages", 36, 4, 1000, 300, 1, 0, findings={"duplicates": 2, "lengths": [[16, 30, 4], [32, 6, 0]]}),
    Planned(2**30, {"weights": 2**29, "process": 2**29}, 12.5, 10),
    BaseLoaded("kivnun/tiny-phi", 3_800_000, "fp32", "cd" * 32, 0.25),
    AdapterOpened("lora", 1024, {"qkv_proj": 4, "o_proj": 4}, 8),
    evaluated("base", 0),
    step(1),
    PassesShortened(2, 2048),
    CheckpointSaved(1, "checkpoints/step-000001", 0.125),
    Resumed(1, "checkpoints/step-000001"),
    Warned("two\nlines, and \u2028 a separator"),
    RunFailed("storage", "the disk is full"),
    RunInterrupted(1),
    RunFinished("succeeded", 10, 400, 5.5, 2**30),
]


def write(path: Path, events: list[Event]) -> None:
    with EventLog(path, clock) as log:
        for event in events:
            log.append(event)


def test_every_event_reads_back_as_it_was_written(tmp_path: Path) -> None:
    assert {type(event) for event in ONE_OF_EACH} == set(EVENTS.values())
    write(tmp_path / "events.jsonl", ONE_OF_EACH)
    assert read_events(tmp_path / "events.jsonl") == [replace(event, time="2026-01-02T03:04:05.678Z") for event in ONE_OF_EACH]


def test_a_line_begins_with_name_and_time_and_is_flat_json(tmp_path: Path) -> None:
    write(tmp_path / "events.jsonl", [step(1)])
    line = (tmp_path / "events.jsonl").read_text()
    assert line.startswith('{"name": "step_done", "time": "2026-01-02T03:04:05.678Z", "step": 1, ')
    assert line.count("\n") == 1


def test_time_is_told_in_utc_wherever_the_clock_stands(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl", lambda: clock().astimezone(timezone(timedelta(hours=2)))) as log:
        assert log.append(Warned("x")).time == "2026-01-02T03:04:05.678Z"
    assert utc_now().tzinfo is UTC


@settings(deadline=None)
@given(st.floats(), st.floats(allow_nan=False))
def test_any_number_survives_even_those_json_lacks(loss: float, rate: float) -> None:
    back = from_json(to_json(replace(step(1, loss), learning_rate=rate)))
    assert isinstance(back, StepDone)
    assert back.learning_rate == rate
    assert back.loss == loss or (math.isnan(loss) and math.isnan(back.loss))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"name": "unheard_of"}', "no known event"),
        ('{"name": ["warned"]}', "no known event"),
        ('{"name": "warned", "time": ""}', "must have message, time"),
        ('{"name": "warned", "time": "", "message": "x", "more": 1}', "must have message, time"),
        ('{"name": "warned", "time": "", "message": 1}', "message must be str, got int"),
        ('{"name": "run_interrupted", "time": "", "step": true}', "step must be int, got bool"),
        ('{"name": "run_interrupted", "time": "", "step": 1.0}', "step must be int, got float"),
    ],
)
def test_a_line_that_is_no_event_is_refused(line: str, reason: str) -> None:
    with pytest.raises(IntegrityError, match=reason):
        from_json(line)


def test_a_field_of_the_wrong_kind_is_refused_before_it_is_written(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl", clock) as log:
        with pytest.raises(TypeError, match="which must be"):
            log.append(replace(evaluated("base", 0), which="other"))  # type: ignore[arg-type]
        log.append(Warned("after"))
    assert [event.name for event in read_events(tmp_path / "events.jsonl")] == ["warned"]


def test_a_damaged_line_in_the_middle_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, [step(1), step(2), step(3)])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2])
    with pytest.raises(IntegrityError, match=r"events\.jsonl:2: not JSON"):
        read_events(path)
    path.write_bytes(lines[0] + b"\xff\n" + lines[2])
    with pytest.raises(IntegrityError, match=r"events\.jsonl:2: not UTF-8"):
        read_events(path)
    path.write_bytes(lines[0] + b"\n" + lines[2])
    with pytest.raises(IntegrityError, match=r"events\.jsonl:2: not JSON"):
        read_events(path)


def test_a_line_torn_at_any_byte_is_skipped_by_readers_and_cut_off_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, [step(1), evaluated("base", 0)])
    content = path.read_bytes()
    first, last = (from_json(line) for line in content.decode().splitlines())
    start = content.index(b"\n") + 1
    for end in range(start, len(content) + 1):
        path.write_bytes(content[:end])
        whole = [first, last] if end >= len(content) - 1 else [first]  # only the line feed missing: the event is all there
        assert read_events(path) == whole
        with EventLog(path, clock) as log:
            new = log.append(Warned("resumed"))
        assert read_events(path) == [*whole, new]


def test_a_power_cut_that_leaves_zeros_at_the_end_costs_only_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, [step(1)])
    with path.open("ab") as file:
        file.write(bytes(4096))
    assert len(read_events(path)) == 1
    write(path, [step(2)])
    assert [event.step for event in read_events(path) if isinstance(event, StepDone)] == [1, 2]


def test_what_a_run_redoes_after_a_checkpoint_supersedes_what_it_did_before(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    first = [evaluated("base", 0), step(1), CheckpointSaved(1, "c/1", 0.0), step(2), evaluated("tuned", 2), Warned("kept")]
    second = [Resumed(1, "c/1"), step(2, 9.0), step(3)]
    write(path, [*first, *second])
    told = [(event.name, getattr(event, "step", None), getattr(event, "loss", None)) for event in read_events(path)]
    assert told == [
        ("evaluated", 0, None),
        ("step_done", 1, 1.5),
        ("checkpoint_saved", 1, None),
        ("warned", None, None),
        ("resumed", 1, None),
        ("step_done", 2, 9.0),
        ("step_done", 3, 1.5),
    ]


def test_a_run_that_started_over_keeps_the_score_of_the_base_and_no_step(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, [evaluated("base", 0), step(1), step(2), evaluated("tuned", 2), Resumed(0, ""), step(1)])
    assert [event.name for event in read_events(path)] == ["evaluated", "resumed", "step_done"]


def test_the_base_is_scored_once_even_where_two_processes_did(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, [evaluated("base", 0), RunStarted("demo", "ab" * 32), evaluated("base", 0), step(1), evaluated("tuned", 1)])
    assert [event.name for event in read_events(path)] == ["run_started", "evaluated", "step_done", "evaluated"]


def test_what_followed_the_last_checkpoint_is_told_once_however_often_it_was_redone(tmp_path: Path) -> None:
    """The score on the way (at step 2, before its checkpoint) stands; the final one was redone by each process that came back."""
    path, end = tmp_path / "events.jsonl", RunFinished("succeeded", 2, 80, 1.0, 1)
    saved, back = CheckpointSaved(2, "c/2", 0.0), Resumed(2, "c/2")
    final = [evaluated("tuned", 2), end]
    write(path, [step(1), step(2), evaluated("tuned", 2), saved, *final, back, *final, back, *final])
    names = [event.name for event in read_events(path)]
    assert names == ["step_done", "step_done", "evaluated", "checkpoint_saved", "resumed", "resumed", "evaluated", "run_finished"]


def test_lines_reach_the_disk_when_they_are_asked_to_and_when_others_rely_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    path = tmp_path / "events.jsonl"
    with EventLog(path, clock) as log:
        monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(path.read_bytes()))
        log.append(step(1))
        assert synced == []
        log.sync()
        log.append(CheckpointSaved(1, "checkpoints/step-000001", 0.0))
        assert [content.count(b"\n") for content in synced] == [1, 2]


def test_two_processes_never_write_one_run(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path, clock) as log:
        log.append(step(1))
        with pytest.raises(RunFolderError, match="another process is writing"):
            EventLog(path, clock)
        assert len(read_events(path)) == 1
    EventLog(path, clock).close()


def test_a_folder_without_events_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="does not exist"):
        read_events(tmp_path / "events.jsonl")
    (tmp_path / "events.jsonl").touch()
    assert read_events(tmp_path / "events.jsonl") == []


# --- real kills and real disks -----------------------------------------------------------------------------------------------

APPEND_FOREVER = """
import sys
from pathlib import Path
from kivnun.events import EventLog, Warned, utc_now
with EventLog(Path(sys.argv[1]), utc_now) as log:
    while True:
        log.append(Warned("x" * 5000))
        print("appended", flush=True)
"""


def test_a_killed_writer_loses_no_line_it_was_told_of(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    told = 0
    for count in random.Random(0).sample(range(1, 200), 10):
        with subprocess.Popen([sys.executable, "-c", APPEND_FOREVER, str(path)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(count):
                assert process.stdout.readline() == "appended\n"
            process.kill()
        told += count
        assert len(read_events(path)) >= told
        told = len(read_events(path))


def test_a_full_disk_is_a_clear_error_and_the_record_goes_on_when_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**20) as disk:
        path = disk / "events.jsonl"
        (disk / "ballast").write_bytes(bytes(2**19))
        with EventLog(path, clock) as log:
            count = 0
            with pytest.raises(StorageError, match="the disk is full"):  # noqa: PT012  each append may be the one that fails
                while True:
                    log.append(Warned("x" * 5000))
                    count += 1
            assert len(read_events(path)) == count > 50
            assert path.read_bytes().endswith(b"\n")
            (disk / "ballast").unlink()
            log.append(Warned("after"))
        assert len(read_events(path)) == count + 1


def test_a_line_that_does_not_fit_the_size_limit_leaves_no_part_of_itself(tmp_path: Path) -> None:
    """The system writes the first half of the line and refuses the rest: what a full disk does on larger lines."""
    path = tmp_path / "events.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with EventLog(path, clock) as log:
        log.append(Warned("before"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        try:
            with pytest.raises(StorageError, match="larger than is allowed"):
                log.append(Warned("x" * 9000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes().count(b"\n") == 1
        log.append(Warned("after"))
    assert [event.message for event in read_events(path) if isinstance(event, Warned)] == ["before", "after"]


def test_a_read_only_folder_is_a_clear_error(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**20) as disk, read_only(disk), pytest.raises(StorageError, match="read-only"):
        EventLog(disk / "events.jsonl", clock)
    with forbidden_folder() as folder, pytest.raises(StorageError, match="permission is denied"):
        EventLog(folder / "events.jsonl", clock)


# --- the reference page ------------------------------------------------------------------------------------------------------


def test_the_reference_page_is_current_and_every_field_is_explained() -> None:
    repository = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, repository / "scripts" / "reference_events.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for kind in EVENTS.values():
        hints = get_type_hints(kind, include_extras=True)
        assert kind.__doc__
        assert all(hasattr(hints[field.name], "__metadata__") for field in fields(kind)), kind.name


def test_a_line_of_each_event_is_json_any_tool_reads() -> None:
    for event in ONE_OF_EACH:
        assert json.loads(to_json(event))["name"] == event.name
