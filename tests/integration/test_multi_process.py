"""Whole runs in several processes by the command: equal to one process, killed, resumed, stopped, over two "hosts", refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from kivnun.events import RunInterrupted, StepDone, Warned, read_events
from runs import Tree, chats, numbers_of, pairs, prompted, result_hashes, run_spec, state_hashes, steps_of, write_spec
from torchrun import environment

pytest.importorskip("deepspeed")

COMPUTE: Tree = {"kind": "multi_process", "device": "cpu", "threads": 1, "processes": 2, "zero_stage": 3}
CHECKPOINTS = {"every_steps": 3, "every_epoch": False, "every_seconds": None}
TUNE = (sys.executable, "-m", "kivnun", "tune")


@dataclass(frozen=True)
class Ended:
    """How a command ended, and the last line it printed, as JSON."""

    status: int
    said: str
    told: dict[str, Any]


def started(command: list[str], place: Path, **variables: str) -> subprocess.Popen[str]:
    given = environment() | variables
    return subprocess.Popen(command, cwd=place, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> Ended:
    out, said = process.communicate(timeout=200)
    lines = [line for line in out.splitlines() if line.startswith("{")]
    return Ended(process.returncode, said, json.loads(lines[-1]) if lines else {})


def tuned(spec: Path, run: str, *more: str, place: Path | None = None) -> Ended:
    return ended(started([*TUNE, str(spec), "--output", run, "--json", *more], place or spec.parent))


def worker(process: subprocess.Popen[str], rank: int) -> int:
    """Return the number of the process that has this rank."""
    (found,) = [its.pid for its in psutil.Process(process.pid).children(recursive=True) if its.environ().get("RANK") == str(rank)]
    return found


def wait_for_step(run: Path, step: int) -> None:
    """Return as soon as a run has done a step."""
    for _ in range(4000):
        if (run / "events.jsonl").is_file() and f'"step": {step},' in (run / "events.jsonl").read_text(encoding="utf-8"):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} did not come")


@pytest.fixture(scope="module")
def task(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a spec of 16 steps in two processes, with rows of uneven lengths."""
    schedule = {"epochs": 2, "batch_rows": 4}
    return write_spec(
        tmp_path_factory.mktemp("several"), base, chats(), schedule=schedule, compute=COMPUTE, checkpoints=CHECKPOINTS
    )


@pytest.fixture(scope="module")
def two_hosts(task: Path) -> tuple[Ended, Ended]:
    """Run the task by two torchruns of one process each, which is what two machines would do."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "hosts", "--local-addr", "localhost"]
    processes = [
        started([*command, "-m", "kivnun", "tune", str(task), "--output", "whole", "--json"], task.parent) for _ in range(2)
    ]
    first, second = (ended(process) for process in processes)
    return first, second


@pytest.fixture(scope="module")
def killed(task: Path) -> Ended:
    """Run the task on one host and kill -9 the second process after step 7."""
    process = started([*TUNE, str(task), "--output", "killed", "--json"], task.parent)
    wait_for_step(task.parent / "killed", 7)
    os.kill(worker(process, 1), signal.SIGKILL)
    return ended(process)


@pytest.fixture(scope="module")
def resumed(task: Path, killed: Ended) -> Ended:
    shutil.copytree(task.parent / "killed", task.parent / "resumed")
    return tuned(task, "resumed", "--resume")


def test_two_hosts_finish_one_run(task: Path, two_hosts: tuple[Ended, Ended]) -> None:
    assert [its.status for its in two_hosts] == [0, 0], [its.said[-3000:] for its in two_hosts]
    told = [its.told for its in two_hosts if its.told]
    assert len(told) == 1, "the first process alone is heard"
    assert told[0]["status"] == "succeeded"
    assert told[0]["steps"] == len(steps_of(task.parent / "whole")) == 16


def test_losses_and_scores_are_those_of_one_process(task: Path, two_hosts: tuple[Ended, Ended]) -> None:
    alone = run_spec(task, task.parent / "alone", "compute={kind: local, device: cpu, threads: 1}")
    for one, two in zip(numbers_of(task.parent / "alone"), numbers_of(task.parent / "whole"), strict=True):
        assert two[2] == pytest.approx(one[2], abs=1e-5)
        assert two[3] == pytest.approx(one[3], rel=1e-4, abs=1e-5)
        assert (two[:2], two[4:]) == (one[:2], one[4:])
    told = next(its.told for its in two_hosts if its.told)
    assert told["base"] == alone["base"]
    assert told["tuned"]["nll"] == pytest.approx(alone["tuned"]["nll"], abs=1e-5)


def test_a_killed_process_ends_the_run_with_a_clear_error(task: Path, killed: Ended) -> None:
    assert killed.status == 9
    assert killed.told["error"]["code"] == "process_lost"
    assert killed.told["error"]["message"] == "process 1 was ended by signal 9; the others were ended"
    assert "--resume" in killed.told["error"]["hint"]
    assert not (task.parent / "killed" / "result.json").exists()


def test_resumed_by_as_many_processes_to_the_bit(task: Path, two_hosts: tuple[Ended, Ended], resumed: Ended) -> None:
    assert resumed.status == 0, resumed.said[-3000:]
    assert "resumed after step" in resumed.said
    whole, run = task.parent / "whole", task.parent / "resumed"
    assert numbers_of(run) == numbers_of(whole)
    assert state_hashes(run) == state_hashes(whole)
    assert result_hashes(run) == result_hashes(whole)
    assert resumed.told["tuned"] == next(its.told for its in two_hosts if its.told)["tuned"]


@pytest.mark.slow
def test_resumed_by_another_number_of_processes(task: Path, two_hosts: tuple[Ended, Ended], killed: Ended) -> None:
    """The same order of rows; sums are in another order. The record says so, and the resolved spec."""
    run = task.parent / "fewer"
    shutil.copytree(task.parent / "killed", run)
    fewer = tuned(task, "fewer", "--resume", "--set", "compute.processes=1")
    assert fewer.status == 0, fewer.said[-3000:]
    for two, one in zip(numbers_of(task.parent / "whole"), numbers_of(run), strict=True):
        assert one[2] == pytest.approx(two[2], abs=1e-5)
        assert (two[:2], two[4:]) == (one[:2], one[4:])
    said = [event.message for event in read_events(run / "events.jsonl") if isinstance(event, Warned)]
    assert any("compute.processes was 2, is 1" in message for message in said)
    assert "processes: 1" in (run / "resolved.yaml").read_text(encoding="utf-8")


@pytest.mark.slow
def test_another_change_of_compute_is_refused(task: Path, killed: Ended) -> None:
    run = shutil.copytree(task.parent / "killed", task.parent / "changed")
    refused = tuned(task, str(run), "--resume", "--set", "compute.zero_stage=2")
    assert refused.status == 5
    assert "compute.zero_stage was 3, is 2" in refused.told["error"]["message"]


@pytest.mark.slow
def test_a_signal_stops_all_processes_after_a_step_that_is_saved(task: Path) -> None:
    process = started([*TUNE, str(task), "--output", "stopped", "--json"], task.parent)
    wait_for_step(task.parent / "stopped", 4)
    process.send_signal(signal.SIGINT)
    stopped = ended(process)
    assert stopped.status == 130, stopped.said[-3000:]
    assert (stopped.told["status"], stopped.told["error"]["code"]) == ("interrupted", "interrupted")
    events = read_events(task.parent / "stopped" / "events.jsonl")
    (last,) = [event.step for event in events if isinstance(event, RunInterrupted)]
    assert last == max(event.step for event in events if isinstance(event, StepDone)) < 16
    assert (task.parent / "stopped" / "checkpoints" / f"step-{last:06d}").is_dir()


@pytest.mark.slow
def test_another_number_of_processes_than_the_spec_s_is_refused(task: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    refused = ended(started([*command, "-m", "kivnun", "tune", str(task), "--output", "odd"], task.parent))
    assert refused.status != 0
    assert "compute.processes is 2, but torchrun started 1" in refused.said
    assert not (task.parent / "odd").exists()


@pytest.mark.slow
def test_bad_rows_are_told_once_with_their_lines(task: Path, base: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, base, [*chats(12), {"messages": []}], compute=COMPUTE)
    refused = tuned(spec, "run")
    assert refused.status == 3
    assert [problem["line"] for problem in refused.told["error"]["problems"]] == [13]
    assert refused.said.count("train.jsonl:13") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "rows"),
    [
        ({"adapter": {"kind": "full"}, "schedule": {"learning_rate": 0.001}}, None),
        ({"adapter": {"kind": "lora", "rank": 4, "dropout": 0.2}, "compute": {**COMPUTE, "zero_stage": 0}}, None),
        ({"adapter": {"kind": "full"}, "compute": {**COMPUTE, "zero_stage": 2, "activation_checkpointing": True}}, None),
        ({"compute": {**COMPUTE, "share_prefixes": True}}, prompted(chats())),
        ({}, pairs()),
        ({"adapter": {"kind": "full"}, "schedule": {"learning_rate": 0.001}, "compute": {**COMPUTE, "zero_stage": 2}}, pairs()),
    ],
    ids=["full", "rows_alone", "full_recomputed", "shared_prefixes", "preferences", "preferences_full"],
)
def test_other_kinds_are_those_of_one_process(base: Path, tmp_path: Path, sections: Tree, rows: Any) -> None:
    spec = write_spec(tmp_path, base, rows or chats(), **{"compute": COMPUTE, **sections})
    together = tuned(spec, "run")
    assert together.status == 0, together.said[-3000:]
    run_spec(spec, tmp_path / "alone", "compute={kind: local, device: cpu, threads: 1}")
    for one, two in zip(numbers_of(tmp_path / "alone"), numbers_of(tmp_path / "run"), strict=True):
        assert two[2] == pytest.approx(one[2], abs=1e-5)
