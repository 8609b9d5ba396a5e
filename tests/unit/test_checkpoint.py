"""Whatever kills a run, its newest durable checkpoint is found and whole."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from disks import forbidden_folder, read_only, small_disk
from kivnun.errors import IntegrityError, StorageError
from kivnun.train.checkpoint import Cadence, CheckpointStore


def writer(size: int, fill: int = 7) -> Callable[[Path], None]:
    """Return what a trainee is to the store: a function that fills a folder with tensors."""

    def write(folder: Path) -> None:
        save_file({"weight": np.full(size, fill, np.float32)}, folder / "state.safetensors")
        (folder / "trainee.json").write_text("{}")

    return write


def steps(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_store_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    store.recover()
    assert store.latest() is None


def test_the_latest_gives_back_step_fields_and_tensors(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    path = store.save(120, writer(10, fill=3), {"epoch": 1, "order": [3, 1, 2]})
    latest = store.latest()
    assert latest is not None
    assert (latest.step, latest.path, dict(latest.fields), latest.warnings) == (120, path, {"epoch": 1, "order": [3, 1, 2]}, ())
    assert path.name == "step-000120"
    assert load_file(path / "state.safetensors")["weight"].tolist() == [3.0] * 10


def test_the_newest_are_kept_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (9, 10, 999_999, 1_000_000):
        store.save(step, writer(1), {})
    assert steps(tmp_path) == ["step-1000000", "step-999999"]
    latest = store.latest()
    assert latest is not None
    assert latest.step == 1_000_000


def test_older_checkpoints_are_there_until_the_new_one_is_durable(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, writer(1), {})

    def write(folder: Path) -> None:
        assert store.latest() is not None
        writer(1)(folder)

    store.save(2, write, {})
    assert steps(tmp_path) == ["step-000002"]


def test_a_writer_that_raises_leaves_the_older_ones_and_no_part_of_its_own(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, writer(1), {})

    def write(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.save(2, write, {})
    assert steps(tmp_path) == ["step-000001"]


@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-20])])
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(tmp_path: Path, name: str, damage: Callable) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, writer(10), {})
    damage(store.save(2, writer(10), {}) / name)
    latest = store.latest()
    assert latest is not None
    assert latest.step == 1
    assert len(latest.warnings) == 1
    assert "step-000002 is damaged" in latest.warnings[0]
    assert name in latest.warnings[0]


def test_damaged_checkpoints_the_run_went_back_behind_are_removed_by_the_next_save(tmp_path: Path) -> None:
    """Else they would take a kept one's place, and be tried first for ever."""
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, writer(10), {})
    (store.save(5, writer(10), {}) / "state.safetensors").unlink()
    store.save(3, writer(10), {})
    assert steps(tmp_path) == ["step-000001", "step-000003"]


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, writer(1), {}).rename(tmp_path / "step-000009")
    with pytest.raises(IntegrityError, match="holds step 1"):
        store.latest()


def test_when_none_is_whole_the_user_decides(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2):
        (store.save(step, writer(1), {}) / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match="step-000002 is damaged") as caught:
        store.latest()
    assert "step-000001" in caught.value.message
    assert "to start over" in str(caught.value)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    (store.save(1, writer(10), {"try": 1}) / "state.safetensors").unlink()
    store.save(1, writer(10), {"try": 2})
    latest = store.latest()
    assert latest is not None
    assert latest.fields == {"try": 2}
    assert steps(tmp_path) == ["step-000001"]


# --- disks -------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_loses_no_checkpoint_and_the_run_goes_on_when_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**20) as disk:
        store = CheckpointStore(disk / "checkpoints", keep=2)
        for step in (1, 2):
            store.save(step, writer(100_000, fill=step), {})
        with pytest.raises(StorageError, match="step-000003: the disk is full"):
            store.save(3, writer(100_000), {})
        assert steps(disk / "checkpoints") == ["step-000001", "step-000002"]
        latest = store.latest()
        assert latest is not None
        assert latest.step == 2
        store.save(3, writer(50_000), {})
        assert steps(disk / "checkpoints") == ["step-000002", "step-000003"]


def test_a_disk_that_fills_at_any_point_of_a_save_loses_no_checkpoint(tmp_path: Path) -> None:
    """The free room grows page by page from none to enough: each file, folder and the manifest is the one that fails."""
    failures = 0
    with small_disk(tmp_path / "disk", 2**20) as disk:
        store = CheckpointStore(disk / "checkpoints", keep=2)
        store.save(1, writer(1000), {})
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free))
        while True:
            try:
                store.save(2, writer(5000), {"x": "y" * 5000})
                break
            except StorageError:
                failures += 1
            assert steps(disk / "checkpoints") == ["step-000001"]
            latest = store.latest()
            assert latest is not None
            assert latest.step == 1
            with ballast.open("r+b") as file:
                file.truncate(ballast.stat().st_size - 4096)
        assert failures > 5
        latest = store.latest()
        assert latest is not None
        assert latest.step == 2


def test_a_read_only_folder_is_a_clear_error_and_its_checkpoints_can_be_read(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**20) as disk:
        store = CheckpointStore(disk / "checkpoints", keep=2)
        store.save(1, writer(10), {})
        with read_only(disk):
            with pytest.raises(StorageError, match="read-only"):
                store.save(2, writer(10), {})
            latest = store.latest()
            assert latest is not None
            assert latest.step == 1
    with forbidden_folder() as folder, pytest.raises(StorageError, match="permission is denied"):
        CheckpointStore(folder / "checkpoints", keep=2).save(1, writer(10), {})


# --- kills -------------------------------------------------------------------------------------------------------------------

SAVE_FOREVER = """
import sys
from pathlib import Path
from kivnun.train.checkpoint import CheckpointStore

def write(folder):
    for name in ("state", "optimizer", "other"):
        (folder / name).write_bytes(bytes([step % 251]) * 2_000_000)

store = CheckpointStore(Path(sys.argv[1]), keep=2)
store.recover()
latest = store.latest()
step = latest.step if latest else 0
while True:
    step += 1
    store.save(step, write, {"step": step})
    print(step, flush=True)
"""


def test_twenty_kills_at_random_moments_always_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    draws = random.Random(0)
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for _ in range(20):
        command = [sys.executable, "-c", SAVE_FOREVER, str(store.folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            told = int(process.stdout.readline())
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=draws.uniform(0, 0.1))
            process.kill()
            told = max([told, *(int(line) for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n"))])
        latest = store.latest()
        assert latest is not None
        assert latest.step >= told
        assert latest.warnings == ()
        assert (latest.path / "state").read_bytes() == bytes([latest.step % 251]) * 2_000_000


# The child dies at its n-th call into the file system (open, mkdir, rename, remove, ...), for every n that a save makes.
KILL_AT_EVERY_CALL = """
import os, signal, sys
from pathlib import Path
from kivnun.train.checkpoint import CheckpointStore

def write(folder):
    (folder / "state").write_bytes(b"x" * 1000)
    (folder / "inner").mkdir()
    (folder / "inner" / "more").write_bytes(b"y" * 1000)

def save_and_die(store, step, at):
    calls = 0
    def count(event, arguments):
        nonlocal calls
        if event.split(".")[0] in ("open", "os", "shutil"):
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    store.save(step, write, {})
    os._exit(0)

folder, saved_again, keep = Path(sys.argv[1]), sys.argv[2] == "again", int(sys.argv[3])
at = 0
while True:
    at += 1
    store = CheckpointStore(folder / str(at), keep)
    for step in (1, 2):
        store.save(step, write, {})
    new = 2 if saved_again else 3
    child = os.fork()
    if child == 0:
        save_and_die(store, new, at)
    _, status = os.waitpid(child, 0)
    before = {"step-000001", "step-000002"}
    if not saved_again:
        assert store.latest().step >= 2 and not store.latest().warnings, at
    store.recover()
    names = {entry.name for entry in store.folder.iterdir()}
    assert store.latest().step >= 2 and not store.latest().warnings, (at, names)
    assert names <= before | {"step-000003"}, names
    store.save(4, write, {})
    assert len(list(store.folder.iterdir())) == keep
    if status == 0:
        break
print(at - 1)
"""


@pytest.mark.parametrize("what", ["new", "again"])
@pytest.mark.parametrize("keep", ["1", "2"])
def test_a_kill_at_every_call_into_the_file_system_leaves_a_whole_checkpoint(tmp_path: Path, what: str, keep: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILL_AT_EVERY_CALL, str(tmp_path), what, keep], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


# --- when to save ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_due_by_steps_by_epochs_or_by_seconds() -> None:
    moments = [0.0]
    by_steps = Cadence(every_steps=3, every_epoch=False, every_seconds=None, clock=lambda: moments[0])
    assert [by_steps.due(step, epoch_ended=step == 2) for step in range(1, 7)] == [False, False, True, False, False, True]
    by_epoch = Cadence(every_steps=None, every_epoch=True, every_seconds=None, clock=lambda: moments[0])
    assert [by_epoch.due(step, epoch_ended=step == 2) for step in range(1, 4)] == [False, True, False]


def test_seconds_count_from_the_end_of_the_last_save() -> None:
    moments = [100.0]
    cadence = Cadence(every_steps=None, every_epoch=False, every_seconds=60, clock=lambda: moments[0])
    told = []
    for moment in (159.0, 160.0, 170.0, 229.0, 230.0):
        moments[0] = moment
        told.append(cadence.due(1, epoch_ended=False))
        if moment == 170.0:
            cadence.saved()
    assert told == [False, True, True, False, True]
