"""Sizes read from a configuration are those of the decoder that is built from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from kivnun.errors import BaseModelError
from kivnun.matrix.shapes import outline_of
from kivnun.model.decoder import BlankLinear
from kivnun.plan.sizes import FAMILIES, Sizes

WIDTHS = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 112,
    "vocab_size": 320, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "phi3": lambda: Phi3Config(**WIDTHS, sliding_window=None),
    "phi3_tied": lambda: Phi3Config(**WIDTHS, tie_word_embeddings=True),
    "llama": lambda: LlamaConfig(**WIDTHS),
    "llama_biases": lambda: LlamaConfig(**WIDTHS, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**WIDTHS, head_dim=16),
    "qwen2": lambda: Qwen2Config(**WIDTHS),
    "qwen3": lambda: Qwen3Config(**WIDTHS, head_dim=20),
    "qwen3_biases": lambda: Qwen3Config(**WIDTHS, attention_bias=True),
}
# Families that transformers computes.
FOREIGN: dict[str, Any] = {
    "gemma": lambda: GemmaConfig(**WIDTHS, head_dim=16),
    "gemma_as_it_comes": lambda: GemmaConfig(**WIDTHS),
    "gemma2": lambda: Gemma2Config(**WIDTHS, head_dim=16),
    "gemma2_biases_untied": lambda: Gemma2Config(**WIDTHS, head_dim=16, attention_bias=True, tie_word_embeddings=False),
    "phi": lambda: PhiConfig(**{**WIDTHS, "num_key_value_heads": None}),
    "phi_head_norms": lambda: PhiConfig(**WIDTHS, qk_layernorm=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_they_are_those_of_the_decoder(name: str) -> None:
    config = CONFIGS[name]()
    sizes, decoder = Sizes.of(config.to_dict(), name), outline_of(config)
    linears = {n: (m.in_features, m.out_features) for n, m in decoder.named_modules() if type(m) is BlankLinear and n != "lm_head"}
    parameters = dict(decoder.named_parameters())  # a tied matrix is one
    assert sizes.linears == linears
    assert sizes.numbers == sum(p.numel() for p in parameters.values())
    assert set(sizes.modules) == {n.rpartition(".")[0] for n in parameters}
    assert sizes.norms == {n.rpartition(".")[0]: p.numel() for n, p in parameters.items() if "norm" in n}


@pytest.mark.parametrize("name", FOREIGN)
def test_they_are_those_of_transformers_model(name: str) -> None:
    config = FOREIGN[name]()
    sizes = Sizes.of(config.to_dict(), name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = dict(model.named_parameters())
    linears = {n: (m.in_features, m.out_features) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert sizes.linears == linears
    assert sizes.numbers == sum(p.numel() for p in parameters.values())
    assert set(sizes.modules) == {n.rpartition(".")[0] for n in parameters}


@pytest.mark.parametrize("lacking", ["head_dim", "tie_word_embeddings"])
def test_what_a_gemma_leaves_out_is_what_transformers_takes(lacking: str) -> None:
    told = GemmaConfig(**WIDTHS).to_dict()
    assert Sizes.of({name: value for name, value in told.items() if name != lacking}, "it") == Sizes.of(told, "it")


def test_every_family_that_is_known_was_compared() -> None:
    assert {Sizes.of(make().to_dict(), "it").family for make in (CONFIGS | FOREIGN).values()} == set(FAMILIES)


def test_another_family_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(BaseModelError, match=r"the layers of my/model \(model_type 'phimoe'\) are not known") as caught:
        Sizes.of({"model_type": "phimoe"}, "my/model")
    assert "phi3" in caught.value.hint


@pytest.mark.parametrize("value", [None, 0, -1, "48", True, 1.5])
def test_a_configuration_without_a_width_is_refused(value: object) -> None:
    with pytest.raises(BaseModelError, match="must give hidden_size as a number of 1 or more, got"):
        Sizes.of({**WIDTHS, "model_type": "phi3", "hidden_size": value}, "it")
