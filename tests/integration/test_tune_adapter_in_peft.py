"""The adapter of a run, in PEFT on the plain model: the held-out rows score what the run says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from by_hand import nll_by_hand
from kivnun.opened import OpenedRun, open_run
from runs import chats, pairs, run_spec, write_spec

KINDS = {
    "lora": {"kind": "lora", "rank": 4, "dropout": 0.1},
    "rslora_some": {"kind": "lora", "rank": 4, "rslora": True, "target_modules": ["qkv_proj", "down_proj"]},
    "dora": {"kind": "dora", "rank": 2},
    "full": {"kind": "full"},
}


def plain_model(opened: OpenedRun) -> torch.nn.Module:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if opened.is_full:
        return AutoModelForCausalLM.from_pretrained(opened.folder.model, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(opened.base_folder, dtype=torch.float32)
    return PeftModel.from_pretrained(model, opened.folder.adapter).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_peft_scores_the_held_out_rows_as_the_run_says(base: Path, tmp_path: Path, kind: str) -> None:
    rate = 0.001 if kind == "full" else 0.01
    spec = write_spec(tmp_path, base, chats(), adapter=KINDS[kind], schedule={"epochs": 4, "learning_rate": rate})
    result = run_spec(spec, tmp_path / "run")
    opened = open_run(tmp_path / "run")
    assert result["tuned"]["nll"] < result["base"]["nll"] - 0.01
    assert nll_by_hand(plain_model(opened), opened) == pytest.approx(result["tuned"]["nll"], abs=1e-4)
    assert result == json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))


def test_what_opens_a_run_scores_it_as_the_run_did(base: Path, tmp_path: Path) -> None:
    result = run_spec(write_spec(tmp_path, base, chats()), tmp_path / "run")
    scored_base, scored_tuned = open_run(tmp_path / "run").evaluate()
    assert (scored_base.nll, scored_tuned.nll) == (result["base"]["nll"], result["tuned"]["nll"])


def test_an_adapter_trained_on_preferences_opens_in_peft(base: Path, tmp_path: Path) -> None:
    run_spec(write_spec(tmp_path, base, pairs()), tmp_path / "run")
    opened = open_run(tmp_path / "run")
    assert nll_by_hand(plain_model(opened), opened) > 0
