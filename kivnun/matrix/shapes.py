"""Bases made of a configuration alone: their names and sizes without weights, and folders of them with random weights.

Next: `counts.py`, `memory_probe.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from kivnun.model.decoder import Decoder, design_of
from kivnun.randomness import generator


@dataclass(frozen=True, slots=True)
class Shape:
    """The widths of a Phi-3 model whose head is not its embedding."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int

    @property
    def config(self) -> dict[str, Any]:
        """Return the model's config.json."""
        return {
            "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": self.hidden,
            "intermediate_size": self.mlp, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab, "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2,
        }  # fmt: skip


# Inner layers about 8/3 as wide, as Phi-3-mini has them; and layers that outweigh the vocabulary, as in a model of real size.
SHAPES = {
    "thimble": Shape(hidden=64, layers=2, heads=2, kv_heads=2, mlp=128, vocab=256),
    "9m": Shape(hidden=256, layers=8, heads=4, kv_heads=4, mlp=704, vocab=4096),
    "28m": Shape(hidden=384, layers=12, heads=6, kv_heads=6, mlp=1024, vocab=8192),
    "71m": Shape(hidden=512, layers=12, heads=8, kv_heads=4, mlp=1536, vocab=32064),
}
# https://huggingface.co/microsoft/Phi-3-mini-4k-instruct/blob/main/config.json
PHI_3_MINI = Shape(hidden=3072, layers=32, heads=32, kv_heads=32, mlp=8192, vocab=32064)


def config_of(shape: Shape) -> Any:
    """Return transformers' configuration of these widths."""
    from transformers import Phi3Config

    return Phi3Config.from_dict(shape.config)


def outline_of(config: Any) -> Decoder:
    """Return the decoder of transformers' configuration, of a family that Kivnun computes itself, without weights."""
    design = design_of(config)
    assert design is not None
    decoder = Decoder(config, design, "per_row", torch.bfloat16)
    if config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight
    return decoder


def write_shape(folder: Path, shape: Shape) -> None:
    """Write a model of these widths with random weights in bfloat16, the same every time."""
    tensors = {name: _drawn(name, tuple(p.shape)) for name, p in outline_of(config_of(shape)).named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(shape.config), encoding="utf-8")


def _drawn(name: str, size: tuple[int, ...]) -> torch.Tensor:
    if len(size) == 1:  # a norm's
        return torch.ones(size, dtype=torch.bfloat16)
    draws = generator(0, "shape", name).standard_normal(size, dtype=np.float32)
    return torch.from_numpy(draws * np.float32(0.02)).bfloat16()
