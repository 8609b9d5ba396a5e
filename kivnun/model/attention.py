"""Attention over packed rows: each row attends to itself alone, by itself, whatever else is in the pack. Rows that begin alike
may lie there as branches of a tree (`data/prefixes.py`): what they share is there once, and a branch sees what it goes on from.

Our own decoder calls it by itself; for other families it is registered in transformers' attention interface under one name, and the
row lengths travel with the call. Since every row is computed with its own shapes, its result does not depend on its neighbours, to
the bit. Training on CUDA in 16 bits goes through
one call for the whole pack (`varlen.py`); generation, soft-capped scores and float32 go row by row there too.
Shapes: H query heads, G key/value heads, T tokens of the pack, L tokens of one row, C cached and new tokens of one row, K width
of a head. Next: `decoder.py` (who calls this), `foreign.py` (who has it called), `generate.py` (who uses the cache).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kivnun.errors import BaseModelError
from kivnun.model.kernels import Angles, Kernels, NativeKernels, TorchKernels
from kivnun.model.kernels.native import rows_apart
from kivnun.model.kernels.triton import TritonKernels
from kivnun.model.varlen import Bounds, serving

NAME = "kivnun_rows"

# Which kernel for which length is a committed rule, never a choice made while running. The kernels in C take every length: torch's
# were slower at all of them, in both types (`python -m benchmarks.engine.attention_lengths`). Without those, on CPU in bfloat16,
# the backward pass of torch's flash kernel runs at a few per cent of peak below about a thousand tokens; two batched products do
# better there.
MATMUL_MAX_LENGTH_BF16_CPU = 1024

# Arguments that models hand to every attention function and that say nothing about the result when rows are causal.
_INERT = frozenset({"position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "cache_position"})


class KVCache:
    """Keys and values of rows in generation, one pair of buffers per (layer, slot), grown by doubling."""

    def __init__(self) -> None:
        self._keys: dict[tuple[int, int], Tensor] = {}
        self._values: dict[tuple[int, int], Tensor] = {}
        self._filled: dict[tuple[int, int], int] = {}

    def append(self, layer: int, slot: int, k_GLK: Tensor, v_GLK: Tensor) -> tuple[Tensor, Tensor]:
        """Add a row's new keys and values; return all of them so far ([G, C, K] each)."""
        at = (layer, slot)
        start = self._filled.get(at, 0)
        end = start + k_GLK.shape[1]
        if at not in self._keys or end > self._keys[at].shape[1]:
            self._keys[at] = _grown(self._keys.get(at), k_GLK, start, end)
            self._values[at] = _grown(self._values.get(at), v_GLK, start, end)
        self._keys[at][:, start:end] = k_GLK
        self._values[at][:, start:end] = v_GLK
        self._filled[at] = end
        return self._keys[at][:, :end], self._values[at][:, :end]

    def held(self, layer: int, slot: int) -> tuple[Tensor, Tensor]:
        """Return a row's keys and values so far ([G, C, K] each)."""
        at, end = (layer, slot), self._filled[layer, slot]
        return self._keys[at][:, :end], self._values[at][:, :end]

    def drop(self, slot: int) -> None:
        """Forget a row: its slot may be filled again from the start."""
        for store in (self._keys, self._values, self._filled):
            for at in [at for at in store if at[1] == slot]:
                del store[at]


def _grown(old: Tensor | None, like_GLK: Tensor, filled: int, needed: int) -> Tensor:
    capacity = max(64, 1 << (needed - 1).bit_length())
    new = like_GLK.new_empty(like_GLK.shape[0], capacity, like_GLK.shape[2])
    if old is not None:
        new[:, :filled] = old[:, :filled]
    return new


class Prefix(Protocol):
    """Keys and values that no token has (`sites.PrefixSite`)."""

    def keys_and_values(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, [P, G * K] each."""
        ...


@dataclass(slots=True)
class Rows:
    """The rows of one pass. `lengths` sums to T; with a cache, `slots[i]` is row i's place in it (None: not cached).

    With `parents` they are branches: i goes on from `parents[i]`, an earlier one, or begins a row (-1). A cache knows rows alone.
    With `prefix` the tokens from each of `prefix_at` on, as many as it has, are no tokens: it gives their keys and values.
    """

    lengths: list[int]
    cache: KVCache | None = None
    slots: list[int | None] = field(default_factory=list)
    kernels: Kernels = field(default_factory=TorchKernels)
    parents: list[int] | None = None
    prefix: Prefix | None = None
    prefix_at: list[int] = field(default_factory=list)
    _bounds: Bounds | None = None

    @property
    def plain(self) -> bool:
        """Return whether each row is by itself: no cache, no branches."""
        return self.cache is None and self.parents is None

    def bounds_on(self, device: torch.device) -> Bounds:
        """Return where rows begin and end, brought to the device once for all layers."""
        if self._bounds is None:
            self._bounds = Bounds.of(self.lengths, device)
        return self._bounds


def rows_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    rows: Rows | None = None,
    **rest: object,
) -> tuple[Tensor, None]:
    """Return causal attention of each row over itself: query [1, H, T, K], key and value [1, G, T, K] -> [1, T, H, K].

    Raises BaseModelError for anything that would change the mathematics and is not honoured here (dropout, masks, sinks).
    The signature is transformers' attention interface.
    """
    unknown = sorted(name for name, given in rest.items() if given is not None and name not in _INERT)
    if rows is None:
        raise BaseModelError(
            f"{type(module).__name__} is not told where rows end: its model does not hand arguments on to the attention",
            hint="use a model whose forward passes what it does not know to its attention",
        )
    if attention_mask is not None or dropout or unknown or is_causal is False:
        raise BaseModelError(
            f"{type(module).__name__} asks attention for what Kivnun does not offer: "
            f"mask={attention_mask is not None}, dropout={dropout}, is_causal={is_causal}, other arguments={unknown or 'none'}",
            hint="models with causal attention, sliding windows and soft-capped scores are supported; set attention dropout to 0",
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if rows.prefix is not None:
        keys_PO, values_PO = rows.prefix.keys_and_values(layer, key.dtype)
        key, value = _heads_with_prefix(key, keys_PO, rows), _heads_with_prefix(value, values_PO, rows)
    if rows.cache is None and softcap is None and isinstance(rows.kernels, NativeKernels):
        turned = (x[0].transpose(0, 1) for x in (query, key, value))
        out_THK = _RowsAttention.apply(*turned, rows, scale, sliding_window)
        return out_THK[None], None  # type: ignore[index]
    if rows.plain and softcap is None and (whole := serving(query, sliding_window)) is not None:
        q_THK, k_TGK, v_TGK = (x[0].transpose(0, 1) for x in (query, key, value))
        return whole(q_THK, k_TGK, v_TGK, rows.bounds_on(query.device), scale, sliding_window)[None], None
    q_THK, k_TGK, v_TGK = (x[0].transpose(0, 1) for x in (query, key, value))
    return _row_by_row(q_THK, k_TGK, v_TGK, rows, layer, scale, sliding_window, softcap)[None], None


def _row_by_row(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, rows: Rows, layer: int, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Return attention [T, H, K] of each row over itself, and over what the cache holds of it."""
    outs: list[Tensor] = []
    told: list[tuple[Tensor, Tensor]] = []  # each branch's keys and values, those it goes on from first
    # split, not slices: its backward is one concatenation, where a slice's backward writes a full-size tensor of zeros.
    parts = zip(*(x.transpose(0, 1).split(rows.lengths, dim=1) for x in (q_THK, k_TGK, v_TGK)), strict=True)
    for index, (q_HLK, k_GLK, v_GLK) in enumerate(parts):
        slot = rows.slots[index] if rows.cache is not None else None
        if rows.cache is not None and slot is not None:
            k_GCK, v_GCK = rows.cache.append(layer, slot, k_GLK, v_GLK)
        elif rows.parents is not None and (parent := rows.parents[index]) >= 0:
            k_GCK, v_GCK = (torch.cat(pair, dim=1) for pair in zip(told[parent], (k_GLK, v_GLK), strict=True))
        else:
            k_GCK, v_GCK = k_GLK, v_GLK
        told.append((k_GCK, v_GCK))
        outs.append(_one_row(q_HLK, k_GCK, v_GCK, scale, window, softcap))
    return torch.cat(outs, dim=1).transpose(0, 1)


def _one_row(q_HLK: Tensor, k_GCK: Tensor, v_GCK: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """Return attention of the last L of C positions over all positions up to their own: [H, L, K]."""
    length, context = q_HLK.shape[1], k_GCK.shape[1]
    if length == 1 and window is not None and context > window:
        k_GCK, v_GCK, context = k_GCK[:, -window:], v_GCK[:, -window:], window
    windowed = window is not None and context > window
    if softcap is not None:
        return _softcapped(q_HLK, k_GCK, v_GCK, scale, _visible(length, context, window, q_HLK.device), softcap)
    if length == 1:
        return _sdpa(q_HLK, k_GCK, v_GCK, scale, mask=None, causal=False)
    if windowed or length != context:
        return _sdpa(q_HLK, k_GCK, v_GCK, scale, mask=_visible(length, context, window, q_HLK.device), causal=False)
    if q_HLK.dtype == torch.bfloat16 and q_HLK.device.type == "cpu" and length <= MATMUL_MAX_LENGTH_BF16_CPU:
        return MatmulAttention.apply(q_HLK, k_GCK, v_GCK, scale)  # type: ignore[no-any-return]
    return _sdpa(q_HLK, k_GCK, v_GCK, scale, mask=None, causal=True)


def _sdpa(q_HLK: Tensor, k_GCK: Tensor, v_GCK: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
    out = F.scaled_dot_product_attention(
        q_HLK[None],
        k_GCK[None],
        v_GCK[None],
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q_HLK.shape[0] != k_GCK.shape[0],
    )
    return out[0]


def _visible(length: int, context: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys each query sees, bool [L, C]: none after itself, none `window` or more before it."""
    queries = torch.arange(context - length, context, device=device)[:, None]
    keys = torch.arange(context, device=device)[None, :]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def _softcapped(q_HLK: Tensor, k_GCK: Tensor, v_GCK: Tensor, scale: float, visible_LC: Tensor, softcap: float) -> Tensor:
    """Attention with scores squashed to (-softcap, softcap) by tanh (Gemma 2, section 2)."""
    groups = q_HLK.shape[0] // k_GCK.shape[0]
    k_HCK, v_HCK = k_GCK.repeat_interleave(groups, 0), v_GCK.repeat_interleave(groups, 0)
    scores_HLC = torch.tanh(q_HLK @ k_HCK.transpose(1, 2) * (scale / softcap)) * softcap
    scores_HLC = scores_HLC.masked_fill(~visible_LC, -math.inf)
    return torch.softmax(scores_HLC.float(), dim=-1).to(q_HLK.dtype) @ v_HCK


@dataclass(frozen=True, slots=True)
class HeadShape:
    """How a layer's projections fall into heads, and what its attention computes with them."""

    num_queries: int
    num_keys: int
    width: int
    scale: float
    window: int | None
    layer: int

    @property
    def widths(self) -> tuple[int, int, int]:
        """Return the widths of queries, keys and values in a projection."""
        return self.num_queries * self.width, self.num_keys * self.width, self.num_keys * self.width


def fused_attention(qkv_TO: Tensor, shape: HeadShape, rows: Rows, angles: Angles) -> Tensor:
    """Return causal attention [T, H * K] of each row over itself, from projections side by side, [T, (H + 2 G) * K]."""
    scale, window, kernels = shape.scale, shape.window, rows.kernels
    if rows.prefix is not None:
        qkv_TO = _prefixed(qkv_TO, shape, rows, angles)
    if rows.cache is None and isinstance(kernels, NativeKernels):
        return _FusedAttention.apply(qkv_TO, shape, rows, angles)  # type: ignore[no-any-return]
    q_THK, k_TGK, v_TGK = _turned_heads(qkv_TO, shape.widths, shape.width, angles, kernels)
    if rows.plain and (whole := serving(q_THK, window)) is not None:
        return whole(q_THK, k_TGK, v_TGK, rows.bounds_on(qkv_TO.device), scale, window).flatten(1)
    return _row_by_row(q_THK, k_TGK, v_TGK, rows, shape.layer, scale, window, None).flatten(1)


def _prefixed(qkv_TO: Tensor, shape: HeadShape, rows: Rows, angles: Angles) -> Tensor:
    """Return projections with those of a prefix in their places; nobody asks what its queries find."""
    assert rows.prefix is not None
    keys_PO, values_PO = rows.prefix.keys_and_values(shape.layer, qkv_TO.dtype)
    if rows.prefix_at:
        # At its position, 0, the rotation to come multiplies by LongRoPE's factor alone, which a prefix does without.
        factor, turned = angles.cos_TR[rows.prefix_at[0], 0].to(keys_PO.dtype), 2 * angles.cos_TR.shape[1]
        keys_PGK = keys_PO.view(len(keys_PO), -1, shape.width)
        keys_PO = torch.cat([keys_PGK[..., :turned] / factor, keys_PGK[..., turned:]], -1).flatten(1)
    return _with_prefix(
        qkv_TO, torch.cat([keys_PO.new_zeros(len(keys_PO), shape.widths[0]), keys_PO, values_PO], 1), rows.prefix_at
    )


def _heads_with_prefix(x_1GTK: Tensor, new_PO: Tensor, rows: Rows) -> Tensor:
    """Return keys or values [1, G, T, K] with those of a prefix in their places."""
    _, heads, tokens, width = x_1GTK.shape
    x_TO = x_1GTK[0].transpose(0, 1).reshape(tokens, heads * width)
    return _with_prefix(x_TO, new_PO, rows.prefix_at).view(tokens, heads, width).transpose(0, 1)[None]


def _with_prefix(x_TO: Tensor, new_PO: Tensor, places: Sequence[int]) -> Tensor:
    """Return x with the new rows in the place of those from each of these places on."""
    pieces, at = [], 0
    for place in places:
        pieces += [x_TO[at:place], new_PO]
        at = place + len(new_PO)
    return torch.cat([*pieces, x_TO[at:]])


def _turned_heads(
    qkv_TO: Tensor, widths: tuple[int, int, int], head_dim: int, angles: Angles, kernels: Kernels
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries and keys, rotated, and values, [T, heads, K]."""
    if isinstance(kernels, TritonKernels):  # queries and keys lie side by side: one kernel turns both
        qk_TO, v_TO = qkv_TO.split([widths[0] + widths[1], widths[2]], dim=1)
        qk_THK: Tensor = _Turned.apply(qk_TO.view(len(qk_TO), -1, head_dim), angles, kernels)  # type: ignore[assignment]
        heads = [width // head_dim for width in widths[:2]]
        return *qk_THK.split(heads, dim=1), v_TO.view(len(v_TO), -1, head_dim)  # type: ignore[return-value]
    q_THK, k_TGK, v_TGK = _heads(qkv_TO, widths, head_dim)
    return angles.turned(q_THK), angles.turned(k_TGK), v_TGK


class _Turned(torch.autograd.Function):
    """Rotation by the angles; its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x_THK, angles, kernels):  # type: ignore[override]
        ctx.given = (angles, kernels)
        return kernels.turned(x_THK, angles, 1)

    @staticmethod
    def backward(ctx: Any, dout_THK):  # type: ignore[override]
        angles, kernels = ctx.given
        return kernels.turned(dout_THK, angles, -1), None, None


def _heads(x_TO: Tensor, widths: tuple[int, int, int], head_dim: int) -> tuple[Tensor, ...]:
    """Return views [T, heads, K] of queries, keys and values."""
    return tuple(part.view(len(x_TO), -1, head_dim) for part in x_TO.split(widths, dim=1))


class _FusedAttention(torch.autograd.Function):
    """Rotation and attention in one kernel that reads the projections where they are and writes their gradient in one tensor."""

    @staticmethod
    def forward(ctx: Any, qkv_TO, shape: HeadShape, rows: Rows, angles):  # type: ignore[override]
        q, k, v = _heads(qkv_TO, shape.widths, shape.width)
        out_THK, lse_HT = rows.kernels.attention(q, k, v, rows.lengths, shape.scale, shape.window, angles, rows.parents)
        ctx.save_for_backward(qkv_TO, out_THK, lse_HT)
        ctx.given = (shape, rows, angles)
        return out_THK.flatten(1)

    @staticmethod
    def backward(ctx: Any, dout_TO):  # type: ignore[override]
        qkv_TO, out_THK, lse_HT = ctx.saved_tensors
        shape, rows, angles = ctx.given
        dqkv_TO = rows_apart(qkv_TO, len(qkv_TO), qkv_TO.shape[1], qkv_TO.dtype)
        q, k, v = _heads(qkv_TO, shape.widths, shape.width)
        into = _heads(dqkv_TO, shape.widths, shape.width)
        given = (dout_TO.reshape(out_THK.shape), q, k, v, out_THK, lse_HT, rows.lengths, shape.scale, shape.window, angles, into)
        rows.kernels.attention_backward(*given, rows.parents)
        return dqkv_TO, None, None, None


class _RowsAttention(torch.autograd.Function):
    """The same for queries, keys and values [T, heads, K] that a model has rotated itself."""

    @staticmethod
    def forward(ctx: Any, q_THK, k_TGK, v_TGK, rows: Rows, scale, window):  # type: ignore[override]
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q_THK, k_TGK, v_TGK))
        out_THK, lse_HT = rows.kernels.attention(q, k, v, rows.lengths, scale, window, None, rows.parents)
        ctx.save_for_backward(q, k, v, out_THK, lse_HT)
        ctx.given = (rows, scale, window)
        return out_THK

    @staticmethod
    def backward(ctx: Any, dout_THK):  # type: ignore[override]
        q, k, v, out_THK, lse_HT = ctx.saved_tensors
        rows, scale, window = ctx.given
        into = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        given = (dout_THK, q, k, v, out_THK, lse_HT, rows.lengths, scale, window, None, into)
        rows.kernels.attention_backward(*given, rows.parents)
        return *into, None, None, None


class MatmulAttention(torch.autograd.Function):
    """Causal attention as two batched products with a float32 softmax between them; keeps the probabilities for backward.

    Query heads of one group are stacked along L, so that grouped-query attention needs no repeated keys.
    """

    @staticmethod
    def forward(ctx, q_HLK: Tensor, k_GLK: Tensor, v_GLK: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        heads, length, width = q_HLK.shape
        groups = k_GLK.shape[0]
        q_GMK = q_HLK.reshape(groups, heads // groups * length, width)
        scores = torch.bmm(q_GMK, k_GLK.transpose(1, 2)).float().mul_(scale)
        future = torch.ones(length, length, dtype=torch.bool, device=q_HLK.device).triu_(1)
        scores.view(groups, -1, length, length).masked_fill_(future, -math.inf)
        p_GML = torch.softmax(scores, dim=-1).to(q_HLK.dtype)
        out_GMK = torch.bmm(p_GML, v_GLK)
        ctx.save_for_backward(q_GMK, k_GLK, v_GLK, p_GML, out_GMK)
        ctx.scale = scale
        return out_GMK.view(heads, length, width)

    @staticmethod
    def backward(ctx, dout_HLK: Tensor):  # type: ignore[override]
        q_GMK, k_GLK, v_GLK, p_GML, out_GMK = ctx.saved_tensors
        dout_GMK = dout_HLK.reshape(q_GMK.shape)
        dv_GLK = torch.bmm(p_GML.transpose(1, 2), dout_GMK)
        dp_GML = torch.bmm(dout_GMK, v_GLK.transpose(1, 2)).float()
        # Softmax backward: p * (dp - sum(p * dp)), and sum(p * dp) equals dout . out, which is L times cheaper.
        row_dot = (dout_GMK.float() * out_GMK.float()).sum(-1, keepdim=True)
        ds_GML = dp_GML.sub_(row_dot).mul_(p_GML).mul_(ctx.scale).to(q_GMK.dtype)
        dq_GMK = torch.bmm(ds_GML, k_GLK)
        dk_GLK = torch.bmm(ds_GML.transpose(1, 2), q_GMK)
        return dq_GMK.view(dout_HLK.shape), dk_GLK, dv_GLK, None


def register() -> None:
    """Make transformers know this attention by its name. Registering twice is harmless.

    Imports transformers' modelling code, which takes 100 MB and a second, so it is asked for where that code runs anyway.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, rows_attention)
    # Rows travel with the call, so no mask is ever built.
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)


def _no_mask(*_args: object, **_kwargs: object) -> None:
    return None
