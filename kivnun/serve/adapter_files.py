"""What an adapter's folder must be before any of it becomes tensors: its header is read as text, and checked, first.

safetensors alone is ever loaded. The header's length is capped, every tensor lies inside the file and nothing over another, types
and sizes are those of weights; then names, shapes and rank are checked against the base (`model/adapter_folder.py`), and every
number is finite. Next: `resident.py` (who loads).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from kivnun.errors import IntegrityError
from kivnun.model.adapter_folder import load_peft
from kivnun.model.adapters import Adapter, read_peft_config
from kivnun.model.load import Base

MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_RANK = 1024
SIZES = {"F32": 4, "F16": 2, "BF16": 2}
HINT = "train the model again, or restore the store from a copy"


def load_adapter(base: Base, folder: Path) -> tuple[Adapter, int]:
    """Return the adapter in a folder, on this base, and how many bytes it takes. Raises IntegrityError."""
    config = folder / "adapter_config.json"
    if not config.is_file() or config.stat().st_size > MAX_CONFIG_BYTES:
        raise _refused(f"it has no adapter_config.json of at most {MAX_CONFIG_BYTES} bytes")
    check_safetensors(folder / "adapter_model.safetensors")
    rank = read_peft_config(folder).get("r", 1)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise _refused(f"its rank is not a number from 1 to {MAX_RANK}")
    try:
        adapter = load_peft(base, folder)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError, RuntimeError) as error:
        if isinstance(error, IntegrityError):
            raise
        raise _refused(f"it does not load ({type(error).__name__})") from None
    tensors = adapter.parameters()
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise _refused(f"{name} holds numbers that are not finite")
    return adapter, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def check_safetensors(path: Path) -> None:
    """Raise IntegrityError for a file that is not, to the byte, a safetensors file of plain weights."""
    size = path.stat().st_size if path.is_file() else 0
    with path.open("rb") if size >= 8 else _absent() as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise _refused("its header's length is not one")
        raw = stream.read(length)
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise _refused("its header is no JSON") from None
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise _refused("its header is no list of tensors")
    header.pop("__metadata__", None)
    spans = sorted(_span(entry) for entry in header.values())
    ends = [0, *(end for _, end in spans)]
    if [start for start, _ in spans] != ends[:-1] or ends[-1] != size - 8 - length:
        raise _refused("its tensors leave gaps, lie over one another or beyond its end")


def _span(entry: Any) -> tuple[int, int]:
    """Return where a tensor lies, having checked that it takes as many bytes as its shape says."""
    try:
        kind, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(
            isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 1 << 40 for number in (*shape, start, end)
        )
        if whole and len(shape) <= 4 and kind in SIZES and end - start == math.prod(shape) * SIZES[kind]:
            return start, end
    except (KeyError, TypeError, ValueError):
        pass
    raise _refused("one of its tensors is not described as weights are")


def _absent() -> Any:
    raise _refused("it has no adapter_model.safetensors")


def _refused(why: str) -> IntegrityError:
    return IntegrityError(f"an adapter cannot be used: {why}", hint=HINT)
