"""ZeRO on one GPU over NCCL, its state on the GPU or left in the machine's memory: what TorchEngine computes there.

One process is all that one GPU serves: NCCL refuses two ranks on a device. Each launch has its own timeout, so that what hangs
costs little. Several processes are held to one on the CPU (`tests/parity/test_zero_engine.py`).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kivnun.opened import open_run
from runs import chats, numbers_of, run_spec, write_spec
from tiny import CONFIGS, write_base
from torchrun import WORKER, environment, torchrun
from zero_worker import Case, in_one_process

DEVICE = "cuda"
TIMEOUT_S = 100
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is false"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
SHAPES = [(1, "none"), (1, "optimizer"), (2, "none"), (2, "optimizer"), (3, "none"), (3, "optimizer"), (3, "parameters")]
FP32 = {"full": ("full", "fp32"), "lora": ("lora", "fp32")}
ROUNDED = {"full_bf16": ("full", "bf16"), "lora_nf4": ("lora", "nf4")}
every_shape = pytest.mark.parametrize(("stage", "offload"), SHAPES)


def cases_of(kinds: dict[str, tuple[str, str]], stage: int, offload: str) -> list[Case]:
    return [
        {"name": name, "kind": kind, "precision": precision, "base": "phi3", "device": DEVICE, "again": True}
        | {"stage": stage, "offload": offload}
        for name, (kind, precision) in kinds.items()
        if (name, stage) != ("full_bf16", 1)  # which the spec refuses
    ]


def launched(folder: Path, cases: list[Case]) -> dict[str, tuple[Case, Case]]:
    """Return each case as one process under ZeRO saw it, and as TorchEngine saw it on the same device."""
    write_base(folder / "phi3", CONFIGS["phi3"]())
    (folder / "cases.json").write_text(json.dumps(cases))
    torchrun(1, str(WORKER), str(folder), DEVICE, timeout=TIMEOUT_S)
    return {it["name"]: (json.loads((folder / it["name"] / "seen.json").read_text()), in_one_process(folder, it)) for it in cases}


def steps_of(seen: Case) -> list[dict[str, float]]:
    return [*seen["first"], *seen["rest"]]


def check_files(folder: Path, name: str, rounded: bool) -> None:
    """Hold the result to the checkpoint of the same moment, and the resumed run's checkpoint to the straight one's."""
    live = load_file(folder / name / "end" / "state.safetensors")
    exported: dict[str, torch.Tensor] = {}
    for file in (folder / name / "export").glob("*.safetensors"):
        exported |= load_file(file)
    for key, tensor in live.items():
        (found,) = [exported[its] for its in (key, f"base_model.model.{key}.weight", f"base_model.model.{key}") if its in exported]
        assert torch.equal(found, tensor.to(found.dtype)), key
    again = load_file(folder / name / "again" / "state.safetensors")
    for key, tensor in live.items():
        assert float((again[key] - tensor).abs().max()) < (2e-2 if rounded else 1e-3), key


@every_shape
def test_full_and_lora_train_as_without_it(stage: int, offload: str, tmp_path: Path) -> None:
    for name, (zero, alone) in launched(tmp_path, cases_of(FP32, stage, offload)).items():
        for ours, theirs in zip(steps_of(zero), steps_of(alone), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), name
            assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-4), name
        np.testing.assert_allclose(zero["before"], alone["before"], atol=1e-5)
        np.testing.assert_allclose(zero["after"], alone["after"], atol=1e-4)
        assert zero["sampled"] == alone["sampled"], name
        for ours, theirs in zip(zero["again"], zero["rest"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6), name
        check_files(tmp_path, name, rounded=False)


@every_shape
def test_what_computes_in_bfloat16_trains_as_without_it(stage: int, offload: str, tmp_path: Path) -> None:
    for name, (zero, alone) in launched(tmp_path, cases_of(ROUNDED, stage, offload)).items():
        for ours, theirs in zip(steps_of(zero), steps_of(alone), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2), name
            assert ours["norm"] == pytest.approx(theirs["norm"], rel=3e-2), name
        for ours, theirs in zip(zero["again"], zero["rest"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=4e-3), name
        check_files(tmp_path, name, rounded=True)


@pytest.mark.parametrize(("stage", "offload"), [(2, "optimizer"), (3, "parameters")])
def test_the_command_trains_with_what_is_left_in_memory_and_resumes(stage: int, offload: str, base: Path, tmp_path: Path) -> None:
    compute: dict[str, Any] = {"kind": "multi_process", "device": DEVICE, "threads": 2, "processes": 1}
    compute |= {"zero_stage": stage, "offload": offload}
    checkpoints = {"every_steps": 3, "every_epoch": False, "every_seconds": None}
    precise = {"model": str(base), "precision": "fp32"}
    spec = write_spec(tmp_path, base, chats(), base=precise, compute=compute, checkpoints=checkpoints)
    command = [sys.executable, "-m", "kivnun", "tune", str(spec), "--output", "run", "--json"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert json.loads(ended.stdout)["status"] == "succeeded"
    assert open_run(tmp_path / "run").spec.compute.device == DEVICE
    run_spec(spec, tmp_path / "alone", f"compute={{kind: local, device: {DEVICE}, threads: 1}}")
    ours, theirs = numbers_of(tmp_path / "run"), numbers_of(tmp_path / "alone")
    assert [step[2] for step in ours] == pytest.approx([step[2] for step in theirs], rel=1e-3)
