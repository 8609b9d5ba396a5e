"""The kernels for CUDA, in Triton: each reads and writes its tensors once, where torch's operations pass over memory many times.

The class can be named on any machine; an object of it can be made only where Triton can be imported. What no kernel here does
(attention, encoding) the reference does: on CUDA attention goes through torch's own (`model/attention.py`).
Shapes as in `reference.py`. Next: `triton_functions.py` (the kernels), `__init__.py` (when they are chosen).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kivnun.model.dropout import _GOLDEN, _MULTIPLIERS, Mask, scale_and_limit
from kivnun.model.kernels.reference import BY_127, GROUP, NF4, Angles, TorchKernels, leaves_over

PIECE = 1024  # elements of a pointwise program
SCORES = 4096  # logits read at once
ROWS = 128  # rows that one program of a sum over tokens adds up
HEADS = 8  # heads that one program rotates
DECODED = 2048


class TritonKernels(TorchKernels):
    """The reference's operations on CUDA tensors. Raises ImportError where there is no Triton."""

    name = "triton"

    def __init__(self) -> None:
        from kivnun.model.kernels import triton_functions

        self._functions: Any = triton_functions
        self._tables: dict[torch.device, Tensor] = {}

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x_TD, weight_D = x_TD.contiguous(), weight_D.contiguous()
        y_TD, scale_T = torch.empty_like(x_TD), x_TD.new_empty(len(x_TD), dtype=torch.float32)
        block, warps = _one_block(x_TD.shape[1])
        self._functions.rms_norm[len(x_TD),](x_TD, weight_D, y_TD, scale_T, x_TD.shape[1], eps, BLOCK=block, num_warps=warps)
        return y_TD, scale_T

    def add_rms_norm(
        self, h_TD: Tensor, rest_TD: Tensor | None, delta_TD: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        h_TD, delta_TD, weight_D = h_TD.contiguous(), delta_TD.contiguous(), weight_D.contiguous()
        sum_TD, y_TD, scale_T = torch.empty_like(h_TD), torch.empty_like(h_TD), h_TD.new_empty(len(h_TD), dtype=torch.float32)
        over_TD = torch.empty_like(h_TD) if leaves_over(h_TD) else None
        block, warps = _one_block(h_TD.shape[1])
        self._functions.add_rms_norm[len(h_TD),](
            h_TD, rest_TD, delta_TD, weight_D, sum_TD, over_TD, y_TD, scale_T, h_TD.shape[1], eps,
            REST=rest_TD is not None, OVER=over_TD is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        return sum_TD, over_TD, y_TD, scale_T

    def rms_norm_backward(
        self, dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, scale_T: Tensor, add_TD: Tensor | None = None
    ) -> Tensor:
        dy_TD, x_TD, weight_D = dy_TD.contiguous(), x_TD.contiguous(), weight_D.contiguous()
        dx_TD = torch.empty_like(x_TD)
        block, warps = _one_block(x_TD.shape[1])
        self._functions.rms_norm_backward[len(x_TD),](
            dy_TD, x_TD, weight_D, scale_T, dx_TD, x_TD.shape[1], BLOCK=block, num_warps=warps
        )
        return dx_TD if add_TD is None else dx_TD.add_(add_TD)

    def gate(self, gu_T2F: Tensor) -> Tensor:
        gu_T2F = gu_T2F.contiguous()
        out_TF = gu_T2F.new_empty(len(gu_T2F), gu_T2F.shape[1] // 2)
        self._functions.gate[_pieces(out_TF)](gu_T2F, out_TF, out_TF.shape[1], BLOCK=PIECE)
        return out_TF

    def gate_backward_(self, dh_TF: Tensor, gu_T2F: Tensor) -> None:
        assert gu_T2F.is_contiguous()  # it is written in place; each element is read by the program that writes it
        dh_TF = dh_TF.contiguous()
        self._functions.gate_backward[_pieces(dh_TF)](dh_TF, gu_T2F, gu_T2F, dh_TF.shape[1], BLOCK=PIECE)

    def nll_(self, logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        assert logits_CV.is_contiguous()  # it is written in place
        nll_C = logits_CV.new_empty(len(targets_C), dtype=torch.float32)
        weights_C = weights_C.float().contiguous()
        rows, width = logits_CV.shape
        self._functions.nll[rows,](
            logits_CV, targets_C.contiguous(), weights_C, nll_C, len(targets_C), width, BLOCK=SCORES, num_warps=8
        )
        return nll_C, logits_CV.to(dtype)

    def log_prob(self, logits_CV: Tensor, targets_C: Tensor) -> Tensor:
        out_C = logits_CV.new_empty(len(targets_C), dtype=torch.float32)
        self._functions.log_prob[len(targets_C),](
            logits_CV.contiguous(), targets_C.contiguous(), out_C, logits_CV.shape[1], BLOCK=SCORES, num_warps=8
        )
        return out_C

    def dropped(self, x_TD: Tensor, mask: Mask, onto_TD: Tensor | None = None) -> Tensor:
        x_TD, (factor, limit) = x_TD.contiguous(), scale_and_limit(mask.rate)
        out_TD = torch.empty_like(x_TD) if onto_TD is None else onto_TD
        assert out_TD.is_contiguous()  # it is written in place; each element is read by the program that writes it
        site_1 = torch.full((1,), mask.site, dtype=torch.int64, device=x_TD.device)  # as a number it would be compiled in
        self._functions.dropped[_pieces(x_TD)](
            x_TD, mask.keys_T.contiguous(), out_TD, site_1, limit, factor, x_TD.shape[1],
            ONTO=onto_TD is not None, GOLDEN=_GOLDEN, FIRST=_MULTIPLIERS[0], SECOND=_MULTIPLIERS[1], BLOCK=PIECE,
        )  # fmt: skip
        return out_TD

    def scale_columns(self, x_TO: Tensor, factor_O: Tensor) -> Tensor:
        x_TO, factor_O = x_TO.contiguous(), factor_O.float().contiguous()
        out_TO = torch.empty_like(x_TO)
        self._functions.scale_columns[_pieces(x_TO)](x_TO, factor_O, out_TO, x_TO.shape[1], BLOCK=PIECE)
        return out_TO

    def column_dots(self, x_TO: Tensor, y_TO: Tensor) -> Tensor:
        x_TO, y_TO = x_TO.contiguous(), y_TO.contiguous()
        count, width = x_TO.shape
        parts_PO = x_TO.new_empty(-(-count // ROWS), width, dtype=torch.float32)
        self._functions.column_dots[-(-width // 256), len(parts_PO)](x_TO, y_TO, parts_PO, count, width, ROWS=ROWS, BLOCK=256)
        return parts_PO.sum(0)

    def turned(self, x_THK: Tensor, angles: Angles, direction: int) -> Tensor:
        """Return `angles.turned(x, direction)`, multiplied in float32 and rounded once. Heads of a token lie side by side in x."""
        tokens, heads, width = x_THK.shape
        x_THK = x_THK if x_THK.stride()[1:] == (width, 1) else x_THK.contiguous()
        out_THK = x_THK.new_empty(x_THK.shape)
        half, block = angles.cos_TR.shape[1], 1 << (width - 1).bit_length()
        self._functions.turned[tokens, -(-heads // HEADS)](
            x_THK, angles.cos_TR, angles.sin_TR, out_THK, x_THK.stride(0), heads, half, float(direction), width, H=HEADS, K=block
        )
        return out_THK

    def nf4_decode(self, codes: Tensor, scales: Tensor, block: int, out: Tensor) -> None:
        self._decode(codes, scales, scales, scales, scales, block, out, nested=False)

    def nf4_decode_nested(
        self, codes: Tensor, scale_codes: Tensor, map_256: Tensor, group_scales: Tensor, offset: Tensor, block: int, out: Tensor
    ) -> None:
        self._decode(codes, scale_codes, map_256, group_scales, offset, block, out, nested=True)

    def _decode(
        self, codes: Tensor, scales: Tensor, map_256: Tensor, groups: Tensor, offset: Tensor, block: int, out: Tensor, nested: bool
    ) -> None:
        if out.device not in self._tables:
            self._tables[out.device] = torch.tensor(NF4, device=out.device)
        # Without contraction of products and sums, for the bits of the reference.
        self._functions.nf4_decode[-(-out.numel() // DECODED),](
            codes, scales, self._tables[out.device], map_256, groups, offset, out, out.numel(),
            block=block, group=GROUP, NESTED=nested, BLOCK=DECODED, enable_fp_fusion=False,
        )  # fmt: skip

    def int8_decode(self, codes_OI: Tensor, absmax_O: Tensor, out: Tensor) -> None:
        self._functions.int8_decode[_pieces(out)](codes_OI, absmax_O, out, out.shape[1], BY_127, BLOCK=PIECE)


def _one_block(width: int) -> tuple[int, int]:
    """Return the block that holds a row of this width, and how many warps work on it."""
    block = 1 << (width - 1).bit_length()
    return block, 4 if block <= 2048 else 8


def _pieces(x_TD: Tensor) -> tuple[int, int]:
    return x_TD.shape[0], -(-x_TD.shape[1] // PIECE)
