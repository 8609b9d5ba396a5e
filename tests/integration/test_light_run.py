"""What a run on our own decoder must not import: transformers' modelling code and torch's compiler, 100 MB and a second."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runs import chats, write_spec

HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy", "transformers.modeling_utils")

PROGRAM = """
import json, sys
from kivnun.cli.main import run

for command in json.loads(sys.argv[1]):
    try:
        status = run(command)
    except SystemExit as stop:
        status = stop.code
    assert not status, (command, status)
print("LOADED", *[name for name in sys.argv[2].split(",") if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_a_run_its_evaluation_and_its_export_load_no_modelling_code(kind: str, tmp_path: Path) -> None:
    metrics = {"metrics": ["exact_match"], "samples": 2, "bootstrap": 100}
    adapter = {"kind": kind, "rank": 2, "dropout": 0.1}
    schedule = {"epochs": 1, "batch_rows": 4, "learning_rate": 0.001}
    spec = write_spec(tmp_path, Path("kivnun/tiny-phi"), chats(10), adapter=adapter, evaluation=metrics, schedule=schedule)
    run = str(tmp_path / "run")
    commands = [
        ["tune", str(spec), "--output", run],
        ["evaluate", run],
        ["export", run, "--to", "peft", "--output", str(tmp_path / "peft")],
    ]
    program = [sys.executable, "-c", PROGRAM, json.dumps(commands), ",".join(HEAVY)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "LOADED"
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()


def test_no_bars_of_transformers_tear_the_screen(tmp_path: Path) -> None:
    """Saving a whole model, and verifying with transformers' own, are the only times its code draws any."""
    spec = write_spec(tmp_path, Path("kivnun/tiny-phi"), chats(10), adapter={"kind": "full"}, schedule={"epochs": None, "steps": 1})
    run = str(tmp_path / "run")
    program = [sys.executable, "-c", PROGRAM, json.dumps([["tune", str(spec), "--output", run], ["verify", run]]), "transformers"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "LOADED transformers" in done.stderr
    assert "it/s]" not in done.stderr
