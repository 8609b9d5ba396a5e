"""Which layers an adapter covers: resolved from the base itself, never silently fewer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import transformers

import tiny
from kivnun.errors import BaseModelError
from kivnun.model.adapters import resolve_targets
from kivnun.model.load import load_base

TinyBase = Callable[[str], Path]


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_all_linear_is_what_peft_calls_all_linear(name: str, tiny_base: TinyBase):
    folder = tiny_base(name)
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny.reference(folder), config)
    theirs = {
        n.removeprefix("base_model.model.").removesuffix(".lora_A") for n, _ in model.named_modules() if n.endswith(".lora_A")
    }
    assert set(resolve_targets(load_base(folder, "fp32"), "all-linear")) == theirs


def test_names_match_full_names_and_ends_in_the_models_order(tiny_base: TinyBase):
    base = load_base(tiny_base("phi3"), "fp32")
    layer = "model.layers.{}.{}".format
    assert resolve_targets(base, ["down_proj", "qkv_proj"]) == tuple(
        layer(n, part) for n in (0, 1) for part in ("self_attn.qkv_proj", "mlp.down_proj")
    )
    assert resolve_targets(base, ["layers.1.mlp.down_proj"]) == (layer(1, "mlp.down_proj"),)
    assert resolve_targets(base, ["mlp.down_proj", "down_proj"]) == (layer(0, "mlp.down_proj"), layer(1, "mlp.down_proj"))
    assert resolve_targets(base, ["lm_head"]) == ("lm_head",)


def test_all_parts_of_a_fused_projection_mean_the_fused_one(tiny_base: TinyBase):
    base = load_base(tiny_base("phi3"), "fp32")
    parts = ["v_proj", "q_proj", "o_proj", "k_proj", "up_proj", "gate_proj", "down_proj"]
    assert resolve_targets(base, parts) == resolve_targets(base, "all-linear")
    assert resolve_targets(base, ["q_proj", "k_proj", "v_proj", "qkv_proj"]) == resolve_targets(base, ["qkv_proj"])


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["gate_proj"], ["q_proj", "k_proj", "v_proj", "up_proj"]])
def test_a_part_of_a_fused_projection_is_refused_with_the_way_out(targets: list[str], tiny_base: TinyBase):
    with pytest.raises(BaseModelError, match="as one") as refusal:
        resolve_targets(load_base(tiny_base("phi3"), "fp32"), targets)
    assert "name qkv_proj" in str(refusal.value) or "name gate_up_proj" in str(refusal.value)


def test_split_names_are_taken_as_they_are_where_they_exist(tiny_base: TinyBase):
    base = load_base(tiny_base("llama"), "fp32")
    assert [name.rpartition(".")[2] for name in resolve_targets(base, ["q_proj", "v_proj"])] == ["q_proj", "v_proj"] * 2


@pytest.mark.parametrize("targets", [["proj"], ["qkv"], ["down_proj", "mlp"], ["embed_tokens"], ["model.layers.2.mlp.down_proj"]])
def test_a_name_that_matches_nothing_is_refused_with_the_names_there_are(targets: list[str], tiny_base: TinyBase):
    with pytest.raises(BaseModelError, match="matches no linear layer") as refusal:
        resolve_targets(load_base(tiny_base("phi3"), "fp32"), targets)
    assert "down_proj, gate_up_proj, lm_head, o_proj, qkv_proj" in str(refusal.value)


def test_a_base_whose_projections_are_not_linear_layers_is_refused(tmp_path: Path):
    config = transformers.GPT2Config(vocab_size=tiny.VOCAB, n_embd=48, n_head=6, n_layer=2, bos_token_id=1, eos_token_id=2)
    base = load_base(tiny.write_base(tmp_path, config), "fp32")
    with pytest.raises(BaseModelError, match="no linear layer besides its head"):
        resolve_targets(base, "all-linear")


def test_a_head_that_shares_the_embeddings_weight_is_refused(tiny_base: TinyBase):
    base = load_base(tiny_base("phi3_tied"), "fp32")
    assert base.tied
    with pytest.raises(BaseModelError, match="shares its weight"):
        resolve_targets(base, ["lm_head"])
    assert not load_base(tiny_base("phi3"), "fp32").tied


def test_dropout_on_the_head_is_refused(tiny_base: TinyBase):
    with pytest.raises(BaseModelError, match="chosen positions only"):
        tiny.new_weights(load_base(tiny_base("phi3"), "fp32"), targets=["lm_head"], dropout=0.1)
