"""Whole runs on CUDA: trained, killed, resumed, verified, merged, answered; then the command, with a spec that says `auto`.

Smaller than `tests/contract`, which holds all techniques to more on the CPU. A resumed run is held to tolerances here, not bits.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from kivnun.cli.main import cli
from kivnun.errors import RunFolderError
from kivnun.export.merge import MAX_KL, export_run
from kivnun.export.verify import verify_run
from kivnun.opened import open_run
from runs import Tree, at_step, chats, kill_self, numbers_of, run_spec, write_spec
from torchrun import environment

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is false"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]


@dataclass(frozen=True)
class Technique:
    """An adapter on a base in a precision; `rate` is one it learns at."""

    adapter: Tree
    precision: str = "fp32"
    rate: float = 0.01
    merges: bool = True


TECHNIQUES = {
    "full_bf16": Technique({"kind": "full"}, "bf16", 0.001),
    "lora": Technique({"kind": "lora", "rank": 4, "dropout": 0.1}),
    "dora_nf4": Technique({"kind": "dora", "rank": 4}, "nf4"),
    "ia3_bf16": Technique({"kind": "ia3"}, "bf16", 0.03),
    "adalora": Technique({"kind": "adalora", "rank": 6, "target_rank": 4}, rate=0.03),
    "prefix": Technique({"kind": "prefix", "num_virtual_tokens": 5}, rate=0.03, merges=False),
}
every_technique = pytest.mark.parametrize("name", TECHNIQUES)


@dataclass(frozen=True)
class Made:
    spec: Path
    run: Path
    result: dict[str, Any]


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Return the finished run of a technique, made once."""
    runs: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in runs:
            folder, technique = tmp_path_factory.mktemp(name), TECHNIQUES[name]
            spec = write_spec(
                folder,
                base,
                chats(),
                base={"model": str(base), "precision": technique.precision},
                adapter=technique.adapter,
                schedule={"learning_rate": technique.rate},
                evaluation={"every_steps": 4},
                checkpoints={"every_steps": 3, "every_epoch": False, "every_seconds": None},
                compute={"kind": "local", "device": DEVICE, "threads": 1},
            )
            runs[name] = Made(spec, folder / "run", run_spec(spec, folder / "run"))
        return runs[name]

    return make


def _until_killed(spec: Path, run: Path, step: int) -> None:
    """Run a spec until a step and die as `kill -9` does."""
    reached = at_step(step)
    run_spec(spec, run, listener=lambda event: kill_self() if reached(event) else None)


@every_technique
def test_it_learns_on_the_device(made: Callable[[str], Made], name: str) -> None:
    whole = made(name)
    losses = [step[2] for step in numbers_of(whole.run)]
    assert whole.result["status"] == "succeeded"
    before = whole.result["base"]["nll"] if TECHNIQUES[name].merges else losses[0]
    assert whole.result["tuned"]["nll"] < before - 0.01
    spec = open_run(whole.run).spec
    assert (spec.compute.device, spec.base.precision) == (DEVICE, TECHNIQUES[name].precision)


@every_technique
def test_its_losses_are_those_of_the_cpu(made: Callable[[str], Made], tmp_path: Path, name: str) -> None:
    whole = made(name)
    run_spec(whole.spec, tmp_path / "run", "compute.device=cpu")
    there, here = numbers_of(tmp_path / "run"), numbers_of(whole.run)
    assert [step[:2] + step[5:] for step in here] == [step[:2] + step[5:] for step in there]
    near = 1e-3 if TECHNIQUES[name].precision == "fp32" else 3e-2
    assert [step[2] for step in here[:8]] == pytest.approx([step[2] for step in there[:8]], rel=near)


@every_technique
def test_killed_and_resumed_is_never_stopped(made: Callable[[str], Made], tmp_path: Path, name: str) -> None:
    whole = made(name)
    # Started anew: CUDA cannot be used in a process forked from one that uses it.
    child = multiprocessing.get_context("spawn").Process(target=_until_killed, args=(whole.spec, tmp_path / "run", 8))
    child.start()
    child.join(timeout=100)
    code = child.exitcode
    child.kill()
    assert code == -signal.SIGKILL
    result = run_spec(whole.spec, tmp_path / "run", resume=True)
    ours, theirs = numbers_of(tmp_path / "run"), numbers_of(whole.run)
    print("to the bit" if ours == theirs else "not to the bit")
    near = 1e-3 if TECHNIQUES[name].precision == "fp32" else 3e-2
    assert [step[2] for step in ours] == pytest.approx([step[2] for step in theirs], rel=near)
    assert result["tuned"]["nll"] == pytest.approx(whole.result["tuned"]["nll"], rel=near)


@every_technique
def test_what_it_left_verifies(made: Callable[[str], Made], name: str) -> None:
    assert [f"{check.name}: {check.detail}" for check in verify_run(made(name).run) if not check.ok] == []


@every_technique
def test_it_merges_or_says_why_not(made: Callable[[str], Made], tmp_path: Path, name: str) -> None:
    whole, technique = made(name), TECHNIQUES[name]
    if not technique.merges:
        with pytest.raises(RunFolderError, match="cannot be merged"):
            export_run(whole.run, "merged", tmp_path / "merged")
        return
    said = export_run(whole.run, "merged", tmp_path / "merged")
    if technique.adapter["kind"] != "full":
        assert said["gate"]["kl"] <= MAX_KL[said["stored"]]


@every_technique
def test_it_answers(made: Callable[[str], Made], name: str) -> None:
    asked = CliRunner().invoke(cli, ["chat", str(made(name).run), "--once", "three 2", "--max-new-tokens", "6", "--json"])
    assert asked.exit_code == 0, asked.output
    assert json.loads(asked.stdout)["reply"]


def test_the_command_takes_the_device_by_itself_and_says_nothing_but_json(base: Path, tmp_path: Path) -> None:
    """The line is all of stdout: libraries that speak of CUDA there would break programs that read it."""
    spec = write_spec(tmp_path, base, chats(), base={"model": str(base)}, compute={"kind": "local"})
    command = [sys.executable, "-m", "kivnun", "tune", str(spec), "--output", "run", "--json"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert json.loads(ended.stdout)["status"] == "succeeded"
    spec_of_run = open_run(tmp_path / "run").spec
    assert spec_of_run.compute.device == "cuda"
    print(spec_of_run.base.precision, spec_of_run.compute.kernels)
