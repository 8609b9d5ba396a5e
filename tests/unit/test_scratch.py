"""Scratch folders of processes: held while they live, cleared when they are gone, however they ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from kivnun.service.scratch import scratch_folder


def _hold(data: Path, told: Connection) -> None:
    with scratch_folder(data, "api") as folder:
        (folder / "incoming").write_bytes(b"half of a file")
        told.send(folder)
        signal.pause()


def folders(data: Path) -> set[Path]:
    return {path for path in (data / "scratch").iterdir() if path.is_dir()}


def test_a_process_that_was_killed_leaves_its_folder_to_the_next_one_and_a_living_one_keeps_its_own(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    living, killed = [], []
    for processes in (living, killed):
        here, there = fork.Pipe()
        process = fork.Process(target=_hold, args=(tmp_path, there))
        process.start()
        processes += [process, here.recv()]
    os.kill(killed[0].pid, signal.SIGKILL)
    killed[0].join()
    assert folders(tmp_path) == {living[1], killed[1]}
    with scratch_folder(tmp_path, "clerk") as mine:
        assert folders(tmp_path) == {living[1], mine}
        assert (living[1] / "incoming").read_bytes() == b"half of a file"
    assert folders(tmp_path) == {living[1]}
    living[0].kill()
    living[0].join()
