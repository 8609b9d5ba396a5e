"""What bitsandbytes makes of its own codes, where its two ways on a CPU agree, and by the right one where they do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def decoded_nf4(codes: Tensor, state: Any) -> Tensor:
    """Return the values of 4-bit codes by bitsandbytes' code in torch (uncompiled), and check that its C++ gives the same.

    The C++ of 0.50.2 for AVX-512 takes the scale of a piece's first element for all of the piece, also where the piece reaches
    into another block: that is so in rows whose length is a multiple of 16 but not of the block. Those are not compared.
    """
    import bitsandbytes.functional as functional
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    packed = codes.contiguous().view(torch.uint8).reshape(-1)
    uncompiled = getattr(_dequantize_4bit_compute, "__wrapped__", _dequantize_4bit_compute)
    in_torch = uncompiled(packed, absmax, state.code, state.blocksize, state.shape, state.dtype)
    length = state.shape[-1]
    if length % 2 == 0 and (length % 16 or length % state.blocksize == 0):
        in_cpp = functional.dequantize_4bit(codes, state)
        assert torch.equal(in_cpp, in_torch)
    return in_torch
