"""The operations of a decoder layer that bring their own gradient: norm, the residual stream's sum with its norm, and the gated
product of the MLP.

Each is one kernel forward and one backward. Shapes: T tokens, D model width, F inner width.
Next: `kernels/reference.py` (what each computes), `decoder.py` (who puts them together).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kivnun.model.kernels import Kernels
from kivnun.model.kernels.reference import split_sum


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, kernels: Kernels) -> Tensor:
    """Return w * x / rms(x), differentiable in x and w."""
    return _RmsNorm.apply(x_TD, weight_D, eps, kernels)  # type: ignore[no-any-return]


class Stream(NamedTuple):
    """The residual stream of T tokens: h + rest + delta.

    In bfloat16 `rest` is what rounding h left over: with it the layers' shares add up nearly as in float32, and losses come
    clearly nearer to float32's (docs/LOG.md). Only the next sum reads it: norms read h alone, so that what they made can be made
    again out of what is kept, and the backward pass needs no rest. `delta` is the last layer's share, still to be added.
    """

    h_TD: Tensor
    rest_TD: Tensor | None = None
    delta_TD: Tensor | None = None

    def at(self, select_S: Tensor) -> Stream:
        """Return the stream of the selected tokens."""
        return Stream(*(None if part is None else part.index_select(0, select_S) for part in self))  # type: ignore[arg-type]

    def summed(self) -> Stream:
        """Return the same stream with nothing left to add."""
        return self if self.delta_TD is None else Stream(*split_sum(self.h_TD, self.rest_TD, self.delta_TD))


def normed_sum(stream: Stream, weight_D: Tensor, eps: float, kernels: Kernels) -> tuple[Stream, Tensor]:
    """Return the stream with its delta added, which goes on from here, and its norm.

    The gradients of both come together in one kernel: autograd's sum of them would be another pass over memory.
    """
    h_TD, rest_TD, y_TD = _NormedSum.apply(*stream, weight_D, eps, kernels)  # type: ignore[misc]
    return Stream(h_TD, rest_TD), y_TD


def gated(gu_T2F: Tensor, kernels: Kernels) -> Tensor:
    """Return silu(g) * u, g and u the halves of each row; the backward pass puts their gradient in their own place."""
    return _Gate.apply(gu_T2F, kernels)  # type: ignore[no-any-return]


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
        return dx_TD, _weight_gradient(dy_TD, x_TD, weight_D, scale_T) if ctx.needs_input_grad[1] else None, None, None


class _NormedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_TD, rest_TD, delta_TD, weight_D, eps, kernels):  # type: ignore[override]
        if delta_TD is None:
            sum_TD, over_TD, (y_TD, scale_T) = h_TD, rest_TD, kernels.rms_norm(h_TD, weight_D, eps)
        else:
            sum_TD, over_TD, y_TD, scale_T = kernels.add_rms_norm(h_TD, rest_TD, delta_TD, weight_D, eps)
        ctx.save_for_backward(sum_TD, weight_D, scale_T)
        if over_TD is not None:
            ctx.mark_non_differentiable(over_TD)
        ctx.set_materialize_grads(False)
        ctx.kernels = kernels
        return sum_TD, over_TD, y_TD

    @staticmethod
    def backward(ctx: Any, dsum_TD, _dover_TD, dy_TD):  # type: ignore[override]
        sum_TD, weight_D, scale_T = ctx.saved_tensors
        of_h, _, of_delta, of_weight = ctx.needs_input_grad[:4]
        dh_TD, dweight_D = dsum_TD, None
        if dy_TD is not None and (of_h or of_delta):
            dh_TD = ctx.kernels.rms_norm_backward(dy_TD, sum_TD, weight_D, scale_T, dsum_TD)
        if dy_TD is not None and of_weight:
            dweight_D = _weight_gradient(dy_TD, sum_TD, weight_D, scale_T)
        return dh_TD if of_h else None, None, dh_TD if of_delta else None, dweight_D, None, None


def _weight_gradient(dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, scale_T: Tensor) -> Tensor:
    return (dy_TD.float() * x_TD.float() * scale_T[:, None]).sum(0).to(weight_D.dtype)


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
