"""Prompt and prefix tuning: virtual tokens before every row are trained, as embeddings or as keys and values of every layer.

Both are kept in PEFT's form. They pack as any rows do, and cannot be folded into weights.
Next: `sites.py` (what a pass does with them).
Shapes: P virtual tokens, D model width, L layers, G key heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kivnun.errors import BaseModelError, IntegrityError
from kivnun.model.adapters import read_peft_tensors, write_peft
from kivnun.model.attention import KVCache, Rows
from kivnun.model.load import Base
from kivnun.model.sites import PrefixSite, PromptSite
from kivnun.randomness import generator

SITE = "virtual_tokens"
TENSOR = "prompt_embeddings"


@dataclass(slots=True)
class VirtualTokens:
    """Trained virtual tokens of either kind."""

    sites: dict[str, PromptSite | PrefixSite]
    config: dict[str, Any]
    no_merge: str = "virtual tokens are no part of any weight"

    def parameters(self) -> dict[str, nn.Parameter]:
        return {TENSOR: self._tensor}

    @property
    def _tensor(self) -> nn.Parameter:
        site = self.sites[SITE]
        return site.embeddings_PD if isinstance(site, PromptSite) else site.vectors_PE

    def draw_dropout(self, step: int, rows_T: Tensor, positions_T: Tensor) -> None:
        """Virtual tokens have no dropout."""

    def stop_dropout(self) -> None:
        """Virtual tokens have no dropout."""

    def before_update(self) -> None:
        """Nothing but the loss gives them a gradient."""

    def after_update(self, step: int) -> None:
        """The optimizer's update is all."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """There is none beside the trained tensor."""

    def save(self, folder: Path, base_name: str) -> None:
        write_peft(folder, self.config, base_name, {TENSOR: self._tensor.detach()})


def new_prompt(base: Base, count: int, seed: int) -> VirtualTokens:
    """Return a prompt of `count` virtual tokens that start as tokens of the vocabulary, drawn by the seed (the start that Lester et
    al. 2021, section 3.2, found best among those that need no choice)."""
    table_VD = base.embedding.weight
    ids_P = _drawn_ids(base, count, seed)
    return _prompt(base, nn.Parameter(table_VD.detach()[ids_P].float()))


@torch.no_grad()
def new_prefix(base: Base, count: int, seed: int) -> VirtualTokens:
    """Return a prefix of `count` virtual tokens that start as the keys and values of tokens of the vocabulary, drawn by the seed
    (Li and Liang 2021, section 7.4: real activations start better than random vectors)."""
    ids_P, cache, layers = _drawn_ids(base, count, seed), KVCache(), _num_layers(base)
    # One row at position 0 all along: nothing is turned.
    base.hidden(ids_P, torch.zeros_like(ids_P), Rows([count], cache, [0]))
    found = []
    for layer in range(layers):
        k_GPK, v_GPK = cache.held(layer, 0)
        found += [x_GPK.float().transpose(0, 1).flatten(1) for x_GPK in (k_GPK, v_GPK)]
    return _prefix(base, nn.Parameter(torch.cat(found, 1).contiguous()))


def load_virtual(base: Base, folder: Path, config: Mapping[str, Any]) -> VirtualTokens:
    """Return the virtual tokens in PEFT's folder. Raises IntegrityError where they do not fit the base."""
    tensors = read_peft_tensors(folder)
    tensor = tensors.get(TENSOR)
    prefix = config["peft_type"] == "PREFIX_TUNING"
    width = 2 * _num_layers(base) * _key_width(base) if prefix else base.embedding.embedding_dim
    if config.get("prefix_projection"):
        raise IntegrityError(f"{folder} projects its prefix, which is not supported", hint="train it with prefix_projection false")
    if tensor is None or len(tensors) > 1 or tensor.ndim != 2 or tensor.shape[1] != width:
        raise IntegrityError(
            f"{folder} should hold {TENSOR} of width {width}, got { ({name: tuple(t.shape) for name, t in tensors.items()}) }",
            hint="load it on the base it was trained on",
        )
    trained = nn.Parameter(tensor.to(base.device, torch.float32))
    return _prefix(base, trained) if prefix else _prompt(base, trained)


def _drawn_ids(base: Base, count: int, seed: int) -> Tensor:
    draws = generator(seed, "init", SITE).integers(0, base.vocabulary, count)
    return torch.from_numpy(draws).to(base.device)


def _prompt(base: Base, embeddings_PD: nn.Parameter) -> VirtualTokens:
    config = {"peft_type": "PROMPT_TUNING", **_shape(base, len(embeddings_PD)), "prompt_tuning_init": "RANDOM"}
    config |= {"token_dim": base.embedding.embedding_dim, "num_attention_heads": int(base.config.num_attention_heads)}
    return VirtualTokens({SITE: PromptSite(embeddings_PD)}, config)


def _prefix(base: Base, vectors_PE: nn.Parameter) -> VirtualTokens:
    heads = _key_heads(base)
    config = {"peft_type": "PREFIX_TUNING", **_shape(base, len(vectors_PE)), "prefix_projection": False}
    config |= {"token_dim": _key_width(base), "num_attention_heads": heads, "encoder_hidden_size": _key_width(base)}
    return VirtualTokens({SITE: PrefixSite(vectors_PE, _num_layers(base))}, config)


def _shape(base: Base, count: int) -> dict[str, int]:
    return {"num_virtual_tokens": count, "num_transformer_submodules": 1, "num_layers": _num_layers(base)}


def _num_layers(base: Base) -> int:
    return int(base.config.num_hidden_layers)


def _key_heads(base: Base) -> int:
    return int(getattr(base.config, "num_key_value_heads", None) or base.config.num_attention_heads)


def _key_width(base: Base) -> int:
    """Return how wide the keys of a layer are, all heads together."""
    config = base.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None)
    if kinds and getattr(config, "global_head_dim", None):
        raise BaseModelError(f"{base.name} has keys of several widths, which a prefix does not fit", hint="use another adapter")
    return _key_heads(base) * int(width)
