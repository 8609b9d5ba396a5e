"""The LoRA and DoRA equations, and the linear layer of a base that can carry them.

A base's `TunableLinear` knows no adapter: one is lent to it for a pass (`site`) and taken back. The functions take A, B and the
magnitude as arguments, so that several adapters can share a base.
Shapes: T tokens, I inputs, O outputs, R rank. Next: `adapters.py` (which modules get a site, and how it starts).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kivnun.model.dropout import dropped


@dataclass(slots=True)
class DropoutDraw:
    """What a dropout mask is drawn from in one pass: a rate, the site's key and one key per token (None: no dropout now)."""

    rate: float
    site: int
    keys_T: Tensor | None = None

    def __call__(self, x_TI: Tensor) -> Tensor:
        return x_TI if self.keys_T is None else dropped(x_TI, self.keys_T, self.site, self.rate)

    @property
    def active(self) -> bool:
        return self.keys_T is not None


@dataclass(slots=True)
class LoraSite:
    """A low-rank delta for one linear layer: W + scaling * B A (Hu et al. 2021, section 4.1). A and B are float32 parameters."""

    a_RI: nn.Parameter
    b_OR: nn.Parameter
    scaling: float
    dropout: DropoutDraw

    def __call__(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        y_TO = F.linear(x_TI, weight_OI, bias_O)
        return y_TO + lora_delta(self.dropout(x_TI), self.a_RI, self.b_OR, self.scaling)

    def merged(self, weight_OI: Tensor) -> Tensor:
        """Return W + scaling * B A in float32."""
        return weight_OI.float() + self.scaling * (self.b_OR.detach().float() @ self.a_RI.detach().float())


@dataclass(slots=True)
class DoraSite:
    """A low-rank delta for the direction and a trained length per output row (Liu et al. 2024, "DoRA", equation 5).

    y = m / c * (W + scaling * B A) x with c the row norms of W + scaling * B A, held constant in the gradient (section 4.3
    there). `magnitude_O` is float32: in bfloat16 small updates round to nothing. With dropout the base's part sees the dropped
    input in its correction only, as in PEFT.
    """

    a_RI: nn.Parameter
    b_OR: nn.Parameter
    magnitude_O: nn.Parameter
    scaling: float
    dropout: DropoutDraw

    def __call__(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        length_O = dora_row_norm(weight_OI, self.a_RI, self.b_OR, self.scaling)
        ratio_O = (self.magnitude_O / length_O).to(x_TI.dtype)
        base_TO = F.linear(x_TI, weight_OI)
        dropped_TI = self.dropout(x_TI)
        delta_TO = lora_delta(dropped_TI, self.a_RI, self.b_OR, self.scaling)
        if self.dropout.active:
            y_TO = base_TO + (ratio_O - 1) * F.linear(dropped_TI, weight_OI) + ratio_O * delta_TO
        else:
            y_TO = ratio_O * (base_TO + delta_TO)
        return y_TO if bias_O is None else y_TO + bias_O

    def merged(self, weight_OI: Tensor) -> Tensor:
        """Return m / c * (W + scaling * B A) in float32."""
        direction_OI = weight_OI.float() + self.scaling * (self.b_OR.detach().float() @ self.a_RI.detach().float())
        return direction_OI * (self.magnitude_O.detach().float() / direction_OI.norm(dim=1))[:, None]


AdapterSite = LoraSite | DoraSite


def lora_delta(x_TI: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
    """Return scaling * B A x, contracted through the rank first, in the dtype of x."""
    return F.linear(F.linear(x_TI, a_RI.to(x_TI.dtype)), b_OR.to(x_TI.dtype)) * scaling


@torch.no_grad()
def dora_row_norm(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
    """Return the row norms of W + scaling * B A, float32 [O], without forming the O x I sum.

    norm^2 = |W_o|^2 + 2 s B_o (A W_o) + s^2 B_o (A A^T) B_o^T; the three terms are summed in float64, since they cancel where
    the delta undoes a row. |W_o| and A W_o hold float32's digits, so a row undone to a hundredth keeps two or three of them.
    """
    w_a_OR = F.linear(weight_OI, a_RI.to(weight_OI.dtype)).double()
    b_OR64 = b_OR.double()
    square_O = weight_OI.double().square().sum(1) if weight_OI.dtype == torch.float64 else _row_squares(weight_OI)
    cross_O = 2 * scaling * (b_OR64 * w_a_OR).sum(1)
    delta_O = scaling**2 * ((b_OR64 @ (a_RI.double() @ a_RI.double().T)) * b_OR64).sum(1)
    return (square_O + cross_O + delta_O).clamp_min(0.0).sqrt().float()


def _row_squares(weight_OI: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight_OI.float(), dim=1).double().square()


class TunableLinear(nn.Module):
    """A linear layer of the base, with the weight's own name, that applies the site lent to it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.site: AdapterSite | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.site is None:
            return F.linear(x, self.weight, self.bias)
        flat = x.reshape(-1, self.in_features)  # [1, T, I] in the trunk, [S, I] at the head
        return self.site(flat, self.weight, self.bias).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class TunableEmbedding(nn.Module):
    """An embedding table whose gradient is summed in float32: in bfloat16 a frequent token's many small shares are lost."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.padding_idx = None  # a pad id that is also an end-of-text token must keep its gradient; packs hold no padding
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        return _Lookup.apply(ids, self.weight)  # type: ignore[no-any-return]


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids: Tensor, weight_VD: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype = weight_VD.shape, weight_VD.dtype
        return F.embedding(ids, weight_VD)

    @staticmethod
    def backward(ctx, dout: Tensor):  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        sums_VD = torch.zeros(ctx.shape, dtype=torch.float32, device=dout.device)
        sums_VD.index_add_(0, ids.reshape(-1), dout.reshape(-1, dout.shape[-1]).float())
        return None, sums_VD.to(ctx.dtype)
