"""The kernels in torch: what each computes, on any device and in any floating type. `native.py` and `triton.py` are held to it.

Everything is computed in float32 (float64 for float64 tensors) and rounded once at the end. Shapes: T tokens, D model width,
F inner width of the MLP, C positions of a chunk, V vocabulary, H query heads, G key/value heads, L tokens of a row, K head width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kivnun.model.dropout import Mask, dropped


@dataclass(frozen=True, slots=True)
class Angles:
    """Cosines and sines of each token's rotation, float32 [T, R]: the first R dimensions of a head turn with the next R."""

    cos_TR: Tensor
    sin_TR: Tensor

    def turned(self, x_THK: Tensor, direction: int = 1) -> Tensor:
        """Return x rotated (Su et al. 2021, RoFormer, equation 34, in rotate-half order), or with -1 rotated back."""
        half = self.cos_TR.shape[1]
        cos, sin = self.cos_TR[:, None].to(x_THK.dtype), self.sin_TR[:, None].to(x_THK.dtype) * direction
        low, high, rest = x_THK[..., :half], x_THK[..., half : 2 * half], x_THK[..., 2 * half :]
        return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], dim=-1)


def leaves_over(x: Tensor) -> bool:
    """Return whether a sum of such numbers is kept in two parts: a bfloat16 number alone has too few digits to add layers in."""
    return x.dtype in (torch.bfloat16, torch.float16)


def split_sum(h_TD: Tensor, rest_TD: Tensor | None, delta_TD: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return h + rest + delta rounded, and what the rounding left over (None where the type keeps enough by itself).

    Differentiable in h and delta; the rests have no gradient of their own.
    """
    exact = (_wide(h_TD) if rest_TD is None else _wide(h_TD) + _wide(rest_TD)) + _wide(delta_TD)
    sum_TD = exact.to(h_TD.dtype)
    return sum_TD, (exact.detach() - _wide(sum_TD.detach())).to(h_TD.dtype) if leaves_over(h_TD) else None


class TorchKernels:
    """The reference."""

    name = "torch"

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return w * x / rms(x) (Zhang and Sennrich 2019, equation 4) and 1 / rms(x) [T]."""
        x = _wide(x_TD)
        scale_T = torch.rsqrt(x.square().mean(-1) + eps)
        return (x * scale_T[:, None] * _wide(weight_D)).to(x_TD.dtype), scale_T

    def add_rms_norm(
        self, h_TD: Tensor, rest_TD: Tensor | None, delta_TD: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Return what `split_sum` makes of h, rest and delta, and what `rms_norm` makes of the rounded sum."""
        sum_TD, over_TD = split_sum(h_TD, rest_TD, delta_TD)
        return sum_TD, over_TD, *self.rms_norm(sum_TD, weight_D, eps)

    def rms_norm_backward(
        self, dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, scale_T: Tensor, add_TD: Tensor | None = None
    ) -> Tensor:
        """With n = x / rms(x) and g = dy * w, return (g - n * mean(g * n)) / rms(x), plus `add`: what x's other use gives."""
        n = _wide(x_TD) * scale_T[:, None]
        g = _wide(dy_TD) * _wide(weight_D)
        dx = (g - n * (g * n).mean(-1, keepdim=True)) * scale_T[:, None]
        return (dx if add_TD is None else dx + _wide(add_TD)).to(x_TD.dtype)

    def gate(self, gu_T2F: Tensor) -> Tensor:
        """Return silu(g) * u, g and u the halves of each row (Shazeer 2020, "GLU Variants", SwiGLU)."""
        g, u = _wide(gu_T2F).chunk(2, dim=-1)
        return (_silu(g) * u).to(gu_T2F.dtype)

    def gate_backward_(self, dh_TF: Tensor, gu_T2F: Tensor) -> None:
        """Put the gradients of g and u in their place: dh * u * s * (1 + g * (1 - s)) and dh * g * s with s = sigmoid(g)."""
        g, u = _wide(gu_T2F).chunk(2, dim=-1)
        dh, s = _wide(dh_TF), 1 / (1 + torch.exp(-g))
        gu_T2F.copy_(torch.cat([dh * u * s * (1 + g * (1 - s)), dh * g * s], dim=-1))

    def nll_(self, logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return each position's NLL (nats, float32) and the gradient of weight * NLL in `dtype`; the logits are lost.

        There may be more rows of logits than targets; the rest becomes zero. p - 1 of the true class is taken as minus the sum of
        the others: for a confident token, 1 - p would keep few digits in float32 and none in bfloat16.
        """
        count = len(targets_C)
        scores = _wide(logits_CV[:count])
        highest_C1 = scores.max(dim=1, keepdim=True).values
        e_CV = torch.exp(scores - highest_C1)
        true_C1 = targets_C[:, None]
        own_C1 = e_CV.gather(1, true_C1)
        others_C1 = e_CV.scatter(1, true_C1, 0.0).sum(1, keepdim=True)
        ahead_C1 = highest_C1 - scores.gather(1, true_C1)
        nll_C = torch.where(ahead_C1 == 0, torch.log1p(others_C1), torch.log(own_C1 + others_C1) + ahead_C1)[:, 0]
        factor_C1 = weights_C[:, None].to(e_CV.dtype) / (own_C1 + others_C1)
        gradient_CV = logits_CV if logits_CV.dtype == dtype else logits_CV.to(dtype)
        gradient_CV[:count] = (e_CV * factor_C1).scatter(1, true_C1, -others_C1 * factor_C1).to(dtype)
        gradient_CV[count:] = 0.0
        return nll_C.float(), gradient_CV

    def log_prob(self, logits_CV: Tensor, targets_C: Tensor) -> Tensor:
        """Return the log-probability (nats, float32) of each target; rows of logits beyond the targets are ignored."""
        scores = _wide(logits_CV[: len(targets_C)])
        return (scores.gather(1, targets_C[:, None])[:, 0] - torch.logsumexp(scores, dim=1)).float()

    def dropped(self, x_TD: Tensor, mask: Mask, onto_TD: Tensor | None = None) -> Tensor:
        """Return x with the elements that the mask names zeroed, the others scaled up: see `dropout.py`. With `onto` the result
        is added to that, in place."""
        if onto_TD is None:
            return dropped(x_TD, mask)
        return onto_TD.copy_(_wide(onto_TD) + dropped(_wide(x_TD), mask))

    def scale_columns(self, x_TO: Tensor, factor_O: Tensor) -> Tensor:
        """Return x * factor, multiplied in float32."""
        return (_wide(x_TO) * factor_O).to(x_TO.dtype)

    def column_dots(self, x_TO: Tensor, y_TO: Tensor) -> Tensor:
        """Return the sum over tokens of x * y, float32 [O]."""
        return (_wide(x_TO) * _wide(y_TO)).sum(0).float()

    def attention(
        self,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        lengths: Sequence[int],
        scale: float,
        window: int | None,
        angles: Angles | None,
        parents: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return softmax(scale * q k^T) v of each row over itself, causal, within `window` keys, q and k rotated by `angles`:
        [T, H, K], and the log of each score row's sum of exponentials, float32 [H, T].

        With `parents`, `lengths` are those of branches: i goes on from `parents[i]`, an earlier one, or begins a row (-1).
        """
        outs, sums = [], []
        q_THK, k_TGK, dtype = *_turned(q_THK, k_TGK, angles), q_THK.dtype
        for here, seen in branches(lengths, parents):
            q, k, v = (_wide(x).transpose(0, 1) for x in (q_THK[here], k_TGK[seen], v_TGK[seen]))
            scores_HLC = _scores(q, k, scale, window)
            sums.append(torch.logsumexp(scores_HLC, dim=-1).float())
            outs.append((torch.softmax(scores_HLC, dim=-1) @ _per_query_head(v, q)).transpose(0, 1).to(dtype))
        return torch.cat(outs), torch.cat(sums, dim=1)

    def attention_backward(
        self,
        dout_THK: Tensor,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        out_THK: Tensor,
        lse_HT: Tensor,
        lengths: Sequence[int],
        scale: float,
        window: int | None,
        angles: Angles | None,
        into: tuple[Tensor, Tensor, Tensor],
        parents: Sequence[int] | None = None,
    ) -> None:
        """Write the gradients of q, k and v into three given tensors of their shapes.

        With p the probabilities, again from the scores: dv = p^T dout, ds = p * (dout v^T - dout . out) * scale,
        dq = ds k, dk = ds^T q (Dao et al. 2022, FlashAttention, algorithm 4).
        """
        q_THK, k_TGK = _turned(q_THK, k_TGK, angles)
        dq_THK, dk_TGK, dv_TGK = (torch.zeros_like(_wide(x)) for x in (q_THK, k_TGK, v_TGK))
        for here, seen in branches(lengths, parents):
            q, k, v = (_wide(x).transpose(0, 1) for x in (q_THK[here], k_TGK[seen], v_TGK[seen]))
            dout, out = (_wide(x[here]).transpose(0, 1) for x in (dout_THK, out_THK))
            p_HLC = torch.exp(_scores(q, k, scale, window) - lse_HT[:, here, None])
            dp_HLC = dout @ _per_query_head(v, q).transpose(1, 2) - (dout * out).sum(-1, keepdim=True)
            ds_HLC = p_HLC * dp_HLC * scale
            dq_THK[here] = (ds_HLC @ _per_query_head(k, q)).transpose(0, 1)
            dk, dv = (_sum_of_group(x, k) for x in (ds_HLC.transpose(1, 2) @ q, p_HLC.transpose(1, 2) @ dout))
            dk_TGK[seen] += dk.transpose(0, 1)
            dv_TGK[seen] += dv.transpose(0, 1)
        for gradient, of in zip(into, (*_turned(dq_THK, dk_TGK, angles, -1), dv_TGK), strict=True):
            gradient.copy_(of)

    def nf4_encode(self, values_N: Tensor, block: int, codes: Tensor, scales: Tensor) -> None:
        """Write each value's nearest of `NF4` times its block's scale, two codes a byte and the first in the high half, and the
        scales, float32: the largest magnitude of each block.

        As bitsandbytes 0.50 has it, to the bit: what is left of a last block is divided by its scale, whole blocks are multiplied
        by the inverse, and half way between two codes means the lower one.
        """
        values_N = values_N.float()
        whole = len(values_N) // block * block
        blocks_MB, rest = values_N[:whole].view(-1, block), values_N[whole:]
        highest = blocks_MB.abs().amax(1)
        shares = (blocks_MB * (1 / highest.clamp(min=SMALLEST))[:, None]).flatten()
        if len(rest):
            last = rest.abs().max().clamp(min=SMALLEST)
            highest, shares = torch.cat([highest, last[None]]), torch.cat([shares, rest / last])
        nf4 = torch.tensor(NF4, device=values_N.device)
        found = torch.bucketize(shares.clamp_(-1, 1), (nf4[:-1] + nf4[1:]) / 2, out_int32=True).to(torch.uint8)
        found = torch.cat([found, found.new_tensor([NF4.index(0.0)])]) if len(found) % 2 else found
        scales.copy_(highest)
        codes.copy_((found[::2] << 4) | found[1::2])

    def nf4_decode(self, codes: Tensor, scales: Tensor, block: int, out: Tensor) -> None:
        """Write the values of codes as `nf4_encode` packs them: entry of `NF4` times the block's scale, rounded once."""
        flat_N = out.view(-1)
        nf4, byte = torch.tensor(NF4, device=out.device), torch.arange(256, device=out.device)
        pairs = torch.stack([nf4[byte >> 4], nf4[byte & 15]], dim=1)
        for start in range(0, len(flat_N), PIECE):
            part_P = flat_N[start : start + PIECE]
            values_P = pairs[codes[start // 2 : (start + len(part_P) + 1) // 2].int()].view(-1)[: len(part_P)]
            scales_P = scales[start // block :][: -(-len(part_P) // block)].repeat_interleave(block)[: len(part_P)]
            part_P.copy_(values_P * scales_P)

    def nf4_decode_nested(
        self, codes: Tensor, scale_codes: Tensor, map_256: Tensor, group_scales: Tensor, offset: Tensor, block: int, out: Tensor
    ) -> None:
        """Write the values of codes whose scales are kept in 8 bits: map[code] times the scale of GROUP blocks, plus an offset
        (Dettmers et al. 2023, QLoRA, section 3, double quantisation)."""
        scales = map_256[scale_codes.int()] * group_scales.repeat_interleave(GROUP)[: len(scale_codes)] + offset
        self.nf4_decode(codes, scales, block, out)

    def int8_decode(self, codes_OI: Tensor, absmax_O: Tensor, out: Tensor) -> None:
        """Write code * absmax / 127 of each row (Dettmers et al. 2022, LLM.int8(), section 2.1)."""
        out.copy_(codes_OI * absmax_O[:, None] * BY_127)


# The 16 values of NF4 (Dettmers et al. 2023, QLoRA, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
GROUP = 256  # blocks whose scales share a scale of their own
BY_127 = 7.874015718698502e-3  # 1 / 127, as bitsandbytes writes it
SMALLEST = 1e-38  # of what a block is divided by
PIECE = 1 << 20  # elements decoded at once: a multiple of every block, small beside the matrix


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _silu(g: Tensor) -> Tensor:
    return g / (1 + torch.exp(-g))  # of torch's own sigmoid the last elements of a tensor have other last bits


def branches(lengths: Sequence[int], parents: Sequence[int] | None) -> Iterator[tuple[slice, slice | list[int]]]:
    """Yield where each branch's tokens are in the pack, and where those it sees are: its ancestors' and its own."""
    ends = list(itertools.accumulate(lengths))
    for number, (end, length) in enumerate(zip(ends, lengths, strict=True)):
        here, parent = slice(end - length, end), -1 if parents is None else parents[number]
        if parents is None or parent < 0:
            yield here, here
            continue
        seen = list(range(here.start, here.stop))
        while parent >= 0:
            seen[:0] = range(ends[parent] - lengths[parent], ends[parent])
            parent = parents[parent]
        yield here, seen


def _turned(q_THK: Tensor, k_TGK: Tensor, angles: Angles | None, direction: int = 1) -> tuple[Tensor, Tensor]:
    """Return queries and keys, or their gradients, wide and rotated."""
    q_THK, k_TGK = _wide(q_THK), _wide(k_TGK)
    return (q_THK, k_TGK) if angles is None else (angles.turned(q_THK, direction), angles.turned(k_TGK, direction))


def _scores(q_HLK: Tensor, k_GCK: Tensor, scale: float, window: int | None) -> Tensor:
    """Return the scores [H, L, C] of the last L of C tokens, those that are not seen at minus infinity."""
    context = k_GCK.shape[1]
    keys, queries = (torch.arange(first, context, device=q_HLK.device) for first in (0, context - q_HLK.shape[1]))
    hidden_LC = keys[None, :] > queries[:, None]
    if window is not None:
        hidden_LC |= keys[None, :] <= queries[:, None] - window
    scores_HLC = q_HLK @ _per_query_head(k_GCK, q_HLK).transpose(1, 2) * scale
    return scores_HLC.masked_fill(hidden_LC, -math.inf)


def _per_query_head(x_GLK: Tensor, q_HLK: Tensor) -> Tensor:
    return x_GLK.repeat_interleave(q_HLK.shape[0] // x_GLK.shape[0], dim=0)


def _sum_of_group(x_HLK: Tensor, like_GLK: Tensor) -> Tensor:
    return x_HLK.unflatten(0, (like_GLK.shape[0], -1)).sum(1)
