"""Real small, full and read-only file systems for tests. Where they are not permitted, the test is skipped and says why."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Mount a memory file system of `size_bytes` at `folder`."""
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make the file system mounted at `folder` read-only for a while."""
    _mount("-o", "remount,ro", str(folder))
    try:
        yield
    finally:
        _mount("-o", "remount,rw", str(folder))


@contextmanager
def forbidden_folder() -> Iterator[Path]:
    """Give a folder that this process may read and not write. Root ignores permissions, so it becomes `nobody` meanwhile."""
    folder = Path(tempfile.mkdtemp(prefix="kivnun-forbidden-"))
    folder.chmod(0o555)
    if os.getuid() == 0:
        try:
            os.seteuid(NOBODY)
        except PermissionError as error:
            pytest.skip(f"this root may not change its user: {error}")
    try:
        yield folder
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def _mount(*arguments: str) -> None:
    if shutil.which("mount") is None:
        pytest.skip("there is no `mount` here")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
