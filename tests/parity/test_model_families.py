"""Logits of packed rows against transformers, family by family: every row of a pack equals its run alone there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import tiny
from kivnun.errors import BaseModelError
from kivnun.model.load import load_base

# On both sides of the sliding window (12) and of LongRoPE's original length (24), and at the edges of both.
LENGTHS = (1, 2, 12, 13, 24, 25, 40)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_row_of_a_pack_has_the_logits_of_transformers_alone(name: str, tiny_base: Callable[[str], Path]):
    folder = tiny_base(name)
    rows = [tiny.random_ids(length) for length in LENGTHS]
    base, model = load_base(folder, "fp32"), tiny.reference(folder)
    for ids, logits in zip(rows, tiny.packed_logits(base, rows), strict=True):
        expected = tiny.reference_logits(model, ids)
        assert logits.shape == expected.shape
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("factors", "stretch"), [("short", tiny.SHORT), ("long", tiny.LONG)])
def test_fixed_rope_factors_hold_for_rows_of_every_length(factors: str, stretch: list[float], tmp_path: Path):
    config = tiny.CONFIGS["phi4_mini"]()
    folder = tiny.write_base(tmp_path / "base", config)
    base = load_base(folder, "fp32", rope_factors=factors)
    config.rope_parameters = {**config.rope_parameters, "short_factor": stretch, "long_factor": stretch}
    model = tiny.reference(tiny.write_base(tmp_path / "one_set", config))
    rows = [tiny.random_ids(length) for length in (5, 24, 25, 40)]
    for ids, logits in zip(rows, tiny.packed_logits(base, rows), strict=True):
        torch.testing.assert_close(logits, tiny.reference_logits(model, ids), rtol=0, atol=2e-5)


def test_rope_factors_are_felt_on_both_sides_of_the_original_length(tiny_base: Callable[[str], Path]):
    folder = tiny_base("phi4_mini")
    ids = tiny.random_ids(20)
    solo = {f: tiny.packed_logits(load_base(folder, "fp32", rope_factors=f), [ids])[0] for f in ("per_row", "short", "long")}
    assert torch.equal(solo["per_row"], solo["short"])
    assert not torch.allclose(solo["short"], solo["long"], atol=1e-2)


def test_rope_factors_without_longrope_are_refused(tiny_base: Callable[[str], Path]):
    with pytest.raises(BaseModelError, match="would change nothing"):
        load_base(tiny_base("llama"), "fp32", rope_factors="long")


PHI_MOE_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24, "factor": 4.0,
    "short_factor": [1.0, 1.3, 1.7, 1.9], "long_factor": [2.0, 5.5, 9.0, 10.0], "short_mscale": 1.2, "long_mscale": 1.2,
}  # fmt: skip
# What a config adds to the common sizes, and the words of the refusal.
REFUSED: dict[str, tuple[str, dict[str, object], str]] = {
    "attention sinks": ("GptOssConfig", {"head_dim": 8, "num_local_experts": 4}, "s_aux"),
    "logit scale": ("CohereConfig", {}, "logit_scale"),
    "scaled logits": ("GraniteConfig", {"logits_scaling": 3.0}, "logits_scaling"),
    "state-space layers": ("MambaConfig", {"state_size": 4}, "packed rows|row by row"),
    "convolutions": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, "does not compute packed rows"),
    "attention of its own": ("BloomConfig", {"n_head": 6}, "does not compute packed rows"),
    "no attention interface": ("FalconConfig", {}, "attention interface"),
    "arguments not handed on": ("StableLmConfig", {}, "not told where rows end"),
    "chunked attention": ("Llama4TextConfig", {"head_dim": 10, "attention_chunk_size": 16}, "within chunks"),
    "a LongRoPE of its own": ("PhimoeConfig", {"num_local_experts": 4, "rope_parameters": PHI_MOE_ROPE}, "turns a row of"),
    "window in the mask alone": ("PhimoeConfig", {"num_local_experts": 4, "sliding_window": 12}, "not told of"),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_would_compute_something_else_is_refused_on_loading(what: str, precision: str, tmp_path: Path):
    config, changes, words = REFUSED[what]
    tiny.write_base(tmp_path, getattr(transformers, config)(**{**tiny.SIZES, **changes}))
    with pytest.raises(BaseModelError, match=words):
        load_base(tmp_path, precision)


def test_frequencies_that_follow_the_longest_row_of_a_batch_are_refused(tmp_path: Path):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    tiny.write_base(tmp_path, transformers.LlamaConfig(**{**tiny.SIZES, "rope_parameters": rope}))
    with pytest.raises(BaseModelError, match="longest row of a batch"):
        load_base(tmp_path, "fp32")


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_family_loads_in_bfloat16_too(name: str, tiny_base: Callable[[str], Path]):
    base = load_base(tiny_base(name), "bf16")
    assert base.dtype == torch.bfloat16
    assert tiny.packed_logits(base, [tiny.random_ids(9)])[0].isfinite().all()


def test_a_folder_without_a_model_is_refused_in_one_sentence(tmp_path: Path):
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        load_base(tmp_path, "fp32")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load_base(tmp_path, "fp32")
    (tmp_path / "config.json").write_text('{"model_type": "phi3small", "auto_map": {}}', encoding="utf-8")
    with pytest.raises(BaseModelError, match="block-sparse"):
        load_base(tmp_path, "fp32")
