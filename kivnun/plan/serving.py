"""What an inference worker takes of a device's memory: its base, and beside it what answers in progress and adapters may take.

Nothing is loaded for it, and no torch. The base is counted as for a run (`memory.py`); the cache of keys and values is bounded by
what is left. Next: `../serve/resident.py` (who keeps to it), `../service/room.py` (which bases are loaded side by side).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kivnun.errors import BaseModelError
from kivnun.model.families import count_parameters, stored_precision
from kivnun.plan.bases import BaseFiles
from kivnun.plan.devices import CONTEXT_BYTES, Device
from kivnun.plan.memory import ALLOCATOR, CHUNK, COMPUTE_BYTES, WORD_BYTES, Shape, process_memory, weight_bytes
from kivnun.plan.sizes import Sizes
from kivnun.spec.adapters import LoraSpec
from kivnun.spec.resolve import SMALL_BASE

PREFILL_TOKENS = 2048  # of a pass
MOST_TOKENS, MOST_ADAPTER_BYTES = 1 << 18, 8 << 30
CACHE_SHARE, ADAPTER_SHARE = 1 / 4, 1 / 16  # of what the base leaves
GROWTH = 2  # a row's buffers are doubled when they are full (`model/attention.py`)


@dataclass(frozen=True, slots=True)
class Serving:
    """What a base takes in bytes: `base_bytes` with its process and the work of a pass, `token_bytes` for each cached token."""

    base_bytes: float
    token_bytes: float

    def held_tokens(self, memory_bytes: float) -> int:
        """Return how many tokens may be cached where a worker may take so much; one pass of them at least."""
        room = CACHE_SHARE * (memory_bytes - self.base_bytes)
        return min(MOST_TOKENS, max(PREFILL_TOKENS, int(room / (GROWTH * self.token_bytes))))

    def adapter_bytes(self, memory_bytes: float) -> int:
        """Return how much adapters in memory may take."""
        return min(MOST_ADAPTER_BYTES, max(0, int(ADAPTER_SHARE * (memory_bytes - self.base_bytes))))

    def total_bytes(self, memory_bytes: float) -> float:
        """Return the most that a worker takes which may take so much: more than that only where its base alone does."""
        cache = self.held_tokens(memory_bytes) * GROWTH * self.token_bytes
        return self.base_bytes + cache + self.adapter_bytes(memory_bytes)


def serving_of(config: Mapping[str, object], name: str, precision: str, kind: str, numbers: int | None = None) -> Serving:
    """Return what a base of this configuration takes on a device of this kind. `numbers` is how many weights its files hold.

    Raises BaseModelError where neither is known."""
    try:
        sizes = Sizes.of(config, name)
    except BaseModelError:
        if numbers is None:
            raise
        sizes = Sizes.of({**config, "model_type": "llama"}, name)  # the widths alone are right of a family that is not known
    number = COMPUTE_BYTES[precision]
    shape = Shape(precision, PREFILL_TOKENS, "cuda" if kind == "cuda" else "cpu")
    weights = weight_bytes(sizes.linear_numbers, sizes.outer_numbers, precision)
    if numbers is not None:
        weights = max(weights * numbers / sizes.numbers, 0.0)
    process = process_memory(sizes, LoraSpec(), shape, rows=1)
    stream = 4 * sizes.hidden + sizes.queries + 2 * sizes.keys + 2 * sizes.mlp
    work = ALLOCATOR + number * PREFILL_TOKENS * stream + WORD_BYTES * sizes.vocab * CHUNK
    rest = CONTEXT_BYTES if kind == "cuda" else process.rest
    return Serving(weights + rest + max(work, process.loading), 2.0 * sizes.layers * sizes.keys * number)


def served_precision(asked: str, folder: Path | None, numbers: int, kind: str) -> str:
    """Return the precision that a configured base is served in, as a run resolves it (`spec/resolve.py`)."""
    if asked != "auto":
        return asked
    stored = None if folder is None else stored_precision(folder)
    return stored or ("fp32" if kind == "cpu" and numbers < SMALL_BASE else "bf16")


def serving_of_files(files: BaseFiles, asked: str, device: Device) -> Serving:
    """Return what a configured base takes, whether its weights are here already or not. Raises BaseModelError."""
    numbers = _stored_numbers(files.folder)
    known = numbers if numbers is not None else Sizes.of(files.config, files.name).numbers
    precision = served_precision(asked, files.folder, known, device.kind)
    return serving_of(files.config, files.name, precision, device.kind, numbers)


def _stored_numbers(folder: Path | None) -> int | None:
    try:
        return None if folder is None else count_parameters(folder)
    except BaseModelError:  # its tokenizer alone is here
        return None
