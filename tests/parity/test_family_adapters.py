"""LoRA on every family against PEFT on transformers: logits and gradients; and what the coverage report says of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny
from kivnun.data.packing import pack
from kivnun.errors import BaseModelError
from kivnun.model.adapters import resolve_targets
from kivnun.model.coverage import cover
from kivnun.model.families import read_config
from kivnun.model.load import load_base

# On both sides of the sliding window (12) and of LongRoPE's original length (24).
TRAINED = (1, 9, 25)
KNOWN = [
    "phi3_window", "phi4_mini", "phi", "llama_biased", "llama_llama3", "mistral", "qwen2_window", "qwen3_window", "gemma", "gemma2",
]  # fmt: skip
OPT: dict[str, Any] = {"vocab_size": tiny.VOCAB, "hidden_size": 48, "ffn_dim": 88, "num_hidden_layers": 2, "num_attention_heads": 6}
SIZES: dict[str, Any] = tiny.SIZES
# Families that Kivnun does not know by name.
OTHERS: dict[str, Callable[[], Any]] = {
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "olmo": lambda: transformers.OlmoConfig(**SIZES),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES),
    "gemma3": lambda: transformers.Gemma3TextConfig(**{**SIZES, "head_dim": 10, "sliding_window": tiny.WINDOW}),
    "starcoder2": lambda: transformers.Starcoder2Config(**SIZES),
    "opt": lambda: transformers.OPTConfig(**OPT, pad_token_id=0, bos_token_id=1, eos_token_id=2, word_embed_proj_dim=48),
}
GPT_2: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "n_positions": 512,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def folder_of(tiny_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    others = tmp_path_factory.mktemp("others")

    def find(name: str) -> Path:
        if name not in OTHERS:
            return tiny_base(name)
        folder = others / name
        return folder if folder.exists() else tiny.write_base(folder, OTHERS[name]())

    return find


@pytest.mark.parametrize("name", [*KNOWN, *OTHERS])
def test_logits_and_gradients_of_lora_are_pefts(name: str, folder_of: Callable[[str], Path]) -> None:
    folder, rows = folder_of(name), tiny.random_rows(TRAINED)
    base = load_base(folder, "fp32")
    weights: Any = tiny.new_weights(base)
    trainee = tiny.new_trainee(base, weights)
    twin = tiny.peft_twin(folder, weights.adapter)
    ids = [list(map(int, row.ids)) for row in rows]
    with base.using(weights.sites()):
        logits = tiny.packed_logits(base, ids)
    for row, found in zip(ids, logits, strict=True):
        assert tiny.relative_difference(found, tiny.reference_logits(twin, row)) < 1e-5

    total = sum(row.total_weight for row in rows)
    loss = trainee.forward_backward(pack(rows), total)
    # Row by row: in a batch, transformers chooses LongRoPE's factors by the longest row.
    theirs = torch.stack([tiny.reference_loss(twin, [row]) * (row.total_weight / total) for row in rows]).sum()
    theirs.backward()
    assert loss == pytest.approx(float(theirs.detach()), rel=1e-5)
    expected: dict[str, Any] = dict(twin.named_parameters())
    gradients = tiny.gradients(trainee)
    assert len(gradients) == len(weights.parameters())
    for key, gradient in gradients.items():
        assert tiny.relative_difference(gradient, expected[tiny.peft_name(key)].grad) < 5e-5, key


@pytest.mark.parametrize("name", [*tiny.CONFIGS, *OTHERS])
def test_the_report_says_what_loading_finds(name: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(name)
    report, base = cover(name, read_config(folder)), load_base(folder, "fp32")
    assert report.fast == (name in tiny.OWN) == (base.slow == [])
    assert report.model_class == base.name
    assert report.parameters == base.num_parameters
    assert report.tied == base.tied
    targets = [at.rpartition(".")[2] for at in resolve_targets(base, "all-linear")]
    assert {target.name: target.count for target in report.targets} == {end: targets.count(end) for end in targets}
    assert report.linear_numbers == sum(
        linear.in_features * linear.out_features for at, linear in base.linears.items() if at != base.head_name
    )
    assert report.distance < 1e-4


def test_the_report_tells_windows_caps_and_rotations(tiny_base: Callable[[str], Path]) -> None:
    def told(name: str) -> Any:
        return cover(name, read_config(tiny_base(name)))

    assert told("phi3_window").window == f"{tiny.WINDOW} tokens"
    assert told("phi3").window == "none within its context"
    assert told("qwen2_window").window == f"{tiny.WINDOW} tokens in 1 of 2 layers"
    assert told("qwen2").window == "none within its context"
    assert told("gemma2").softcaps == {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.5}
    rope = told("phi4_mini").rope
    assert (rope.kind, rope.share, rope.original) == ("LongRoPE", 0.75, tiny.ORIGINAL_LENGTH)
    assert told("llama_yarn").rope.kind == "yarn"


def test_experts_side_by_side_are_told_as_not_covered() -> None:
    config = transformers.Qwen3MoeConfig(
        **{**SIZES, "head_dim": 10, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    )
    report = cover("mixture", config.to_dict())
    assert report.uncovered["mlp.experts.gate_up_proj"] == 2 * 4 * 2 * 40 * 48
    assert report.uncovered["mlp.experts.down_proj"] == 2 * 4 * 40 * 48
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} == {target.name for target in report.targets}


def test_a_family_of_convolutions_in_place_of_linear_layers_can_be_tuned_whole_alone() -> None:
    report = cover("gpt2", transformers.GPT2Config(**GPT_2).to_dict())
    assert report.targets == ()
    assert set(report.uncovered) == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("StableLmConfig", "not told where rows end"),
        ("BloomConfig", "does not compute packed rows"),
        ("MambaConfig", "packed rows|row by row|cannot be run"),
        ("CohereConfig", "logit_scale"),
    ],
)
def test_a_family_that_loading_refuses_is_refused_in_the_report(config: str, words: str) -> None:
    sizes = {**SIZES, **({"n_head": 6} if config == "BloomConfig" else {"state_size": 4} if config == "MambaConfig" else {})}
    with pytest.raises(BaseModelError, match=words):
        cover("stranger", getattr(transformers, config)(**sizes).to_dict())


def test_a_wide_window_in_the_mask_alone_is_accepted_and_a_narrow_one_refused() -> None:
    sizes = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "use_sliding_window": True}
    wide = transformers.Qwen2MoeConfig(**{**sizes, "sliding_window": 512}).to_dict()
    assert cover("wide", wide).window == "none within its context"
    narrow = transformers.Qwen2MoeConfig(**{**sizes, "sliding_window": 12}).to_dict()
    with pytest.raises(BaseModelError, match="not told of"):
        cover("narrow", narrow)
