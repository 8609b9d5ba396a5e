"""The record is never behind the files: whatever a killed or failing run left, the record tells of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from kivnun import pipeline
from kivnun.errors import StorageError
from kivnun.events import AdapterOpened, Evaluated, EventLog, read_events
from kivnun.train.checkpoint import CheckpointStore
from runs import chats, in_child, kill_self, killed, pairs, result_hashes, run_spec, write_spec


def test_a_saved_score_of_the_base_is_in_the_record(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run finds the file and scores nothing: were the event not there already, it would never be."""
    spec, run = write_spec(tmp_path, base, chats()), tmp_path / "run"
    save = pipeline.save_evaluation

    def save_and_die(*args: object) -> None:
        save(*args)  # type: ignore[arg-type]
        kill_self()

    monkeypatch.setattr(pipeline, "save_evaluation", save_and_die)
    assert in_child(lambda: run_spec(spec, run)) == -9
    monkeypatch.undo()
    assert (run / "evaluation" / "base.json").is_file()
    run_spec(spec, run, resume=True)
    scored = [event.which for event in read_events(run / "events.jsonl") if isinstance(event, Evaluated) and event.step == 0]
    assert scored == ["base"]


def test_the_record_is_on_disk_before_the_checkpoint_it_tells_of(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sync, save = EventLog.sync, CheckpointStore.save

    def noted_sync(self: EventLog) -> None:
        order.append("sync")
        sync(self)

    def noted_save(self: CheckpointStore, *args: object) -> Path:
        order.append("save")
        return save(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(EventLog, "sync", noted_sync)
    monkeypatch.setattr(CheckpointStore, "save", noted_save)
    run_spec(write_spec(tmp_path, base, chats()), tmp_path / "run")
    assert order.count("save") == 2
    assert all(order[at - 1] == "sync" for at, what in enumerate(order) if what == "save")


def test_leftovers_of_a_killed_writer_are_cleared(base: Path, tmp_path: Path) -> None:
    spec, run = write_spec(tmp_path, base, chats()), tmp_path / "run"
    killed(spec, run, lambda event: isinstance(event, AdapterOpened))
    left = [place / ".tmp-base.json-0123abcd" for place in (run, run / "evaluation")]
    for file in left:
        file.write_text("{", encoding="utf-8")
    run_spec(spec, run, resume=True)
    assert not any(file.exists() for file in left)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not a zip file", b"\x93NUMPY"])
def test_a_damaged_cache_of_the_reference_is_made_again(base: Path, tmp_path: Path, damage: bytes) -> None:
    spec, run, other = write_spec(tmp_path, base, pairs()), tmp_path / "run", tmp_path / "other"
    killed(spec, run, lambda event: isinstance(event, AdapterOpened))
    good = (run / "reference.npz").read_bytes()
    (run / "reference.npz").write_bytes(damage or good[: len(good) // 2])
    run_spec(spec, run, resume=True)
    run_spec(spec, other)
    assert (run / "reference.npz").read_bytes() == good
    assert result_hashes(run) == result_hashes(other)


def test_a_full_disk_under_the_reference_is_a_storage_error(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, run = write_spec(tmp_path, base, pairs()), tmp_path / "run"
    replace = os.replace

    def full(source: str | Path, target: str | Path) -> None:
        if Path(target).name == "reference.npz":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match=r"reference\.npz: the disk is full"):
        run_spec(spec, run)
    assert not (run / "reference.npz").exists()


def test_the_cache_of_the_reference_is_used(base: Path, tmp_path: Path) -> None:
    """Its numbers are doubled here: a run that computed them anew would not notice."""
    spec, run, other = write_spec(tmp_path, base, pairs()), tmp_path / "run", tmp_path / "other"
    run_spec(spec, other)
    killed(spec, run, lambda event: isinstance(event, AdapterOpened))
    with np.load(run / "reference.npz") as kept:
        np.savez(run / "reference.npz", key=kept["key"], rows=kept["rows"], sums=2 * kept["sums"])
    run_spec(spec, run, resume=True)
    assert result_hashes(run) != result_hashes(other)
