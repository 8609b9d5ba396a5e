"""The operations of a decoder layer that bring their own gradient: norm, and the gated product of the MLP.

Each is one kernel forward and one backward. Shapes: T tokens, D model width, F inner width.
Next: `kernels/reference.py` (what each computes), `decoder.py` (who puts them together).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kivnun.model.kernels import Kernels


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, kernels: Kernels) -> Tensor:
    """Return w * x / rms(x), differentiable in x and w."""
    return _RmsNorm.apply(x_TD, weight_D, eps, kernels)  # type: ignore[no-any-return]


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
