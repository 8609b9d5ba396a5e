"""What each technique trains: counted on the built-in base, by formula, and against published figures of Phi-3-mini."""

from __future__ import annotations

import json
from typing import Any

import pytest
from torch import nn

from kivnun.matrix.counts import BUILT_IN, as_json, count, count_config
from kivnun.matrix.memory_charts import counts_chart
from kivnun.matrix.shapes import PHI_3_MINI, config_of
from kivnun.model.families import find_base
from kivnun.model.peft_layers import peft
from kivnun.model.read_model import open_config
from kivnun.plan.techniques import TECHNIQUES
from kivnun.plan.trained import kronecker_numbers
from kivnun.spec.adapters import AdapterSpec, DoraSpec, LokrSpec, LoraSpec


@pytest.fixture(scope="module")
def phi() -> Any:
    return config_of(PHI_3_MINI)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_counted_and_by_formula_is_the_same_on_the_built_in_base(technique: str) -> None:
    folder = find_base(BUILT_IN)
    made, formula = count(technique, folder), count_config(technique, open_config(folder))
    assert made.trained == formula.trained
    assert made.moment_bytes == formula.moment_bytes == 8 * made.trained
    assert made.tensor_bytes == formula.tensor_bytes
    assert made.base_numbers == formula.base_numbers == 3_803_392
    assert set(made.modules) == set(formula.modules)
    assert made.file_bytes is not None
    assert made.tensor_bytes < made.file_bytes < made.tensor_bytes + 16_384
    if technique not in ("full", "vera"):  # VeRA writes the random matrices that all layers share, too
        assert made.tensor_bytes == 4 * made.trained


@pytest.mark.parametrize(
    ("spec", "trained", "matched"),
    [
        (LoraSpec(rank=8), 32 * 393_216, {"o_proj": 32, "qkv_proj": 32, "gate_up_proj": 32, "down_proj": 32}),
        (DoraSpec(rank=8), 32 * 424_960, {"o_proj": 32, "qkv_proj": 32, "gate_up_proj": 32, "down_proj": 32}),
        (LoraSpec(rank=8, target_modules=("o_proj",)), 32 * 49_152, {"o_proj": 32}),
        (LoraSpec(rank=8, target_modules=("o_proj", "qkv_proj")), 32 * 147_456, {"o_proj": 32, "qkv_proj": 32}),
        (LoraSpec(rank=8, target_modules=("o_proj", "down_proj")), 32 * 139_264, {"o_proj": 32, "down_proj": 32}),
    ],
)
def test_figures_of_phi_3_mini_are_those_that_peft_came_to(
    spec: AdapterSpec, trained: int, matched: dict[str, int], phi: Any
) -> None:
    """PEFT 0.21 around a random layer of Phi-3-mini's widths, times 32: 12.58 M, 13.60 M, 1.57 M, 4.72 M, 4.46 M."""
    found = count_config("lora", phi, spec)
    assert (found.trained, found.matched, found.base_numbers) == (trained, matched, 3_821_079_552)


def test_a_whole_model_trains_itself(phi: Any) -> None:
    found = count_config("full", phi, precision="bf16")
    assert (found.share, found.tensor_bytes) == (1.0, 2 * 3_821_079_552)
    assert found.matched["lm_head"] == found.matched["embed_tokens"] == 1


@pytest.mark.parametrize(
    "options", [{"decompose_both": True, "rank": 2}, {"decompose_factor": 4}, {"decompose_factor": 7}, {"rank": 64}]
)
def test_kronecker_factors_are_pefts(options: dict[str, Any]) -> None:
    config = peft().LoKrConfig(
        r=options.get("rank", 8), alpha=8, target_modules=["layer"], decompose_both=options.get("decompose_both", False)
    )
    config.decompose_factor = options.get("decompose_factor", -1)
    for inputs, outputs in [(256, 256), (256, 768), (768, 256), (280, 1000)]:
        root = nn.Module()
        root.layer = nn.Linear(inputs, outputs, bias=False)
        root.config = {"model_type": "custom"}  # type: ignore[assignment]
        model = peft().PeftModel(root, config)
        expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert kronecker_numbers(LokrSpec(**options), inputs, outputs) == expected


def test_counts_as_text_and_as_a_picture(phi: Any) -> None:
    counts = {name: count_config(name, phi) for name in TECHNIQUES}
    assert counts["prompt"].text == (
        "61,440 of 3,821,079,552 numbers (0.00161 %); 0.49 MB of moments, a file of 0.25 MB; 1 virtual_tokens"
    )
    assert json.loads(as_json(counts))["lora"]["trained"] == 25_165_824
    drawn = counts_chart(counts)
    assert all(technique.label in drawn for technique in TECHNIQUES.values())
    assert "26,181,632" in drawn
