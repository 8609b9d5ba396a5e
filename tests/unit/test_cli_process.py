"""Settings of the process are made by the command line alone."""

from __future__ import annotations

import os
import platform
import sys

import pytest

from kivnun.cli import process


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="mallopt is glibc's")
def test_glibc_takes_all_three_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"):
        monkeypatch.delenv(name, raising=False)
    assert process.keep_freed_memory()


@pytest.mark.parametrize("name", ["LD_PRELOAD", "MALLOC_TRIM_THRESHOLD_"])
def test_an_allocator_that_the_user_chose_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert not process.keep_freed_memory()


def test_threads_reach_the_environment_only_when_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    process.set_threads(None)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    process.set_threads(2)
    assert (os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]) == ("2", "2")
