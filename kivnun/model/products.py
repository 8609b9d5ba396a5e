"""Matrix products, each by the library that is fastest for its dtype. The choice is this table, made once and by measurement.

On a CPU torch gives float32 products to MKL; oneDNN, which torch also holds, does them 2.3 times as fast on AMD's processors, with
the same float32 arithmetic (docs/LOG.md, 2026-11-24). Its entry is a private operator of torch, so it is probed once, for being
there and being right; without it torch's own products serve, and the run says so.
Shapes: T tokens, M, N, K any. Next: `linear.py`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def whole(rows: int) -> int:
    """Return a number of rows rounded up to what products are padded to.

    Below 16 rows the libraries take other kernels, whose rows differ in the last bit from the same rows among more. And oneDNN
    makes and keeps kernels for every number of rows it meets, megabytes for each: steps of 64 keep them few.
    """
    step = 16 if rows <= 128 else 64
    return max(16, -(-rows // step) * step)


def times_transposed(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """Return x w^T [T, N]."""
    return _onednn(x_TK, w_NK) if _by_onednn(x_TK) else x_TK @ w_NK.t()


def times(x_TN: Tensor, w_NK: Tensor) -> Tensor:
    """Return x w [T, K]."""
    return _onednn(x_TN, w_NK.t()) if _by_onednn(x_TN) else x_TN @ w_NK


def over_tokens(a_TM: Tensor, b_TN: Tensor) -> Tensor:
    """Return a^T b [M, N]. Of two factors of unequal width the narrow one comes first: oneDNN is up to three times as fast so."""
    return _onednn(a_TM.t(), b_TN.t()) if _by_onednn(a_TM) else a_TM.t() @ b_TN


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
