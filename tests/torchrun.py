"""Processes started as torchrun does, for tests: each launch costs seconds, so that one shows all it can."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("zero_worker.py")


def environment() -> dict[str, str]:
    places = (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), "OMP_NUM_THREADS": "1"}


def torchrun(processes: int, *arguments: str, timeout: float = 240) -> None:
    """Run a command in so many processes; show what they said where they fail."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *arguments]
    ended = subprocess.run(command, env=environment(), timeout=timeout, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-6000:]
