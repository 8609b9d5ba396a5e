"""The loss, without ever holding the logits of a batch.

Only supervised positions reach the head, in chunks; each chunk's gradient is taken at once and its logits are dropped. The
interface is a weight per token, on which supervised training, pretraining and DPO ride alike.
Shapes: S supervised positions, C positions of a chunk, D model width, V vocabulary. Next: `train/engine.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kivnun.model.kernels import Kernels
from kivnun.model.linear import TunableLinear
from kivnun.model.products import scaled_times, whole, wide_times_transposed


class Head(Protocol):
    """The language head: hidden [C, D] -> logits [C, V], soft-capping included; in the hidden states' type or in float32."""

    kernels: Kernels

    @property
    def parameters(self) -> Sequence[Tensor]:
        """Return the trained tensors it uses."""
        ...

    def __call__(self, h_CD: Tensor) -> Tensor: ...

    def backward(self, h_CD: Tensor, logits: Tensor, dlogits_CV: Tensor, factor: float) -> tuple[Tensor, Sequence[Tensor]]:
        """Return `factor` times the gradients of h and of the head's trained tensors, for logits just computed of h."""
        ...


CHUNK = {"cpu": 256, "cuda": 512}  # supervised positions whose logits exist at once, by the kind of device


class FrozenHead:
    """A head that is one matrix and is not trained: two products a chunk, and no graph."""

    def __init__(self, linear: TunableLinear) -> None:
        self._weight_VD, self._bias_V, self.kernels, self.parameters = linear.operand(), linear.bias, linear.kernels, ()

    @torch.no_grad()
    def __call__(self, h_CD: Tensor) -> Tensor:
        logits_CV = wide_times_transposed(h_CD, self._weight_VD, self.kernels)
        return logits_CV if self._bias_V is None else logits_CV.add_(self._bias_V)

    def backward(self, h_CD: Tensor, logits: Tensor, dlogits_CV: Tensor, factor: float) -> tuple[Tensor, Sequence[Tensor]]:
        return scaled_times(factor, dlogits_CV, self._weight_VD, self.kernels), ()


class GraphHead:
    """Any head: trained, carrying an adapter, soft-capped. Its gradients are autograd's, chunk by chunk."""

    def __init__(self, compute: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], kernels: Kernels) -> None:
        self._compute, self.parameters, self.kernels = compute, parameters, kernels

    def __call__(self, h_CD: Tensor) -> Tensor:
        return self._compute(h_CD)

    def backward(self, h_CD: Tensor, logits: Tensor, dlogits_CV: Tensor, factor: float) -> tuple[Tensor, Sequence[Tensor]]:
        dh_CD, *grads = torch.autograd.grad(logits, [h_CD, *self.parameters], dlogits_CV)
        return dh_CD.mul_(factor), [grad.float().mul_(factor) for grad in grads]


def weighted_nll(
    head: Head, h_SD: Tensor, targets_S: Tensor, weights_S: Tensor, likeliest_S: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the sum of weights * NLL (nats, float32 scalar, differentiable) and each position's NLL [S] (float32, detached).

    The head's trained tensors (its weight, or an adapter's) get their exact gradient too. The caller's weights already hold the
    division by the step's total, so nothing is averaged here. They may come on the CPU: their largest is asked for. Into
    `likeliest_S` (bool [S]), where it is given, goes whether no token is likelier than the target.
    """
    largest = float(weights_S.abs().max()) if weights_S.any() else 1.0
    weights_S = weights_S.to(h_SD.device)
    loss, nll_S = _ChunkedNll.apply(head, h_SD, targets_S, weights_S, largest, likeliest_S, *head.parameters)
    return loss, nll_S


class _ChunkedNll(torch.autograd.Function):
    """For each chunk: logits, the loss's gradient in their place (softmax minus one at the target, times the weight), and that
    gradient's product with the head: when forward ends, the gradient of the hidden states is known and no logits are left.

    The logits' gradient is taken for weights of at most 1, and the rest of them multiplies the sums of its product: were 1/n, the
    weight of each of n tokens, rounded to bfloat16 with it, all gradients of the step would be off by one factor, at worst
    1 + 2^-8.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        head: Head,
        h_SD: Tensor,
        targets_S: Tensor,
        weights_S: Tensor,
        largest: float,
        likeliest_S: Tensor | None,
        *parameters: Tensor,
    ):
        dh_SD = torch.empty_like(h_SD)
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        nll_S = torch.empty(len(h_SD), dtype=torch.float32, device=h_SD.device)
        shares_S = weights_S / largest
        for at in _chunks(h_SD):
            with torch.enable_grad():
                h_CD = padded(h_SD[at], head.kernels).detach().requires_grad_()
                logits_CV = head(h_CD)
            # A graph may keep its logits (soft-capping, DoRA): there the gradient gets memory of its own.
            room_CV = logits_CV if isinstance(head, FrozenHead) else _wide_copy(logits_CV)
            if likeliest_S is not None:  # before the gradient takes the logits' place
                likeliest_S[at] = _likeliest(room_CV, targets_S[at])
            nll_S[at], dlogits_CV = head.kernels.nll_(room_CV, targets_S[at], shares_S[at], h_SD.dtype)
            dh_CD, grads = head.backward(h_CD, logits_CV, dlogits_CV, largest)
            dh_SD[at] = dh_CD[: len(targets_S[at])]
            for total, grad in zip(sums, grads, strict=True):
                total += grad
        ctx.save_for_backward(dh_SD, *[s.to(p.dtype) for s, p in zip(sums, parameters, strict=True)])
        ctx.mark_non_differentiable(nll_S)
        return (nll_S * weights_S).sum(dtype=torch.float64).float(), nll_S

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _dnll: Tensor):  # type: ignore[override]
        dh_SD, *dparameters = ctx.saved_tensors
        return None, dh_SD * dloss.to(dh_SD.dtype), None, None, None, None, *[d * dloss.to(d.dtype) for d in dparameters]


@torch.no_grad()
def token_log_probs(head: Head, h_SD: Tensor, targets_S: Tensor) -> Tensor:
    """Return the log-probability (nats, float32 [S]) of each target token; no gradient."""
    out_S = torch.empty(len(h_SD), dtype=torch.float32, device=h_SD.device)
    for at in _chunks(h_SD):
        out_S[at] = head.kernels.log_prob(head(padded(h_SD[at], head.kernels)), targets_S[at])
    return out_S


@torch.no_grad()
def are_likeliest(head: Head, h_SD: Tensor, targets_S: Tensor) -> Tensor:
    """Return whether each target is the likeliest token, the lowest id among equals (bool [S])."""
    out_S = torch.empty(len(h_SD), dtype=torch.bool, device=h_SD.device)
    for at in _chunks(h_SD):
        logits_CV = head(padded(h_SD[at], head.kernels))
        out_S[at] = logits_CV[: len(targets_S[at])].argmax(dim=-1) == targets_S[at]
    return out_S


def _likeliest(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Return whether no logit is larger than the target's (bool [C]). The maximum alone is half the price of its place."""
    logits_CV = logits_CV[: len(targets_C)]
    return logits_CV.gather(1, targets_C[:, None])[:, 0] >= logits_CV.amax(dim=1)


def _chunks(h_SD: Tensor) -> list[slice]:
    count, chunk = len(h_SD), CHUNK[h_SD.device.type]
    return [slice(at, min(at + chunk, count)) for at in range(0, count, chunk)]


def _wide_copy(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.detach().to(wide, copy=True, memory_format=torch.contiguous_format)


def padded(h_CD: Tensor, kernels: Kernels) -> Tensor:
    """Return hidden states with rows of zeros added, up to a whole number of rows for the head's product."""
    short = whole(len(h_CD), kernels, h_CD.dtype) - len(h_CD)
    return h_CD if short == 0 else torch.cat([h_CD, h_CD.new_zeros(short, h_CD.shape[1])])


def dpo_weights(policy_P2: Tensor, reference_P2: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return DPO's loss per pair [P] and the weight of each reply's NLL [P, 2] that has the loss's gradient.

    Inputs are summed log-probabilities (nats) of (chosen, rejected) under the policy and the reference. With
    z = beta * ((log p_c - log r_c) - (log p_r - log r_r)) the loss is -log sigmoid(z) (Rafailov et al. 2023, equation 7); its
    gradient with respect to log p_c is -beta * sigmoid(-z), and the opposite for log p_r.
    """
    margin_P2 = policy_P2 - reference_P2
    z_P = beta * (margin_P2[:, 0] - margin_P2[:, 1])
    pull_P = beta * torch.sigmoid(-z_P)
    return -torch.nn.functional.logsigmoid(z_P), torch.stack([pull_P, -pull_P], dim=1)
