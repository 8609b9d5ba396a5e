"""The LoRA and DoRA equations with their gradients, and the linear layer of a base that can carry them.

A base's `TunableLinear` knows no adapter: one is lent to it for a pass (`site`) and taken back. The functions take A, B and the
magnitude as arguments, so that several adapters can share a base.
Shapes: T tokens, I inputs, O outputs, R rank. Next: `adapters.py` (which modules get a site, and how it starts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kivnun.model.dropout import Mask
from kivnun.model.kernels import Kernels
from kivnun.model.products import LowRank, Matrix, PackedMatrix, over_tokens, packed, times, times_transposed

# Makes a layer's input again in the backward pass, from what another function keeps anyway; None: the input itself is kept.
Again: TypeAlias = Callable[[], Tensor] | None


@dataclass(slots=True)
class DropoutDraw:
    """What a dropout mask is drawn from in one pass: a rate, the site's key and one key per token (None: no dropout now)."""

    rate: float
    site: int
    keys_T: Tensor | None = None

    def now(self, select_S: Tensor | None) -> Mask | None:
        """Return the mask of this pass: still the same one when the next pass has drawn anew.

        With `select_S` it is for these tokens of the pass, each with the mask it would have among all.
        """
        keys_T = self.keys_T if select_S is None or self.keys_T is None else self.keys_T[select_S]
        return None if keys_T is None else Mask(keys_T, self.site, self.rate)


@dataclass(slots=True)
class Factors:
    """A and scaling * B in the dtype of computing, packed for their products; made anew when A or B has changed."""

    made_of: tuple[object, ...] = ()
    a_RI: Matrix | None = None
    b_OR: Matrix | None = None

    def of(self, site: LowRankSite, dtype: torch.dtype, kernels: Kernels) -> tuple[Matrix, Matrix]:
        a_RI, b_OR = site.a_RI.detach(), site.b_OR.detach()
        made_of = (a_RI._version, b_OR._version, a_RI.data_ptr(), b_OR.data_ptr(), site.scaling, dtype)
        if self.a_RI is None or self.b_OR is None or self.made_of != made_of:
            self.made_of = made_of
            a_RI, b_OR = whole_factors(site)
            self.a_RI, self.b_OR = packed(a_RI.to(dtype), kernels), packed((b_OR * site.scaling).to(dtype), kernels)
        return self.a_RI, self.b_OR


@dataclass(frozen=True, slots=True)
class Start:
    """What an adapter that starts away from zero takes off again: the delta is B A - B0 A0, so that the tuned model starts as the
    base. It is the same as taking B0 A0 out of the base (PiSSA, OLoRA), but leaves the base alone, whatever holds it."""

    a_RI: Tensor
    b_OR: Tensor


@dataclass(slots=True)
class LoraSite:
    """A low-rank delta for one linear layer: W + scaling * B A (Hu et al. 2021, section 4.1). A and B are float32 parameters."""

    a_RI: nn.Parameter
    b_OR: nn.Parameter
    scaling: float
    dropout: DropoutDraw
    start: Start | None = None
    factors: Factors = field(default_factory=Factors)

    def __call__(self, x_TI: Tensor, linear: TunableLinear, again: Again = None, select_S: Tensor | None = None) -> Tensor:
        mask = self.dropout.now(select_S)
        return _Lora.apply(x_TI, self.a_RI, self.b_OR, self, mask, linear, again)  # type: ignore[no-any-return]

    def merged(self, weight_OI: Tensor) -> Tensor:
        """Return W + scaling * B A in float32."""
        return weight_OI.float() + delta_of(self)


class _Lora(torch.autograd.Function):
    """y = x W^T + s (x~ A^T) B^T with x~ the dropped input, and with u = s dy B:
    dA = u^T x~, dB = s dy^T (x~ A^T), dx = dy W + (u A)~.

    Every product goes through the rank first, so that nothing of the weight's size is made. Kept are x and x~ A^T alone; x~ is
    never written down, the products drop on the way.
    """

    @staticmethod
    def forward(ctx: Any, x_TI, a_RI, b_OR, site, mask, linear, again):  # type: ignore[override]
        kernels = linear.kernels
        a, scaled_b = site.factors.of(site, x_TI.dtype, kernels)
        xa_TR = times_transposed(x_TI, a, kernels, mask=mask)
        y_TO = times_transposed(x_TI, linear.operand(), kernels, LowRank(xa_TR, scaled_b))
        # A and B too: autograd then refuses a backward pass after they have changed, which would use them as they are by now.
        ctx.save_for_backward(None if again else x_TI, xa_TR, a_RI, b_OR)
        ctx.site, ctx.mask, ctx.linear, ctx.again = site, mask, linear, again
        return y_TO if linear.bias is None else y_TO.add_(linear.bias)

    @staticmethod
    def backward(ctx: Any, dy_TO):  # type: ignore[override]
        x_TI, xa_TR, _, _ = ctx.saved_tensors
        return *_lora_gradients(ctx, dy_TO, _input(ctx, x_TI), xa_TR), None, None, None, None


def _input(ctx: Any, kept_TI: Tensor) -> Tensor:
    """Return x, kept or made again; what it is made of is let go, which autograd does by itself only for what it keeps."""
    again, ctx.again = ctx.again, None
    return again() if again else kept_TI


def _lora_gradients(ctx: Any, dy_TO: Tensor, x_TI: Tensor, xa_TR: Tensor):
    """Return (dx [T, I] or None where nobody asks for it, dA [R, I], dB [O, R]) of y = x W^T + s (x~ A^T) B^T."""
    kernels = ctx.linear.kernels
    a, scaled_b = ctx.site.factors.of(ctx.site, dy_TO.dtype, kernels)
    u_TR = times(dy_TO, scaled_b, kernels)
    db_OR = over_tokens(_trained(xa_TR, ctx.site), dy_TO, kernels).t().to(ctx.site.b_OR.dtype) * ctx.site.scaling
    da_RI = over_tokens(_trained(u_TR, ctx.site), x_TI, kernels, ctx.mask).to(ctx.site.a_RI.dtype)
    if not ctx.needs_input_grad[0]:
        return None, da_RI, db_OR
    return times(dy_TO, ctx.linear.operand(), kernels, LowRank(u_TR, a, ctx.mask)), da_RI, db_OR


def _trained(columns_TR: Tensor, site: LowRankSite) -> Tensor:
    """Return the columns that belong to A and B, without those of a start."""
    return columns_TR if site.start is None else columns_TR[:, : len(site.a_RI)].contiguous()


@dataclass(slots=True)
class DoraSite:
    """A low-rank delta for the direction and a trained length per output row (Liu et al. 2024, "DoRA", equation 5).

    y = m / c * (W + scaling * B A) x with c the row norms of W + scaling * B A, held constant in the gradient (section 4.3
    there). `magnitude_O` is float32: in bfloat16 small updates round to nothing. With dropout the base's part sees the dropped
    input in its correction only, as in PEFT, at the price of a second product with W.
    """

    a_RI: nn.Parameter
    b_OR: nn.Parameter
    magnitude_O: nn.Parameter
    scaling: float
    dropout: DropoutDraw
    start: Start | None = None
    _squares_O: Tensor | None = None
    factors: Factors = field(default_factory=Factors)

    def __call__(self, x_TI: Tensor, linear: TunableLinear, again: Again = None, select_S: Tensor | None = None) -> Tensor:
        mask, tensors = self.dropout.now(select_S), (self.a_RI, self.b_OR, self.magnitude_O)
        if mask is None:
            return _Dora.apply(x_TI, *tensors, linear.bias, self, linear, again)  # type: ignore[no-any-return]
        dropped_TI = _Dropped.apply(x_TI, mask, linear.kernels)
        plain_TO = linear.plain(x_TI) - _Linear.apply(dropped_TI, None, None, linear)
        return plain_TO + _Dora.apply(dropped_TI, *tensors, None, self, linear, None)

    def row_norm(self, weight_OI: Matrix, kernels: Kernels) -> Tensor:
        """Return the row norms of W + scaling * B A, float32 [O]. |W_o|^2 is taken once: a base never changes under an adapter."""
        if self._squares_O is None:
            self._squares_O = row_squares(weight_OI if isinstance(weight_OI, Tensor) else weight_OI.dense())
        return dora_row_norm(weight_OI, *whole_factors(self), self.scaling, self._squares_O, kernels)

    def merged(self, weight_OI: Tensor) -> Tensor:
        """Return m / c * (W + scaling * B A) in float32."""
        direction_OI = weight_OI.float() + delta_of(self)
        return direction_OI * (self.magnitude_O.detach().float() / direction_OI.norm(dim=1))[:, None]


class _Dora(torch.autograd.Function):
    """y = r * z with z = x W^T + s (x A^T) B^T and r = m / c, c constant: dm is the sum over tokens of dy * z / c, the rest LoRA's
    gradient of dz = r * dy. r multiplies in float32: near 1, bfloat16 has steps of 2^-8.
    """

    @staticmethod
    def forward(ctx: Any, x_TI, a_RI, b_OR, magnitude_O, bias_O, site, linear, again):  # type: ignore[override]
        weight_OI = linear.operand()
        length_O = site.row_norm(weight_OI, linear.kernels)
        a, scaled_b = site.factors.of(site, x_TI.dtype, linear.kernels)
        xa_TR = times_transposed(x_TI, a, linear.kernels)
        z_TO = times_transposed(x_TI, weight_OI, linear.kernels, LowRank(xa_TR, scaled_b))
        y_TO = linear.kernels.scale_columns(z_TO, magnitude_O / length_O)
        ctx.save_for_backward(None if again else x_TI, xa_TR, a_RI, b_OR, magnitude_O, length_O, z_TO)
        ctx.site, ctx.mask, ctx.linear, ctx.again = site, None, linear, again
        return y_TO if bias_O is None else y_TO.add_(bias_O)

    @staticmethod
    def backward(ctx: Any, dy_TO):  # type: ignore[override]
        x_TI, xa_TR, _, _, magnitude_O, length_O, z_TO = ctx.saved_tensors
        kernels = ctx.linear.kernels
        dmagnitude_O = kernels.column_dots(dy_TO, z_TO) / length_O
        dz_TO = kernels.scale_columns(dy_TO, magnitude_O / length_O)
        return *_lora_gradients(ctx, dz_TO, _input(ctx, x_TI), xa_TR), dmagnitude_O, None, None, None, None


class _Dropped(torch.autograd.Function):
    """Dropout as an operation of its own. It is linear, and its own transpose."""

    @staticmethod
    def forward(ctx: Any, x_TI, mask, kernels):  # type: ignore[override]
        ctx.mask, ctx.kernels = mask, kernels
        return kernels.dropped(x_TI, mask)

    @staticmethod
    def backward(ctx: Any, dout_TI):  # type: ignore[override]
        return ctx.kernels.dropped(dout_TI, ctx.mask), None, None


LowRankSite: TypeAlias = LoraSite | DoraSite


class AdapterSite(Protocol):
    """What may be lent to a linear layer for a pass."""

    def __call__(self, x_TI: Tensor, linear: TunableLinear, again: Again = None, select_S: Tensor | None = None) -> Tensor:
        """Return the layer's output [T, O] with the adapter's part. `again` and `select_S` as in `TunableLinear.forward`."""
        ...

    def merged(self, weight_OI: Tensor) -> Tensor:
        """Return the weight, float32, of a plain layer that computes the same."""
        ...


@runtime_checkable
class ScalesBias(Protocol):
    """A site that changes what its layer's bias is."""

    def merged_bias(self, bias_O: Tensor) -> Tensor:
        """Return the bias of a plain layer that computes the same."""
        ...


def whole_factors(site: LowRankSite) -> tuple[Tensor, Tensor]:
    """Return (A, B), float32, whose product is the site's delta before scaling: A and B themselves, or twice their rank where the
    adapter started away from zero."""
    a_RI, b_OR = site.a_RI.detach().float(), site.b_OR.detach().float()
    if site.start is None:
        return a_RI, b_OR
    return torch.cat([a_RI, site.start.a_RI]), torch.cat([b_OR, -site.start.b_OR], dim=1)


def delta_of(site: LowRankSite) -> Tensor:
    """Return scaling * B A, float32 [O, I], less what the adapter started from."""
    a_RI, b_OR = whole_factors(site)
    return site.scaling * (b_OR @ a_RI)


@torch.no_grad()
def dora_row_norm(weight_OI: Matrix, a_RI: Tensor, b_OR: Tensor, scaling: float, squares_O: Tensor, kernels: Kernels) -> Tensor:
    """Return the row norms of W + scaling * B A, float32 [O], without forming the O x I sum; `squares_O` is |W_o|^2.

    norm^2 = |W_o|^2 + 2 s B_o (A W_o) + s^2 B_o (A A^T) B_o^T; the three terms are summed in float64, since they cancel where
    the delta undoes a row. |W_o| and A W_o hold float32's digits, so a row undone to a hundredth keeps two or three of them.
    """
    w_a_OR = times_transposed(a_RI.to(weight_OI.dtype), weight_OI, kernels).t().double()
    b_OR64 = b_OR.double()
    cross_O = 2 * scaling * (b_OR64 * w_a_OR).sum(1)
    delta_O = scaling**2 * ((b_OR64 @ (a_RI.double() @ a_RI.double().T)) * b_OR64).sum(1)
    return (squares_O + cross_O + delta_O).clamp_min(0.0).sqrt().float()


@torch.no_grad()
def row_squares(weight_OI: Tensor) -> Tensor:
    """Return |W_o|^2, float64 [O]."""
    wide_OI = weight_OI if weight_OI.dtype == torch.float64 else weight_OI.float()
    return torch.linalg.vector_norm(wide_OI, dim=1).double().square()


class TunableLinear(nn.Module):
    """A linear layer of the base, with the weight's own name, that applies the site lent to it.

    A dense layer holds its weight. A layer in fewer bits, or packed, holds `matrix` instead, and `weight` is None.
    """

    def __init__(self, linear: nn.Linear, kernels: Kernels, matrix: nn.Module | None = None) -> None:
        super().__init__()
        self.weight = linear.weight if matrix is None else None
        self.matrix: nn.Module | PackedMatrix | None = matrix
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kernels = kernels
        self.site: AdapterSite | None = None

    def pack(self) -> None:
        """Keep the weight packed for its products, where it can be: it can never be trained then."""
        matrix = None if self.weight is None else packed(self.weight, self.kernels)
        if isinstance(matrix, PackedMatrix):
            self.matrix, self.weight = matrix, None

    def dense(self) -> Tensor:
        """Return the weight [O, I] in the dtype of computing. Decoded weights are valid until the next decoding."""
        return self.weight if self.matrix is None else self.matrix.dense()  # type: ignore[operator, return-value]

    def operand(self) -> Matrix:
        """Return the weight as products take it: packed if it is, else dense."""
        return self.matrix if isinstance(self.matrix, PackedMatrix) else self.dense()

    def forward(self, x: Tensor, again: Again = None, select_S: Tensor | None = None) -> Tensor:
        """Return x W^T + bias with the site's part. `select_S` says which tokens of the pass these are (None: all of them)."""
        flat_TI = x.reshape(-1, self.in_features)  # [1, T, I] in the trunk, [S, I] at the head
        y_TO = self.plain(flat_TI) if self.site is None else self.site(flat_TI, self, again, select_S)
        return y_TO.view(*x.shape[:-1], self.out_features)

    def plain(self, x_TI: Tensor) -> Tensor:
        """Return x W^T + bias, without the site."""
        return _Linear.apply(x_TI, self.weight, self.bias, self)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Linear(torch.autograd.Function):
    """y = x W^T + b: dx = dy W, dW = dy^T x and db the sum of dy, the last two where the layer itself is trained."""

    @staticmethod
    def forward(ctx: Any, x_TI, weight_OI, bias_O, linear):  # type: ignore[override]
        y_TO = times_transposed(x_TI, linear.operand(), linear.kernels)
        ctx.save_for_backward(x_TI if ctx.needs_input_grad[1] else None)
        ctx.linear = linear
        return y_TO if bias_O is None else y_TO.add_(bias_O)

    @staticmethod
    def backward(ctx: Any, dy_TO):  # type: ignore[override]
        (x_TI,) = ctx.saved_tensors
        dx_TI = times(dy_TO, ctx.linear.operand(), ctx.linear.kernels) if ctx.needs_input_grad[0] else None
        dweight_OI = over_tokens(dy_TO, x_TI, ctx.linear.kernels) if ctx.needs_input_grad[1] else None
        return dx_TI, dweight_OI, dy_TO.sum(0) if ctx.needs_input_grad[2] else None, None


class TunableEmbedding(nn.Module):
    """An embedding table whose gradient is summed in float32: in bfloat16 a frequent token's many small shares are lost."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.padding_idx = None  # a pad id that is also an end-of-text token must keep its gradient; packs hold no padding
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.prompt_PD: Tensor | None = None  # lent for a pass: ids from num_embeddings on are its rows

    def forward(self, ids: Tensor) -> Tensor:
        if self.prompt_PD is None:
            return _Lookup.apply(ids, self.weight)  # type: ignore[no-any-return]
        virtual = ids >= self.num_embeddings
        out: Tensor = _Lookup.apply(ids.masked_fill(virtual, 0), self.weight)  # type: ignore[assignment]
        return out.index_put((virtual,), self.prompt_PD.to(out.dtype)[ids[virtual] - self.num_embeddings])


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
