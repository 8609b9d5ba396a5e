"""Frozen weight matrices of 4 and 8 bits, and the one buffer of a base into which they are decoded.

Products are taken with the decoded matrix, decoded again in the backward pass: activations are never quantised, and beside the
codes only the largest matrix of a base is ever held. NF4 is bitsandbytes' own, to the bit: codes, scales and values.
Shapes: O outputs, I inputs. Next: `kernels/reference.py` (what is decoded and how), `load.py` (who makes these), `linear.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kivnun.model.kernels.reference import GROUP

BLOCK = 64
GROUPS_AT_ONCE = 128  # as many scales as torch leaves to one thread: more threads would wait for each other more than they work
ROWS_AT_ONCE = 64  # rows that int8 encodes at once: what is made on the way stays small
# Codes are kept as bit patterns of this type. Tools that shard a model (FSDP, ZeRO) split floating parameters only, and copy bits;
# it is the type a quantised base computes in, so that a cast of the whole model to that type leaves codes alone.
CARRIER = torch.bfloat16


class Kernels(Protocol):
    """Those kernels of `kernels/reference.py` that know 4 and 8 bits."""

    def nf4_encode(self, values_N: Tensor, block: int, codes: Tensor, scales: Tensor) -> None: ...

    def nf4_decode(self, codes: Tensor, scales: Tensor, block: int, out: Tensor) -> None: ...

    def nf4_decode_nested(
        self, codes: Tensor, scale_codes: Tensor, map_256: Tensor, group_scales: Tensor, offset: Tensor, block: int, out: Tensor
    ) -> None: ...

    def int8_decode(self, codes_OI: Tensor, absmax_O: Tensor, out: Tensor) -> None: ...


class DecodeBuffer:
    """Memory for one decoded matrix at a time, grown to the largest; all matrices of a base share it. Not for several threads."""

    def __init__(self, dtype: torch.dtype, kernels: Kernels) -> None:
        self.dtype, self.kernels = dtype, kernels  # the kernels of the device that the matrices are on
        self._memory = torch.empty(0, dtype=dtype)

    def filled(self, shape: torch.Size, device: torch.device, fill: Callable[[Tensor], None]) -> Tensor:
        """Return memory of this shape that `fill` has written, valid until the next call.

        Autograd is told of the writing: a backward pass that would read what has since been overwritten raises instead.
        """
        size = shape.numel()
        if self._memory.numel() < size or self._memory.device != device:
            with torch.inference_mode(False):  # memory made in inference mode could serve no training afterwards
                self._memory = torch.empty(size, dtype=self.dtype, device=device)
        out = self._memory[:size].view(shape)
        fill(out)
        torch.autograd.graph.increment_version(out)
        return out


class FrozenMatrix(nn.Module):
    """What both forms share: state that keeps its types, whatever the model around it is cast to."""

    def __init__(self, shape: torch.Size, buffer: DecodeBuffer) -> None:
        super().__init__()
        self.shape, self.buffer = shape, buffer

    def _keep(self, name: str, values: Tensor) -> None:
        """Register float values, or the bytes of codes as floats, as a parameter that is never trained."""
        floats = values if values.dtype == torch.float32 else _carried(values)
        self.register_parameter(name, nn.Parameter(floats, requires_grad=False))

    def _kept(self, name: str) -> Tensor:
        """Return what was registered under this name: a parameter, or what a sharding engine has made of it."""
        return getattr(self, name)

    def _codes(self, name: str, dtype: torch.dtype, count: int) -> Tensor:
        """Return `count` codes of a byte each out of the parameter that carries them."""
        return self._kept(name).view(dtype)[:count]

    def _apply(self, fn, recurse: bool = True):  # torch's own signature
        def moved_only(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(moved_only, recurse)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}"


@dataclass(frozen=True, slots=True)
class NestedScales:
    """Scales in 8 bits: `map_256[codes]` times the scale of their group of 256, plus an offset (QLoRA's double quantisation)."""

    codes: Tensor
    map_256: Tensor
    group_scales: Tensor
    offset: Tensor


class Nf4Matrix(FrozenMatrix):
    """A matrix [O, I] in NF4: two codes a byte, the first in the high half; one scale per block of the flattened matrix.

    `codes` and, with double quantisation, `scale_codes` carry bytes (see CARRIER); `scales`, or `group_scales`, `scale_offset` and
    `scale_map`, are float32.
    """

    def __init__(
        self, shape: torch.Size, codes: Tensor, scales: Tensor | NestedScales, buffer: DecodeBuffer, block: int = BLOCK
    ) -> None:
        super().__init__(shape, buffer)
        self.block, self.nested = block, isinstance(scales, NestedScales)
        self._keep("codes", codes)
        if isinstance(scales, NestedScales):
            self._keep("scale_codes", scales.codes)
            self._keep("group_scales", scales.group_scales)
            self._keep("scale_offset", scales.offset)
            self._keep("scale_map", scales.map_256)
        else:
            self._keep("scales", scales)

    @classmethod
    def quantise(cls, pieces: Iterable[Tensor], shape: torch.Size, buffer: DecodeBuffer) -> Nf4Matrix:
        """Return the matrix whose flattened values come in `pieces`, each but the last a multiple of BLOCK long.

        Codes and scales are those of bitsandbytes' `quantize_4bit(..., quant_type="nf4", compress_statistics=True)` on a CPU. The
        offset is a float32 mean, whose last bit may depend on torch's number of threads; so it does there.
        """
        size, at = shape.numel(), 0
        # What stays is made before what does not: holes between would stay with the process for good.
        codes, nested = torch.empty(-(-size // 2), dtype=torch.uint8), _room_for(-(-size // BLOCK))
        scales = torch.empty(-(-size // BLOCK))
        for piece in pieces:
            half, block, end = at // 2, at // BLOCK, at + len(piece)
            buffer.kernels.nf4_encode(piece, BLOCK, codes[half : -(-end // 2)], scales[block : -(-end // BLOCK)])
            at = end
        _nest(scales, nested)
        return cls(shape, codes, nested, buffer)

    def dense(self) -> Tensor:
        """Return the values [O, I] in the buffer's type, valid until the next `dense` of any matrix of the base."""
        return self.buffer.filled(self.shape, self._kept("codes").device, self._decode)

    def _decode(self, out: Tensor) -> None:
        size, kernels = self.shape.numel(), self.buffer.kernels
        codes = self._codes("codes", torch.uint8, -(-size // 2))
        if not self.nested:
            kernels.nf4_decode(codes, self._kept("scales"), self.block, out)
            return
        scale_codes = self._codes("scale_codes", torch.uint8, -(-size // self.block))
        scale_map, group_scales, offset = (self._kept(name) for name in ("scale_map", "group_scales", "scale_offset"))
        kernels.nf4_decode_nested(codes, scale_codes, scale_map, group_scales, offset, self.block, out)


class Int8Matrix(FrozenMatrix):
    """A matrix [O, I] of whole numbers from -127 to 127 with one scale per row, as bitsandbytes' LLM.int8() stores weights.

    Only the storage is theirs: inputs are not quantised and no column is treated apart, so products have the base's precision.
    `codes` carries bytes (see CARRIER); `row_absmax` is float32.
    """

    def __init__(self, shape: torch.Size, codes_OI: Tensor, row_absmax: Tensor, buffer: DecodeBuffer) -> None:
        super().__init__(shape, buffer)
        self._keep("codes", codes_OI.flatten())
        self._keep("row_absmax", row_absmax)

    @classmethod
    def quantise(cls, pieces: Iterable[Tensor], shape: torch.Size, buffer: DecodeBuffer) -> Int8Matrix:
        """Return the matrix whose rows come in `pieces`, flattened, some whole rows each.

        Codes and scales are those of bitsandbytes' `int8_vectorwise_quant` of the same values (its 8-bit models round to float16
        first, which is not done here).
        """
        codes_OI, absmax_O, row = torch.empty(shape, dtype=torch.int8), torch.empty(shape[0]), 0
        for piece in pieces:
            for part_RI in piece.view(-1, shape[1]).split(ROWS_AT_ONCE):
                values_RI = part_RI.float()
                rows = slice(row, row := row + len(values_RI))
                absmax_O[rows] = values_RI.abs().amax(1)
                scale_R = torch.where(absmax_O[rows] > 0, 127.0 / absmax_O[rows], 0.0)
                codes_OI[rows] = torch.round(values_RI * scale_R[:, None]).to(torch.int8)
        return cls(shape, codes_OI, absmax_O, buffer)

    def dense(self) -> Tensor:
        """Return the values [O, I] in the buffer's type, valid until the next `dense` of any matrix of the base."""
        return self.buffer.filled(self.shape, self._kept("codes").device, self._decode)

    def _decode(self, out: Tensor) -> None:
        codes_OI = self._codes("codes", torch.int8, self.shape.numel()).view(self.shape)
        self.buffer.kernels.int8_decode(codes_OI, self._kept("row_absmax"), out)


QuantisedMatrix = Nf4Matrix | Int8Matrix
FORMS: dict[str, type[Nf4Matrix] | type[Int8Matrix]] = {"nf4": Nf4Matrix, "int8": Int8Matrix}


def _carried(codes: Tensor) -> Tensor:
    """Return bytes as CARRIER, with a last one added where their number is odd."""
    flat = codes.contiguous().view(torch.uint8).flatten()
    return (torch.cat([flat, flat.new_zeros(1)]) if len(flat) % 2 else flat).view(CARRIER)


def nested_scales(scales: Tensor) -> NestedScales:
    """Return scales in 8 bits, as bitsandbytes' `quantize_blockwise` has them on a CPU (0.50, blocks of 256, dynamic map)."""
    nested = _room_for(len(scales))
    _nest(scales, nested)
    return nested


def _room_for(count: int) -> NestedScales:
    codes, group_scales = torch.empty(count, dtype=torch.uint8), torch.empty(-(-count // GROUP))
    return NestedScales(codes, dynamic_map(), group_scales, torch.empty(()))


def _nest(scales: Tensor, nested: NestedScales) -> None:
    """Write scales as codes. The nearest of 256 values is looked for not from the scaled value but from the nearest of 65536 points
    between -1 and 1, as bitsandbytes does on a CPU."""
    nested.offset.copy_(scales.mean())
    between = (nested.map_256[:-1] + nested.map_256[1:]) / 2
    for first in range(0, len(nested.group_scales), GROUPS_AT_ONCE):
        here = slice(first * GROUP, (first + GROUPS_AT_ONCE) * GROUP)
        around = scales[here] - nested.offset
        rows_G = F.pad(around, (0, -len(around) % GROUP)).view(-1, GROUP)
        highest = rows_G.abs().amax(1)
        inverse = torch.where(highest > 0, 1 / highest, 0.0)
        points = ((((rows_G * inverse[:, None]).clamp(-1, 1) + 1) * 0.5) * 65535 + 0.5).to(torch.int32)
        codes = torch.bucketize(points * 2 / 65535 - 1, between, out_int32=True).masked_fill_((highest == 0)[:, None], 0)
        nested.group_scales[first : first + GROUPS_AT_ONCE] = highest
        nested.codes[here] = codes.view(-1)[: len(around)]


@functools.cache
def dynamic_map() -> Tensor:
    """Return the 256 values of bitsandbytes' signed dynamic map: for each of 7 exponents, means of even steps from 0.1 to 1
    (Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning", section 2.1)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        steps = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (10 ** (exponent - 6)) * ((steps[:-1] + steps[1:]) / 2)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def pieces_of(matrix_OI: Tensor, rows: int = BLOCK) -> Iterator[Tensor]:
    """Yield a matrix in flattened pieces of some rows, as `quantise` takes them."""
    for part in matrix_OI.split(rows):
        yield part.flatten()
