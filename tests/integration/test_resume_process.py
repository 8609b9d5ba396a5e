"""The same over processes of their own, started as a user starts them: kill -9 from outside, Ctrl-C, SIGTERM, two threads."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from runs import chats, numbers_of, result_hashes, run_spec, state_hashes, write_spec
from tiny_task import PROGRAM

# Threads that wait for one another give their core away: the test must end in time on a machine that does other things too.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
LONG = {"schedule": {"epochs": 8}, "checkpoints": {"every_steps": 7, "every_epoch": False, "every_seconds": None}}


def start(spec: Path, run: Path, *more: str) -> subprocess.Popen[str]:
    command = [*PROGRAM, "tune", str(spec), "--output", str(run), *more]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    return out, err


def signalled(spec: Path, run: Path, step: int, number: int, *more: str, status: int) -> tuple[str, str]:
    """Start a run, send it a signal once its record shows the step, and return what it said."""
    process, deadline = start(spec, run, *more), time.monotonic() + 120
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if any(told[0] == step for told in numbers_so_far(run)):
                process.send_signal(number)
                return finish(process, status)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.002)
    finally:
        process.kill()
        out, err = process.communicate()
    raise AssertionError(f"step {step} was not reached while it ran: {out}{err}")


def numbers_so_far(run: Path) -> list[tuple[Any, ...]]:
    return list(numbers_of(run)) if (run / "events.jsonl").exists() else []


def assert_same(run: Path, whole: Path) -> None:
    assert numbers_of(run) == numbers_of(whole)
    assert state_hashes(run) == state_hashes(whole)
    assert result_hashes(run) == result_hashes(whole)


def test_two_threads_killed_from_outside(base: Path, tmp_path: Path) -> None:
    adapter = {"kind": "lora", "rank": 4, "dropout": 0.2}
    spec = write_spec(tmp_path, base, chats(), **LONG, adapter=adapter, compute={"threads": 2})
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(start(spec, whole))
    signalled(spec, run, 17, signal.SIGKILL, status=-signal.SIGKILL)
    out, err = finish(start(spec, run, "--resume", "--json"))
    assert "resumed after step" in err
    assert json.loads(out.splitlines()[-1])["steps"] == 64
    assert_same(run, whole)


def test_ctrl_c_and_sigterm_finish_the_step_save_and_say_how_to_go_on(base: Path, tmp_path: Path) -> None:
    """The rest and the whole run are done in this process, which has run others before: nothing of those reaches the bits."""
    spec = write_spec(tmp_path, base, chats(), **LONG)
    whole, run = tmp_path / "whole", tmp_path / "run"
    for step, number, more in ((11, signal.SIGINT, ()), (32, signal.SIGTERM, ("--resume",))):
        out, err = signalled(spec, run, step, number, *more, "--json", status=130)
        said: dict[str, Any] = json.loads(out.splitlines()[-1])
        assert said["status"] == "interrupted"
        last = numbers_of(run)[-1][0]
        assert last >= step
        assert said["error"]["message"].startswith(f"stopped after step {last} of 64, which is saved")
        assert f"kivnun tune {spec} --output {run} --resume" in err
        assert "Traceback" not in err
        assert (run / "checkpoints" / f"step-{last:06d}" / "manifest.json").is_file()
    run_spec(spec, run, resume=True)
    run_spec(spec, whole)
    assert_same(run, whole)
