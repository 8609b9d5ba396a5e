"""The decoder that Kivnun computes by itself: Phi-3 to Phi-4, Llama, Mistral, Qwen2 and Qwen3.

Built from transformers' configuration, with the names that transformers' models and their files give to parameters, and without
its modelling code. Layers are h += o(attention(qkv(norm(h)))); h += down(silu(gate(norm(h))) * up(norm(h))), with rotate-half
rotations; each sum waits for the norm that reads it, and the two are one kernel. What is kept for the backward pass is the residual
stream, the projections and the log-sums of the scores: normed inputs and gated products are made again where their layers need
them. The last layer goes on from its attention with those tokens alone that are asked for. Other families compute by transformers'
own forward (`foreign.py`).
Shapes: T tokens, S selected ones of them, D model width, F inner width, H query heads, G key/value heads, K head width, O any.
Next: `read_decoder.py` (where the weights come from), `blocks.py`, `attention.py`, `linear.py` (what the layers are made of).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kivnun.model.attention import HeadShape, Rows, fused_attention
from kivnun.model.blocks import Stream, gated, normed_sum, rms_norm
from kivnun.model.kernels import Angles, Kernels
from kivnun.model.linear import Again
from kivnun.model.rope import rotary_of

Made = TypeVar("Made")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Design:
    """What tells the families apart: the name of transformers' class, and what their layers have. `windows` is one per layer."""

    name: str
    windows: tuple[int | None, ...]
    fused: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False


def design_of(config: Any) -> Design | None:
    """Return how a configuration of transformers' is built here, or None for what is left to transformers."""
    rope = getattr(config, "rope_parameters", None) or {}
    if getattr(config, "hidden_act", None) != "silu" or "rope_type" not in rope:
        return None
    if config.model_type != "phi3" and rope.get("partial_rotary_factor", 1.0) != 1.0:
        return None
    layers = config.num_hidden_layers
    match config.model_type:
        case "phi3":
            return Design("Phi3ForCausalLM", (config.sliding_window,) * layers, fused=True)
        case "llama":
            bias = config.attention_bias
            return Design("LlamaForCausalLM", (None,) * layers, qkv_bias=bias, out_bias=bias, mlp_bias=config.mlp_bias)
        case "mistral":
            return Design("MistralForCausalLM", (config.sliding_window,) * layers)
        case "qwen2" if _knows_all_layers(config):
            return Design("Qwen2ForCausalLM", _windows_by_type(config), qkv_bias=True)
        case "qwen3" if _knows_all_layers(config):
            bias = config.attention_bias
            return Design("Qwen3ForCausalLM", _windows_by_type(config), qkv_bias=bias, out_bias=bias, head_norms=True)
    return None


def _knows_all_layers(config: Any) -> bool:
    return {"full_attention", "sliding_attention"}.issuperset(config.layer_types)


def _windows_by_type(config: Any) -> tuple[int | None, ...]:
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)


class BlankLinear(nn.Linear):
    """A linear layer whose weights are still to come. torch would start them at random, and on the meta device that imports its
    compiler."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


class Decoder(nn.Module):
    """A causal language model without weights: every parameter is on the meta device until a reader replaces it.

    `name` is that of transformers' class. Linear layers and the embedding are replaced by tunable ones before it computes.
    """

    def __init__(self, config: Any, design: Design, rope_factors: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.name = config, design.name
        self.generation_config: Any = None  # goes out with the weights as it came in
        self.recompute = False
        self.model = _Trunk(config, design, dtype)
        self.lm_head = _linear(config.hidden_size, config.vocab_size, False, dtype)
        self.rotary = rotary_of(config, design.name, rope_factors)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids_T: Tensor, positions_T: Tensor, rows: Rows, select_S: Tensor | None) -> Tensor:
        """Return the normed hidden states [T, D] that the head is for, or those of the selected tokens alone [S, D].

        With `recompute` a layer keeps its input alone and computes the rest again in the backward pass (activation checkpointing).
        """
        stream = Stream(self.model.embed_tokens(ids_T))
        angles = self.rotary(positions_T, rows.lengths, stream.h_TD.dtype)
        last = len(self.model.layers) - 1
        for number, layer in enumerate(self.model.layers):
            stream = stream.summed() if self.recompute else stream  # the input that a layer keeps is a tensor less
            given = (stream, angles, rows, select_S if number == last else None, not self.recompute)
            stream = recomputed(layer, *given) if self.recompute else layer(*given)
        return self.model.norm(stream, rows.kernels)[1]


def recomputed(layer: Callable[..., Made], *given: Any, **named: Any) -> Made:
    """Return what the layer makes of its input; in the backward pass it makes it again."""
    if not torch.is_grad_enabled():
        return layer(*given, **named)
    from torch.utils.checkpoint import checkpoint

    return checkpoint(layer, *given, use_reentrant=False, preserve_rng_state=False, **named)  # type: ignore[return-value]


class _Trunk(nn.Module):
    def __init__(self, config: Any, design: Design, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.hidden_size
        table_VD = torch.empty(config.vocab_size, width, device="meta", dtype=dtype)
        self.embed_tokens = nn.Embedding(config.vocab_size, width, _weight=table_VD)
        self.layers = nn.ModuleList(_Layer(config, design, number, dtype) for number in range(config.num_hidden_layers))
        self.norm = _Norm(width, config.rms_norm_eps, dtype)


class _Layer(nn.Module):
    def __init__(self, config: Any, design: Design, number: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn = _Attention(config, design, number, dtype)
        self.mlp = _Mlp(config, design, dtype)
        self.input_layernorm = _Norm(config.hidden_size, config.rms_norm_eps, dtype)
        self.post_attention_layernorm = _Norm(config.hidden_size, config.rms_norm_eps, dtype)

    def forward(self, stream: Stream, angles: Angles, rows: Rows, select_S: Tensor | None, remake: bool) -> Stream:
        """Return the residual stream after this layer, of all tokens or of the selected ones alone: nothing but attention mixes
        tokens, so the rest of the layer does without the others.

        `remake`: projections make their inputs again in the backward pass, out of what is kept anyway. Where the whole layer is
        made again nothing is kept, and this would hold on to it.
        """
        norm, kernels = self.input_layernorm, rows.kernels
        stream, x_TD = norm(stream, kernels)
        out_TO = self.self_attn(x_TD, norm.again(stream.h_TD, kernels) if remake else None, angles, rows)
        if select_S is not None:
            out_TO, stream = out_TO.index_select(0, select_S), stream.at(select_S)
        norm = self.post_attention_layernorm
        stream, x_TD = norm(stream._replace(delta_TD=self.self_attn.o_proj(out_TO, None, select_S)), kernels)
        again = norm.again(stream.h_TD, kernels) if remake else None
        return stream._replace(delta_TD=self.mlp(x_TD, again, kernels, select_S))


class _Attention(nn.Module):
    def __init__(self, config: Any, design: Design, number: int, dtype: torch.dtype) -> None:
        super().__init__()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads, keys = config.num_attention_heads, config.num_key_value_heads
        self.shape = HeadShape(heads, keys, width, width**-0.5, design.windows[number], number)
        inputs, widths = config.hidden_size, self.shape.widths
        out = _linear(widths[0], inputs, design.out_bias, dtype)
        if design.fused:  # in transformers' order, in which adapters list their layers too
            self.o_proj, self.qkv_proj = out, _linear(inputs, sum(widths), design.qkv_bias, dtype)
            self.parts = ("qkv_proj",)
        else:
            self.q_proj, self.k_proj, self.v_proj = (_linear(inputs, width, design.qkv_bias, dtype) for width in widths)
            self.o_proj, self.parts = out, ("q_proj", "k_proj", "v_proj")
        self.q_norm = _Norm(width, config.rms_norm_eps, dtype) if design.head_norms else None
        self.k_norm = _Norm(width, config.rms_norm_eps, dtype) if design.head_norms else None

    def forward(self, x_TD: Tensor, again: Again, angles: Angles, rows: Rows) -> Tensor:
        """Return what the heads say [T, H * K], not yet projected back."""
        parts: list[Tensor] = [self.get_submodule(name)(x_TD, again) for name in self.parts]
        if self.q_norm is not None and self.k_norm is not None:
            parts[:2] = self.q_norm.of_heads(parts[0], rows.kernels), self.k_norm.of_heads(parts[1], rows.kernels)
        return fused_attention(_side_by_side(parts), self.shape, rows, angles)


class _Mlp(nn.Module):
    def __init__(self, config: Any, design: Design, dtype: torch.dtype) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.parts = ("gate_up_proj",) if design.fused else ("gate_proj", "up_proj")
        for name in self.parts:
            self.add_module(name, _linear(width, 2 * inner // len(self.parts), design.mlp_bias, dtype))
        self.down_proj = _linear(inner, width, design.mlp_bias, dtype)

    def forward(self, x_TD: Tensor, again: Again, kernels: Kernels, select_S: Tensor | None) -> Tensor:
        gu_T2F = _side_by_side([self.get_submodule(name)(x_TD, again, select_S) for name in self.parts])
        kept_T2F, gate = gu_T2F.detach(), kernels.gate
        return self.down_proj(gated(gu_T2F, kernels), (lambda: gate(kept_T2F)) if again else None, select_S)


class _Norm(nn.Module):
    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device="meta", dtype=dtype))
        self.eps = eps

    def forward(self, stream: Stream, kernels: Kernels) -> tuple[Stream, Tensor]:
        """Return the stream with its delta added, and its norm."""
        return normed_sum(stream, self.weight, self.eps, kernels)

    def of_heads(self, x_TO: Tensor, kernels: Kernels) -> Tensor:
        """Return each head of each token normed by itself."""
        return rms_norm(x_TO.reshape(-1, len(self.weight)), self.weight, self.eps, kernels).view(x_TO.shape)

    def again(self, x_TD: Tensor, kernels: Kernels) -> Callable[[], Tensor]:
        """Return the way to make this norm's output of x a second time."""
        kept_TD = x_TD.detach()
        return lambda: kernels.rms_norm(kept_TD, self.weight.detach(), self.eps)[0]


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _linear(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> BlankLinear:
    return BlankLinear(inputs, outputs, bias=bias, device="meta", dtype=dtype)
