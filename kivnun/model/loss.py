"""The loss, without ever holding the logits of a batch.

Only supervised positions reach the head, in chunks; each chunk's gradient is taken at once and its logits are dropped. The
interface is a weight per token, on which supervised training, pretraining and DPO ride alike.
Shapes: S supervised positions, C positions of a chunk, D model width, V vocabulary. Next: `train/engine.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Head: TypeAlias = Callable[[Tensor], Tensor]  # hidden [C, D] -> logits [C, V], soft-capping included

CHUNK = 512
# Below 16 rows the matrix libraries take other kernels, whose rows differ in the last bit from the same rows among more.
MIN_ROWS = 16


def weighted_nll(
    head: Head, head_parameters: Sequence[Tensor], h_SD: Tensor, targets_S: Tensor, weights_S: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sum of weights * NLL (nats, float32 scalar, differentiable) and each position's NLL [S] (float32, detached).

    `head_parameters` are the trained tensors that `head` uses (its weight, or an adapter's); their gradient is exact too.
    The caller's weights already hold the division by the step's total, so nothing is averaged here.
    """
    loss, nll_S = _ChunkedNll.apply(head, len(head_parameters), h_SD, targets_S, weights_S, *head_parameters)
    return loss, nll_S


class _ChunkedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, head: Head, num_parameters: int, h_SD: Tensor, targets_S: Tensor, weights_S: Tensor, *parameters: Tensor):  # type: ignore[override]
        dh_SD = torch.empty_like(h_SD)
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        nll_S = torch.empty(len(h_SD), dtype=torch.float32, device=h_SD.device)
        for at in _chunks(len(h_SD)):
            with torch.enable_grad():
                h_CD = _padded(h_SD[at]).detach().requires_grad_()
                logits_CV = head(h_CD)
            nll_S[at], dlogits_CV = _nll_and_gradient(logits_CV.detach(), targets_S[at], weights_S[at])
            grads = torch.autograd.grad(logits_CV, [h_CD, *parameters], dlogits_CV)
            dh_SD[at] = grads[0][: len(targets_S[at])]
            for total, grad in zip(sums, grads[1:], strict=True):
                total += grad
        ctx.save_for_backward(dh_SD, *[s.to(p.dtype) for s, p in zip(sums, parameters, strict=True)])
        ctx.mark_non_differentiable(nll_S)
        return (nll_S * weights_S).sum(dtype=torch.float64).float(), nll_S

    @staticmethod
    def backward(ctx, dloss: Tensor, _dnll: Tensor):  # type: ignore[override]
        dh_SD, *dparameters = ctx.saved_tensors
        return None, None, dh_SD * dloss.to(dh_SD.dtype), None, None, *[d * dloss.to(d.dtype) for d in dparameters]


def _nll_and_gradient(logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return NLL [C] in float32 and the gradient of weights * NLL in the logits' dtype, rows of padding included as zero.

    The one is subtracted at the true class in float32: in bfloat16 p - 1 of a confident token would lose most of its digits.
    """
    count = len(targets_C)
    scores_CV = logits_CV.float() if logits_CV.dtype != torch.float32 else logits_CV.clone()
    nll_C = torch.logsumexp(scores_CV[:count], dim=1)
    nll_C -= scores_CV[:count].gather(1, targets_C[:, None])[:, 0]
    p_CV = torch.softmax(scores_CV, dim=1)
    p_CV[torch.arange(count, device=p_CV.device), targets_C] -= 1.0
    p_CV[:count] *= weights_C[:, None]
    p_CV[count:] = 0.0
    return nll_C, p_CV.to(logits_CV.dtype)


@torch.no_grad()
def token_log_probs(head: Head, h_SD: Tensor, targets_S: Tensor) -> Tensor:
    """Return the log-probability (nats, float32 [S]) of each target token; no gradient."""
    out_S = torch.empty(len(h_SD), dtype=torch.float32, device=h_SD.device)
    for at in _chunks(len(h_SD)):
        scores_CV = head(_padded(h_SD[at]))[: len(targets_S[at])].float()
        out_S[at] = scores_CV.gather(1, targets_S[at][:, None])[:, 0] - torch.logsumexp(scores_CV, dim=1)
    return out_S


def _chunks(count: int) -> list[slice]:
    return [slice(at, min(at + CHUNK, count)) for at in range(0, count, CHUNK)]


def _padded(h_CD: Tensor) -> Tensor:
    short = MIN_ROWS - len(h_CD)
    return h_CD if short <= 0 else torch.cat([h_CD, h_CD.new_zeros(short, h_CD.shape[1])])


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
