"""TensorBoard's files: whole by their checksums, equal to the record in every scalar, and no step in them twice."""

from __future__ import annotations

import struct
import sys
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from kivnun.cli.main import run
from kivnun.errors import SpecError
from kivnun.evaluate.tensorboard import Board, points_of, with_board
from kivnun.events import CheckpointSaved, Evaluated, Event, EventLog, Resumed, RunStarted, StepDone, read_events
from kivnun.run_folder import RunFolder
from runs import at_step, chats, in_child, kill_self, run_spec, write_spec
from tiny_task import make_base


def crc32c(data: bytes) -> int:
    """Return the Castagnoli checksum, bit by bit: nothing of the library that wrote it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(folder: Path) -> list[Any]:
    """Return every event of the one file in RUN/tensorboard, its lengths and checksums held to what TFRecord says."""
    (file,) = (folder / "tensorboard").iterdir()
    assert file.name.startswith("events.out.tfevents.")
    data, place, found = file.read_bytes(), 0, []
    while place < len(data):
        head = data[place : place + 8]
        (length,) = struct.unpack("<Q", head)
        body = data[place + 12 : place + 12 + length]
        assert struct.unpack("<I", data[place + 8 : place + 12])[0] == masked(head)
        assert struct.unpack("<I", data[place + 12 + length : place + 16 + length])[0] == masked(body)
        found.append(event_pb2.Event.FromString(body))
        place += 16 + length
    assert place == len(data)
    return found


def scalars(folder: Path) -> dict[tuple[str, int], tuple[float, float]]:
    """Return (tag, step) -> (value, wall time); fails where a tag stands at a step twice."""
    points = [
        ((value.tag, event.step), (value.simple_value, event.wall_time))
        for event in records(folder)
        for value in event.summary.value
        if value.HasField("simple_value")
    ]
    twice = [key for key, count in Counter(key for key, _ in points).items() if count > 1]
    assert twice == []
    return dict(points)


def check_equal_to_the_record(folder: Path) -> None:
    points = [point for event in read_events(folder / "events.jsonl") for point in points_of(event)]
    expected = {(point.tag, point.step): point for point in points}
    # A step that is scored twice to the same figure keeps the first one's moment.
    moments = {(point.tag, point.step, point.wall_time) for point in points}
    found = scalars(folder)
    assert found.keys() == expected.keys()
    for key, (value, wall_time) in found.items():
        assert value == float(np.float32(expected[key].value)), key
        assert (*key, wall_time) in moments


def step_done(step: int, loss: float) -> StepDone:
    return StepDone(step, 9, 0, loss, 0.5, 1e-3, 4, 100, 50, 100, 0.25)


def evaluated(which: str, step: int, nll: float, **metrics: float) -> Evaluated:
    assert which in ("base", "tuned")
    return Evaluated("base" if which == "base" else "tuned", step, nll, 20, metrics, {}, [])


def hear(folder: Path, *events: Event) -> None:
    """Append events to the record, a board listening as in a run."""
    folder.mkdir(exist_ok=True)
    (folder / "resolved.yaml").write_text("seed: 7\n", encoding="utf-8")
    with (
        EventLog(folder / "events.jsonl", lambda: datetime.now(UTC)) as log,
        with_board(lambda event: None, folder, wanted=True) as listener,
    ):
        for event in events:
            listener(log.append(event))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def test_every_scalar_of_a_run_is_in_the_files(base: Path, tmp_path: Path) -> None:
    evaluation = {"samples": 0, "bootstrap": 100, "forgetting": "builtin", "metrics": ["exact_match"], "max_new_tokens": 4}
    spec = write_spec(tmp_path, base, chats(), evaluation=evaluation)
    assert run(["tune", str(spec), "--output", str(tmp_path / "run"), "--tensorboard"]) == 0
    check_equal_to_the_record(tmp_path / "run")
    found = scalars(tmp_path / "run")
    steps = {step for tag, step in found if tag == "train/loss"}
    assert steps == set(range(1, max(steps) + 1))
    tags = {tag for tag, _ in found}
    assert tags == {
        *(f"train/{name}" for name in ("loss", "grad_norm", "learning_rate", "tokens_per_s")),
        *("held_out/nll", "held_out/exact_match", "unrelated_text/nll"),
    }
    (text,) = (value for event in records(tmp_path / "run") for value in event.summary.value if value.tag.startswith("spec"))
    assert b"kind: lora" in text.tensor.string_val[0]
    assert run(["verify", str(tmp_path / "run"), "--json"]) == 0


def test_a_run_that_was_killed_and_went_on_has_each_step_once(base: Path, tmp_path: Path) -> None:
    spec, folder = write_spec(tmp_path, base, chats(), checkpoints={"every_steps": 3}), tmp_path / "run"

    def dies() -> None:
        with with_board(lambda event: None, folder, wanted=True) as board:

            def listen(event: Event) -> None:
                board(event)
                if at_step(5)(event):
                    kill_self()

            run_spec(spec, folder, listener=listen)

    assert in_child(dies) < 0
    with with_board(lambda event: None, folder, wanted=True) as board:
        run_spec(spec, folder, resume=True, listener=board)
    assert any(isinstance(event, Resumed) and event.step == 3 for event in read_events(folder / "events.jsonl"))
    check_equal_to_the_record(folder)


def test_steps_that_a_resumed_run_took_back_are_gone(tmp_path: Path) -> None:
    saved = CheckpointSaved(2, "checkpoints/step-000002", 0.1)
    first = [step_done(1, 3.0), step_done(2, 2.5), saved, step_done(3, 2.0), step_done(4, 1.5)]
    hear(tmp_path / "run", RunStarted("run", "00"), evaluated("base", 0, 3.5), *first)
    assert scalars(tmp_path / "run")["train/loss", 4][0] == 1.5
    hear(tmp_path / "run", RunStarted("run", "00"), Resumed(2, saved.path), step_done(3, 1.75))
    check_equal_to_the_record(tmp_path / "run")
    assert {step: value for (tag, step), (value, _) in scalars(tmp_path / "run").items() if tag == "train/loss"} == {
        1: 3.0,
        2: 2.5,
        3: 1.75,
    }


def test_a_base_scored_again_stands_once(tmp_path: Path) -> None:
    hear(tmp_path / "run", RunStarted("run", "00"), evaluated("base", 0, 3.5), RunStarted("run", "00"), evaluated("base", 0, 3.25))
    check_equal_to_the_record(tmp_path / "run")
    assert scalars(tmp_path / "run")["held_out/nll", 0][0] == 3.25


def test_the_last_step_is_scored_twice_and_stands_once(tmp_path: Path) -> None:
    hear(
        tmp_path / "run",
        RunStarted("run", "00"),
        step_done(1, 2.0),
        evaluated("tuned", 1, 1.5),
        evaluated("tuned", 1, 1.5, chrf=40.0),
    )
    check_equal_to_the_record(tmp_path / "run")
    assert scalars(tmp_path / "run")["held_out/chrf", 1][0] == 40.0


def test_scalars_that_are_no_number_are_written_once(tmp_path: Path) -> None:
    hear(tmp_path / "run", RunStarted("run", "00"), *[replace(step_done(step, 2.0), grad_norm=float("nan")) for step in (1, 2, 2)])
    assert np.isnan(scalars(tmp_path / "run")["train/grad_norm", 2][0])


def test_a_finished_run_gets_its_files_from_its_record(base: Path, tmp_path: Path) -> None:
    spec, folder = write_spec(tmp_path, base, chats(), schedule={"epochs": 1}), tmp_path / "run"
    run_spec(spec, folder)
    assert run(["tune", str(spec), "--output", str(folder), "--resume", "--tensorboard", "--json"]) == 0
    check_equal_to_the_record(folder)


def test_without_the_library_the_run_is_refused_before_anything_is_done(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(SpecError, match="needs the library tensorboardX"):
        Board(tmp_path)
    spec = write_spec(tmp_path, base, chats())
    assert run(["tune", str(spec), "--output", str(tmp_path / "run"), "--tensorboard"]) == SpecError.exit_status
    assert "pip install 'kivnun[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_did_not_ask_has_no_files(base: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, base, chats(), schedule={"epochs": 1})
    assert run(["tune", str(spec), "--output", str(tmp_path / "run"), "--json"]) == 0
    assert not RunFolder(tmp_path / "run").tensorboard.exists()


def test_the_files_alone_do_not_make_a_folder_a_run_that_has_begun(tmp_path: Path) -> None:
    hear(tmp_path / "run", RunStarted("run", "00"))
    assert RunFolder(tmp_path / "run").tensorboard.is_dir()
    assert not RunFolder(tmp_path / "run").has_begun
