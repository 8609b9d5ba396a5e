"""The tensors in a base's files, read one at a time and in pieces, so that loading needs little more memory than what is loaded.

Files are read, not mapped: a mapped file's pages count as the process's own, and a file changed under a run would change the base.
Next: `quantised.py` (what bitsandbytes' codes become), `load.py` (who reads).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kivnun.errors import BaseModelError
from kivnun.model.families import NF4_STATE, STATE_OF_CODES, read_header, weight_files
from kivnun.model.kernels.reference import GROUP, NF4
from kivnun.model.quantised import DecodeBuffer, Int8Matrix, NestedScales, Nf4Matrix, QuantisedMatrix

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
PIECE = 1 << 20  # elements read at once: small beside a base, large beside what a call costs


class Scratch:
    """Memory for a piece, kept from one to the next: what is taken and given back between tensors that stay leaves holes that a
    process may never fill again."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def room(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return memory for `count` elements, the same as was returned before."""
        needed = count * dtype.itemsize
        if len(self._bytes) < needed:
            self._bytes = torch.empty(max(needed, PIECE * 4), dtype=torch.uint8)
        return self._bytes[:needed].view(dtype)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in one file."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: torch.Size
    start: int
    scratch: Scratch

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor, converted piece by piece where another dtype is asked for."""
        out = torch.empty(self.shape, dtype=dtype or self.dtype)
        flat = out.view(-1)
        if out.dtype == self.dtype:
            self._fill(flat, 0)
            return out
        at = 0
        for piece in self.pieces():
            flat[at : at + len(piece)] = piece
            at += len(piece)
        return out

    def pieces(self, multiple: int = 1) -> Iterator[Tensor]:
        """Yield the flattened tensor in pieces, each but the last a multiple of `multiple` long, and valid until the next piece of
        any tensor of the folder."""
        count = self.shape.numel()
        step = max(multiple, PIECE // multiple * multiple)
        memory = self.scratch.room(min(step, count), self.dtype)
        for at in range(0, count, step):
            piece = memory[: min(step, count - at)]
            self._fill(piece, at)
            yield piece

    def _fill(self, flat: Tensor, at: int) -> None:
        """Read into contiguous memory from element `at` on."""
        view = flat.view(torch.uint8).numpy().data
        done = 0
        try:
            with self.file.open("rb", buffering=0) as stream:
                stream.seek(self.start + at * self.dtype.itemsize)
                while done < len(view):
                    read = stream.readinto(view[done:])
                    if not read:
                        raise BaseModelError(f"{self.file} ends within {self.name}", hint="download the model again")
                    done += read
        except OSError as error:
            raise BaseModelError(f"{self.file} cannot be read: {error}", hint="download the model again") from error


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a folder's safetensors files by name. Raises BaseModelError when a file is not one."""
    scratch = Scratch()
    return {name: tensor for file in weight_files(folder) for name, tensor in _tensors_of(file, scratch)}


def _tensors_of(file: Path, scratch: Scratch) -> Iterator[tuple[str, StoredTensor]]:
    with file.open("rb") as stream:
        after_header = 8 + int.from_bytes(stream.read(8), "little")
    for name, entry in read_header(file).items():
        dtype, shape, (start, end) = TYPES.get(entry["dtype"]), torch.Size(entry["shape"]), entry["data_offsets"]
        if dtype is None or end - start != shape.numel() * dtype.itemsize:
            raise BaseModelError(
                f"{file}: {name} is stored as {entry['dtype']} {entry['shape']}, which cannot be read",
                hint="use a model stored in fp32, bf16 or fp16, or by bitsandbytes",
            )
        yield name, StoredTensor(file, name, dtype, shape, after_header + start, scratch)


@dataclass(frozen=True, slots=True)
class StoredCodes:
    """A weight that bitsandbytes has quantised: `open` makes a matrix of its codes as they are."""

    name: str
    tensors: Mapping[str, StoredTensor]
    state: Mapping[str, Any] | None

    @property
    def shape(self) -> torch.Size:
        return self.tensors[self.name].shape if self.state is None else torch.Size(self.state["shape"])

    def open(self, buffer: DecodeBuffer) -> QuantisedMatrix:
        """Return the matrix. Raises BaseModelError where the codes are not ones that bitsandbytes writes."""
        codes = self.tensors[self.name].read()
        try:
            if self.state is None:
                return self._int8(codes, buffer)
            return self._nf4(codes.view(-1).view(torch.uint8), self.state, buffer)
        except KeyError as error:
            raise self._refusal(f"lacks {error}") from error

    def _int8(self, codes_OI: Tensor, buffer: DecodeBuffer) -> Int8Matrix:
        absmax_O = self.tensors[f"{self.name.removesuffix('weight')}SCB"].read(torch.float32)
        if codes_OI.dtype != torch.int8 or absmax_O.shape != codes_OI.shape[:1]:
            raise self._refusal(f"holds {codes_OI.dtype} {tuple(codes_OI.shape)} with scales {tuple(absmax_O.shape)}")
        return Int8Matrix(self.shape, codes_OI, absmax_O, buffer)

    def _nf4(self, codes: Tensor, state: Mapping[str, Any], buffer: DecodeBuffer) -> Nf4Matrix:
        block, absmax = state["blocksize"], self._part("absmax")
        blocks = math.ceil(self.shape.numel() / block)
        scales: Tensor | NestedScales = absmax
        if absmax.dtype == torch.uint8:
            if state["nested_blocksize"] != GROUP:
                raise self._refusal(f"groups its scales by {state['nested_blocksize']} instead of {GROUP}")
            offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
            scales = NestedScales(absmax, self._part("nested_quant_map"), self._part("nested_absmax"), offset)
        if len(absmax) != blocks or len(codes) != math.ceil(self.shape.numel() / 2) or block % 2:
            raise self._refusal(f"holds {len(codes)} bytes of codes and {len(absmax)} scales for {tuple(self.shape)}")
        if not torch.equal(self._part("quant_map"), torch.tensor(NF4)):
            raise self._refusal("has another table than NF4's")
        return Nf4Matrix(self.shape, codes, scales, buffer, block)

    def _part(self, name: str) -> Tensor:
        return self.tensors[f"{self.name}.{name}"].read()

    def _refusal(self, what: str) -> BaseModelError:
        return BaseModelError(
            f"{self.tensors[self.name].file}: {self.name} {what}", hint="quantise the model again with bitsandbytes"
        )


def split_codes(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], dict[str, StoredCodes]]:
    """Return the plain tensors, and the weights that stand as bitsandbytes' codes, each by name."""
    codes: dict[str, StoredCodes] = {}
    for name, tensor in tensors.items():
        if name.endswith(NF4_STATE):
            weight = name.removesuffix(NF4_STATE)
            codes[weight] = StoredCodes(weight, tensors, json.loads(bytes(tensor.read().tolist())))
        elif name.endswith(".SCB"):
            weight = f"{name.removesuffix('SCB')}weight"
            codes[weight] = StoredCodes(weight, tensors, None)
    plain = {
        name: tensor for name, tensor in tensors.items() if name not in codes and not any(mark in name for mark in STATE_OF_CODES)
    }
    return plain, codes
