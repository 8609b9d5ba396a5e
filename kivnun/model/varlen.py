"""Attention over all rows of a pack in one call: torch's own variable-length attention, where it is there and right.

It is a young interface whose arguments differ between versions (2.10 knew no scale, 2.12 brought grouped heads), so the installed
one is asked once per device: forward and gradient of a small pack, against each row by itself. Where it does not serve, rows are
computed one by one. Shapes as in `attention.py`, which is next.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 2e-2  # relative, of bfloat16: a wrong mask or head differs by more than a tenth
WIDEST_HEAD = 256


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where rows begin and end, int32 [rows + 1] on the device, and the longest one: made once for all layers of a pass."""

    starts: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Bounds:
        starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return cls(starts.to(device, non_blocking=True), max(lengths))


@dataclass(frozen=True, slots=True)
class VariableLength:
    """Torch's call, and what it can do: fewer key heads than query heads, and windows."""

    call: Callable[..., Any]
    groups: dict[str, bool] | None  # what to add for grouped heads; None: keys must be repeated
    windows: bool

    def __call__(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, bounds: Bounds, scale: float, window: int | None) -> Tensor:
        """Return causal attention [T, H, K] of each row over itself; differentiable."""
        heads, groups = q_THK.shape[1], k_TGK.shape[1]
        if heads != groups and self.groups is None:
            k_TGK, v_TGK = (x.repeat_interleave(heads // groups, dim=1) for x in (k_TGK, v_TGK))
        more = self.groups if heads != groups and self.groups is not None else {}
        # A window counts the query's own position; torch counts the positions before it.
        before = -1 if window is None or window >= bounds.longest else window - 1
        rows = (bounds.starts, bounds.starts, bounds.longest, bounds.longest)
        return self.call(q_THK, k_TGK, v_TGK, *rows, scale=scale, window_size=(before, 0), **more)


def serving(q_THK: Tensor, window: int | None) -> VariableLength | None:
    """Return the call that serves these queries, or None: it is for CUDA, 16 bits, and heads of a width it knows."""
    if q_THK.device.type != "cuda" or q_THK.dtype not in (torch.bfloat16, torch.float16):
        return None
    if q_THK.shape[-1] % 8 or q_THK.shape[-1] > WIDEST_HEAD:
        return None
    found = varlen_or_reason(q_THK.device)
    return None if isinstance(found, str) or (window is not None and not found.windows) else found


@functools.cache
def varlen_or_reason(device: torch.device) -> VariableLength | str:
    """Return torch's variable-length attention after questions to it, or why it does not serve on this device."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no variable-length attention"
    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():
        return f"the variable-length attention of torch {torch.__version__} takes no scale or no window"
    more = {"enable_gqa": True} if "enable_gqa" in known else {}
    plain = VariableLength(varlen_attn, None, False)
    wrong = _wrong(plain, device, groups=4, window=None)
    if wrong:
        return f"torch's variable-length attention does not serve: {wrong}"
    grouped = VariableLength(varlen_attn, more, False)
    best = plain if _wrong(grouped, device, groups=2, window=None) else grouped
    return VariableLength(varlen_attn, best.groups, not _wrong(best, device, groups=2, window=7))


def _wrong(attend: VariableLength, device: torch.device, groups: int, window: int | None) -> str:
    """Return what is wrong with a small pack's output or gradients ("": nothing)."""
    lengths, width = [5, 1, 40], 32
    draws = torch.Generator().manual_seed(0)
    shapes = ((sum(lengths), heads, width) for heads in (4, groups, groups, 4))
    q, k, v, dout = (torch.randn(shape, generator=draws).to(torch.bfloat16).float() for shape in shapes)
    expected = _by_row(q, k, v, dout, lengths, window)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            given = tuple(x.to(device, torch.bfloat16).requires_grad_() for x in (q, k, v))
            out = attend(given[0], given[1], given[2], Bounds.of(lengths, device), 0.3, window)
            found = [out.detach(), *torch.autograd.grad(out, given, dout.to(device, torch.bfloat16))]
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    distances = [float((a.cpu().float() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    return "" if all(distance < TOLERANCE for distance in distances) else f"relative differences of {distances}"


def _by_row(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lengths: list[int], window: int | None) -> list[Tensor]:
    """Return the output and the gradients of q, k and v, in float32 on the CPU, by the definition."""
    with torch.inference_mode(False), torch.enable_grad():
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        outs = []
        for qs, ks, vs in zip(*(x.split(lengths) for x in given), strict=True):
            ks, vs = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (ks, vs))
            at = torch.arange(len(qs))
            hidden = (at[None] > at[:, None]) | (at[None] <= at[:, None] - (window or len(qs)))
            scores = torch.einsum("thk,shk->hts", qs, ks) * 0.3
            outs.append(torch.einsum("hts,shk->thk", torch.softmax(scores.masked_fill(hidden, -torch.inf), -1), vs))
        out = torch.cat(outs)
        return [out.detach(), *torch.autograd.grad(out, given, dout)]
