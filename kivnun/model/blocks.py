"""Decoder layers on the fast path: norm, rotated attention and gated MLP, each one function with its gradient.

Laid over the layers of families that compute exactly this, on the instance; parameters and names stay where they are. What is kept
for the backward pass is the residual stream, the projections and the log-sums of the scores: normed inputs and gated products are
made again where their layers need them. Layers of other families keep their own forward, and the run names them.
Shapes: T tokens, D model width, F inner width, H query heads, G key/value heads, K head width, R half the rotated width.
Next: `kernels/reference.py` (each operation), `linear.py` (the projections), `attention.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kivnun.model.attention import Rows, fused_attention
from kivnun.model.kernels import Angles, Kernels
from kivnun.model.linear import Again

# Layers that are: h += o(attention(qkv(norm(h)))); h += down(silu(gate(norm(h))) * up(norm(h))), with rotate-half rotations.
FAST_LAYERS = frozenset({"Phi3DecoderLayer", "LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"})
FAST_NORMS = frozenset({"Phi3RMSNorm", "LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})


def install(model: nn.Module, kernels: Kernels, recompute: bool) -> list[str]:
    """Lay the fast path over a model's layers and norms; return a line for each kind of layer that has none.

    With `recompute` a layer keeps its input alone and computes the rest again in the backward pass (activation checkpointing).
    """
    slow: Counter[str] = Counter()
    for layer in _layers(model):
        name = type(layer).__name__
        if name in FAST_LAYERS and layer.self_attn.config.hidden_act == "silu":  # type: ignore[union-attr]
            layer.forward = FastLayer(layer, kernels, recompute)
        else:
            slow[name] += 1
            if recompute:
                layer.forward = _recomputed(layer.forward)
    for module in model.modules():
        if type(module).__name__ in FAST_NORMS:
            module.forward = FastNorm(module, kernels)
    return [f"{count} {name} compute by transformers' own forward: products and attention are fast, the rest is not"
            for name, count in slow.items()]  # fmt: skip


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the trunk's list of layers, whatever the family calls it."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            yield from module
            return


class FastNorm:
    """The forward of an RMSNorm."""

    def __init__(self, norm: nn.Module, kernels: Kernels) -> None:
        self._weight, self._eps, self._kernels = norm.weight, float(norm.variance_epsilon), kernels  # type: ignore[arg-type]

    def __call__(self, hidden_states: Tensor) -> Tensor:
        flat_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        return _RmsNorm.apply(flat_TD, self._weight, self._eps, self._kernels).view(hidden_states.shape)  # type: ignore[union-attr]

    def again(self, x_TD: Tensor) -> Callable[[], Tensor]:
        """Return the way to make this norm's output of x a second time."""
        kept_TD = x_TD.detach()
        return lambda: self._kernels.rms_norm(kept_TD, self._weight.detach(), self._eps)[0]  # type: ignore[union-attr, operator]


class FastLayer:
    """The forward of a decoder layer. Rows with a cache (generation) and calls without rows take the layer's own."""

    def __init__(self, layer: nn.Module, kernels: Kernels, recompute: bool) -> None:
        self._own, self._kernels, self._recompute = layer.forward, kernels, recompute
        self._attn, self._mlp = layer.self_attn, layer.mlp
        self._norm_in = FastNorm(layer.input_layernorm, kernels)  # type: ignore[arg-type]
        self._norm_mid = FastNorm(layer.post_attention_layernorm, kernels)  # type: ignore[arg-type]
        config: Any = layer.self_attn.config  # type: ignore[union-attr]
        self._head_dim, self._scale = int(self._attn.head_dim), float(self._attn.scaling)  # type: ignore[arg-type, union-attr]
        self._sizes = (config.num_attention_heads * self._head_dim, config.num_key_value_heads * self._head_dim)
        self._window = getattr(self._attn, "sliding_window", getattr(config, "sliding_window", None))

    def __call__(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], rows: Rows | None = None, **rest: Any
    ) -> Tensor:
        if rows is None or rows.cache is not None:
            return self._own(hidden_states, position_embeddings=position_embeddings, rows=rows, **rest)
        angles = rows.angles_of(position_embeddings)
        if self._recompute and torch.is_grad_enabled():
            out = checkpoint(self._layer, hidden_states[0], angles, rows, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self._layer(hidden_states[0], angles, rows)
        return out[None]  # type: ignore[index]

    def _layer(self, h_TD: Tensor, angles: Angles, rows: Rows) -> Tensor:
        x_TD, again = self._norm_in(h_TD), self._norm_in.again(h_TD)
        queries, keys = self._sizes
        qkv_TO = self._qkv(x_TD, again)
        out_TO = fused_attention(qkv_TO, queries, keys, self._head_dim, rows, self._scale, self._window, angles, self._kernels)
        h_TD = h_TD + self._attn.o_proj(out_TO)  # type: ignore[operator, union-attr]
        x_TD, again = self._norm_mid(h_TD), self._norm_mid.again(h_TD)
        gu_T2F = self._gate_up(x_TD, again)
        kept_T2F, gate = gu_T2F.detach(), self._kernels.gate
        return h_TD + self._mlp.down_proj(_Gate.apply(gu_T2F, self._kernels), lambda: gate(kept_T2F))  # type: ignore[operator, union-attr]

    def _qkv(self, x_TD: Tensor, again: Again) -> Tensor:
        attn: Any = self._attn
        if "qkv_proj" in attn._modules:
            return attn.qkv_proj(x_TD, again)
        return torch.cat([project(x_TD, again) for project in (attn.q_proj, attn.k_proj, attn.v_proj)], dim=-1)

    def _gate_up(self, x_TD: Tensor, again: Again) -> Tensor:
        mlp: Any = self._mlp
        if "gate_up_proj" in mlp._modules:
            return mlp.gate_up_proj(x_TD, again)
        return torch.cat([mlp.gate_proj(x_TD, again), mlp.up_proj(x_TD, again)], dim=-1)


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def again_in_backward(hidden_states: Tensor, **rest: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(hidden_states, **rest)
        return checkpoint(forward, hidden_states, use_reentrant=False, preserve_rng_state=False, **rest)  # type: ignore[return-value]

    return again_in_backward


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD, weight_D, eps, kernels):  # type: ignore[override]
        y_TD, scale_T = kernels.rms_norm(x_TD, weight_D, eps)
        ctx.save_for_backward(x_TD, weight_D, scale_T)
        ctx.kernels = kernels
        return y_TD

    @staticmethod
    def backward(ctx: Any, dy_TD):  # type: ignore[override]
        x_TD, weight_D, scale_T = ctx.saved_tensors
        dx_TD = ctx.kernels.rms_norm_backward(dy_TD, x_TD, weight_D, scale_T) if ctx.needs_input_grad[0] else None
        dweight_D = (dy_TD.float() * x_TD.float() * scale_T[:, None]).sum(0) if ctx.needs_input_grad[1] else None
        return dx_TD, dweight_D if dweight_D is None else dweight_D.to(weight_D.dtype), None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gu_T2F, kernels):  # type: ignore[override]
        ctx.save_for_backward(gu_T2F)
        ctx.kernels = kernels
        return kernels.gate(gu_T2F)

    @staticmethod
    def backward(ctx: Any, dh_TF):  # type: ignore[override]
        (gu_T2F,) = ctx.saved_tensors
        # In their place: the down projection, whose backward pass needed g and u to make its input again, has run by now.
        dgu_T2F = gu_T2F.detach()
        ctx.kernels.gate_backward_(dh_TF, dgu_T2F)
        return dgu_T2F, None
