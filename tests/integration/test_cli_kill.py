"""A run that is killed in the middle, more than once, ends with the bytes of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tiny_task import PROGRAM, make_spec

LONG = (
    "--set",
    "schedule.epochs=9",
    "--set",
    "checkpoints.every_steps=7",
    "--set",
    "evaluation.metrics=[]",
    "--set",
    "evaluation.samples=0",
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def spec(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_spec(tmp_path_factory.mktemp("task"), base)


def killed_at(spec: Path, place: Path, line_start: str, *more: str) -> None:
    """Run `tune` until it says a line that begins so, then kill it as the system would."""
    command = [*PROGRAM, "tune", str(spec), "--output", "run", *LONG, *more]
    with subprocess.Popen(command, cwd=place, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said: list[str] = []
        for line in process.stderr:
            said.append(line)
            if line.startswith(line_start):
                process.kill()
                break
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, "".join(said)


def finished(spec: Path, place: Path, run: str, *more: str) -> tuple[dict[str, object], str]:
    command = [*PROGRAM, "tune", str(spec), "--output", run, *LONG, *more, "--json"]
    done = subprocess.run(command, cwd=place, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_killed_twice_and_resumed_the_adapter_is_the_same_to_the_byte(spec: Path, tmp_path: Path) -> None:
    whole, _ = finished(spec, tmp_path, "whole")
    killed_at(spec, tmp_path, "held out, after step 16:")
    killed_at(spec, tmp_path, "held out, after step 40:", "--resume")
    result, said = finished(spec, tmp_path, "run", "--resume")
    assert "resumed after step" in said
    assert (result["steps"], result["trained_tokens"]) == (whole["steps"], whole["trained_tokens"])
    assert result["tuned"] == whole["tuned"]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "run" / "adapter" / name).read_bytes() == (tmp_path / "whole" / "adapter" / name).read_bytes()


def test_killed_before_the_first_checkpoint_it_starts_over(spec: Path, tmp_path: Path) -> None:
    killed_at(spec, tmp_path, "held out, base:")
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    result, _ = finished(spec, tmp_path, "run", "--resume")
    assert result["status"] == "succeeded"


def test_resume_with_another_spec_is_refused_with_the_difference(spec: Path, tmp_path: Path) -> None:
    killed_at(spec, tmp_path, "held out, after step 8:")
    command = [*PROGRAM, "tune", str(spec), "--output", "run", *LONG, "--set", "adapter.rank=8", "--resume"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 5
    assert "adapter.rank was 4, is 8" in done.stderr
