"""Matrix products, each by what is fastest for its dtype and processor. The choice is this table, made once and by measurement.

On processors with AVX-512 the kernels in C multiply: as fast as oneDNN with packed weights, an adapter's second product in the
same pass, and nothing kept for each number of rows, where oneDNN keeps code (`python -m benchmarks.engine.product_rates`). They
read the right factor packed, which takes some percent of a product of 700 rows and as long as a product of 16: a frozen weight may
be kept so (`PackedMatrix`). Elsewhere torch multiplies; float32 on a CPU through oneDNN rather than MKL, which on AMD's processors
is 2.3 times as fast. Its entry is a private operator of torch, so it is probed once, for being there and being right.
Shapes: T tokens, M, N, K any, R rank. Next: `kernels/products.c` (how they are taken), `linear.py`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kivnun.model.dropout import Mask
from kivnun.model.kernels.native import NativeKernels, Panels


class PackedMatrix:
    """A matrix [N, K] kept as the kernels in C read it; the same values to the bit.

    It is packed for x w^T at once and for x w when that is first asked for: a model that only answers never needs the second.
    """

    def __init__(self, w_NK: Tensor, kernels: NativeKernels) -> None:
        self.shape, self.dtype, self._kernels = w_NK.shape, w_NK.dtype, kernels
        self._transposed = kernels.panels_transposed(w_NK)
        self._straight: Panels | None = None

    def dense(self) -> Tensor:
        """Return the matrix in its usual order, a copy."""
        return self._kernels.unpacked(self._transposed).t().contiguous()

    def panels_transposed(self) -> Panels:
        return self._transposed

    def panels(self) -> Panels:
        if self._straight is None:
            self._straight = self._kernels.panels(self.dense())
        return self._straight


Matrix: TypeAlias = Tensor | PackedMatrix


@dataclass(frozen=True, slots=True)
class LowRank:
    """A second product that is added to a first one, in the same sums: left w^T beside x w^T, left w beside x w; dropped before
    it is added, where there is a mask."""

    left_TR: Tensor
    w: Matrix
    mask: Mask | None = None


def can_pack(w_NK: Tensor, kernels: object) -> bool:
    """Return whether these kernels multiply by a packed matrix on both its sides."""
    return all(_by_native(w_NK, depth, kernels) for depth in w_NK.shape)


def packed(w_NK: Tensor, kernels: object) -> Matrix:
    """Return a matrix packed for repeated use, or as it is where nothing multiplies by packed ones."""
    return PackedMatrix(w_NK, kernels) if can_pack(w_NK, kernels) else w_NK  # type: ignore[arg-type]


def times_transposed(x_TK: Tensor, w_NK: Matrix, kernels: Any, low: LowRank | None = None, mask: Mask | None = None) -> Tensor:
    """Return x w^T, or x w^T + low [T, N]; with `mask`, of x dropped."""
    if _by_native(x_TK, x_TK.shape[1], kernels):
        return _native(x_TK, w_NK, kernels, low, transposed=True, mask=mask)
    assert isinstance(w_NK, Tensor)
    x_TK = x_TK if mask is None else kernels.dropped(x_TK, mask)
    y_TN = _onednn(x_TK, w_NK) if _by_onednn(x_TK) else x_TK @ w_NK.t()
    return _added(y_TN, low, kernels, transposed=True)


def times(x_TN: Tensor, w_NK: Matrix, kernels: Any, low: LowRank | None = None) -> Tensor:
    """Return x w, or x w + low [T, K]."""
    if _by_native(x_TN, x_TN.shape[1], kernels):
        return _native(x_TN, w_NK, kernels, low, transposed=False)
    return _added(_by_torch(x_TN, w_NK), low, kernels, transposed=False)


def wide_times_transposed(x_TK: Tensor, w_NK: Matrix, kernels: Any) -> Tensor:
    """Return x w^T, in float32 where the kernels in C compute it: not rounded to the type of its factors."""
    if not _by_native(x_TK, x_TK.shape[1], kernels):
        return times_transposed(x_TK, w_NK, kernels)
    return kernels.product(x_TK, _right(w_NK, transposed=True), transposed=True, wide=True)


def scaled_times(factor: float, x_TN: Tensor, w_NK: Matrix, kernels: Any) -> Tensor:
    """Return factor * x w [T, K], rounded after it is scaled where the kernels in C compute it."""
    if _by_native(x_TN, x_TN.shape[1], kernels):
        return kernels.product(x_TN, _right(w_NK, transposed=False), factor=factor)
    return _by_torch(x_TN, w_NK).mul_(factor)


def _by_torch(x_TN: Tensor, w_NK: Matrix) -> Tensor:
    assert isinstance(w_NK, Tensor)
    return _onednn(x_TN, w_NK.t()) if _by_onednn(x_TN) else x_TN @ w_NK


def over_tokens(a_TM: Tensor, b_TN: Tensor, kernels: Any, mask: Mask | None = None) -> Tensor:
    """Return a^T b [M, N], in float32 where the kernels in C compute it; with `mask`, of b dropped. A narrow factor comes before
    a wide one."""
    if a_TM.shape[1] <= NARROW and _by_native(a_TM, 0, kernels):
        return kernels.outer(a_TM, b_TN, mask)
    b_TN = b_TN if mask is None else kernels.dropped(b_TN, mask)
    return _onednn(a_TM.t(), b_TN.t()) if _by_onednn(a_TM) else a_TM.t() @ b_TN


NARROW = 256  # columns up to which a factor counts as narrow: an adapter's rank


def whole(rows: int, kernels: object, dtype: torch.dtype) -> int:
    """Return a number of rows rounded up to what products are padded to.

    Below 16 rows libraries take other kernels, whose rows differ in the last bit from the same rows among more. And oneDNN keeps
    code for every number of rows it meets, between outputs of other sizes, so that the process grows by megabytes for each: steps
    of 64 keep them few. The kernels in C need neither.
    """
    if isinstance(kernels, NativeKernels) and kernels.multiplies(dtype, 0):
        return rows
    step = 16 if rows <= 128 else 64
    return max(16, -(-rows // step) * step)


def _by_native(x: Tensor, depth: int, kernels: object) -> bool:
    return isinstance(kernels, NativeKernels) and x.device.type == "cpu" and kernels.multiplies(x.dtype, depth)


def _native(x_TK: Tensor, w: Matrix, kernels: Any, low: LowRank | None, *, transposed: bool, mask: Mask | None = None) -> Tensor:
    right = _right(w, transposed)
    if low is not None and isinstance(low.w, PackedMatrix):
        assert mask is None
        low_right = _right(low.w, transposed)
        return kernels.product(x_TK, right, low.left_TR, low_right, transposed=transposed, drop_low=low.mask)
    return _added(kernels.product(x_TK, right, transposed=transposed, drop_left=mask), low, kernels, transposed)


def _added(y_TN: Tensor, low: LowRank | None, kernels: Any, transposed: bool) -> Tensor:
    """Return y with the second product added by torch, where the kernels did not take it: an odd rank."""
    if low is None:
        return y_TN
    w = low.w if isinstance(low.w, Tensor) else low.w.dense()
    w = w.t() if transposed else w
    return y_TN.addmm_(low.left_TR, w) if low.mask is None else kernels.dropped(low.left_TR @ w, low.mask, y_TN)


def _right(w: Matrix, transposed: bool) -> Panels | Tensor:
    if isinstance(w, Tensor):
        return w
    return w.panels_transposed() if transposed else w.panels()


def _by_onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and onednn_serves()


def _onednn(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_TK, w_NK, None, "none", [], "")


@functools.cache
def onednn_serves() -> bool:
    """Return whether oneDNN's float32 product is there and right in this process."""
    x_TK = torch.linspace(-1.0, 1.0, 18 * 32).view(18, 32)
    w_NK = torch.linspace(-2.0, 3.0, 24 * 32).view(24, 32)
    expected = x_TK.double() @ w_NK.double().t()
    try:
        straight, turned = _onednn(x_TK, w_NK), _onednn(x_TK, w_NK.t().contiguous().t())
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return all(torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-4) for found in (straight, turned))
