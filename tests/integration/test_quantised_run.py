"""Runs on a base held in codes: from the spec to a verified run, an adapter for PEFT and a merged model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from by_hand import nll_by_hand
from kivnun.errors import SpecError
from kivnun.export.merge import export_run
from kivnun.export.verify import verify_run
from kivnun.opened import open_run
from runs import chats, run_spec, write_spec

RUNS = {
    "qlora": ("nf4", {"kind": "lora", "rank": 4}),
    "dora on nf4": ("nf4", {"kind": "dora", "rank": 4}),
    "lora on int8": ("int8", {"kind": "lora", "rank": 4}),
}


@pytest.fixture(scope="module")
def run_of(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the finished run of a name, made once."""
    place = tmp_path_factory.mktemp("runs")

    def made(name: str) -> Path:
        precision, adapter = RUNS[name]
        folder = place / name.replace(" ", "_")
        if not folder.exists():
            spec = write_spec(folder, base, chats(), base={"model": str(base), "precision": precision}, adapter=adapter)
            run_spec(spec, folder / "run")
        return folder / "run"

    return made


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_codes_learns_and_verifies_to_the_bit(name: str, run_of: Callable[[str], Path]) -> None:
    result = json.loads((run_of(name) / "result.json").read_text(encoding="utf-8"))
    assert result["tuned"]["nll"] < result["base"]["nll"]
    checks = {check.name: check for check in verify_run(run_of(name))}
    assert [check for check in checks.values() if not check.ok] == []
    assert "equal to the bit" in checks["first steps"].detail


@pytest.mark.parametrize("name", RUNS)
def test_a_merge_is_the_decoded_base_with_the_adapter_in_bfloat16(name: str, run_of: Callable[[str], Path], tmp_path: Path) -> None:
    precision, _ = RUNS[name]
    said = export_run(run_of(name), "merged", tmp_path / "out")
    assert said["stored"] == "bf16"
    assert said["gate"]["kl"] <= 1e-3
    assert f"held in {precision}" in said["note"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", attn_implementation="eager").eval()
    assert model.dtype == torch.bfloat16
    assert "quantization_config" not in model.config.to_dict()
    opened = open_run(run_of(name))
    tuned = json.loads((run_of(name) / "result.json").read_text(encoding="utf-8"))["tuned"]["nll"]
    assert nll_by_hand(model, opened) == pytest.approx(tuned, abs=2e-2)


def test_a_base_that_bitsandbytes_saved_is_tuned_as_it_is(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: it makes the base of this test")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    for file in base.iterdir():
        if file.suffix in (".json", ".jinja") and not (tmp_path / "base" / file.name).exists():
            (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    lora = {"kind": "lora", "rank": 4}
    run_spec(write_spec(tmp_path / "auto", tmp_path / "base", chats(), adapter=lora), tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert run.spec.base.precision == "nf4"
    assert [check for check in verify_run(tmp_path / "run") if not check.ok] == []
    given = {"model": str(tmp_path / "base"), "precision": "bf16"}
    with pytest.raises(SpecError, match="stored in nf4"):
        run_spec(write_spec(tmp_path / "given", tmp_path / "base", chats(), base=given, adapter=lora), tmp_path / "other")
