"""The scratch folder of a process: its own for as long as it lives, and gone soon after, however it ended.

A lock of the system's holds it, which a process that is killed cannot keep; the next process that makes one clears those that
nobody holds. What is in them is garbage: all that outlives a process is a row or a blob. Used by `run.py` and `clerk.py`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kivnun.jobs.ids import new_id

LOCK = ".lock"


@contextmanager
def scratch_folder(data: Path, part: str) -> Iterator[Path]:
    """Make a folder for a process of the service, and remove it at the end; remove those of processes that are gone."""
    place = data / "scratch"
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (place / LOCK).open("a") as lock:  # nobody clears a folder between its making and its being held
        fcntl.flock(lock, fcntl.LOCK_EX)
        _clear_dead(place)
        folder = place / new_id(f"{part}-")
        folder.mkdir(mode=0o700)
        holding = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(holding, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(holding)


def _clear_dead(place: Path) -> None:
    for folder in [path for path in place.iterdir() if path.is_dir()]:
        trying = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(trying, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its process lives
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(trying)
