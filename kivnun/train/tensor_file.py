"""A safetensors file written piece by piece: no more of it is in memory than one piece.

The bytes are those that safetensors' own `save_file` writes for the same float32 tensors. Next: `deepspeed_engine.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

ALIGNMENT = 8


class TensorFile:
    """Float32 tensors of known shapes, whose values are given in the order of their names."""

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
        self._path, self._shapes = path, dict(sorted(shapes.items()))

    @property
    def names(self) -> list[str]:
        """Return the names in the order in which the values must come."""
        return list(self._shapes)

    def write(self, pieces: Iterable[Tensor]) -> None:
        """Write all values, flattened float32 pieces on the CPU, one name after the other."""
        with self._path.open("wb") as file:
            size = self._write_header(file)
            for piece in pieces:
                size -= file.write(piece.contiguous().numpy().tobytes())
        assert size == 0, f"{self._path}: {size} bytes were not given"

    def _write_header(self, file: BinaryIO) -> int:
        header, at = {}, 0
        for name, shape in self._shapes.items():
            size = 4
            for length in shape:
                size *= length
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        file.write(len(text).to_bytes(8, "little") + text)
        return at
