"""Writes a model with random weights: `python -m kivnun.matrix.law_model FOLDER NAME`."""

from __future__ import annotations

import sys

import torch
import transformers

from kivnun.matrix.law_cases import MODELS


def main() -> None:
    model = MODELS[sys.argv[2]]
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=model.vocab,
        hidden_size=model.hidden,
        intermediate_size=model.mlp,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=512,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    transformers.Phi3ForCausalLM(config).save_pretrained(sys.argv[1])


if __name__ == "__main__":
    main()
