"""The one source of randomness: every draw is a pure function of what it is for.

A draw is keyed by (seed, purpose, counters...), for example (7, "order", epoch) or (7, "init", "model.layers.0.mlp.down_proj").
There is no global generator: evaluation takes nothing from training, and a resumed run draws what the uninterrupted one drew.
The generator is Philox 4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), keyed by BLAKE2b of the key.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np


def key_128(seed: int, purpose: str, *counters: int | str) -> int:
    """Return the 128-bit key for a draw. Different (seed, purpose, counters) give independent keys."""
    text = json.dumps([seed, purpose, *counters], ensure_ascii=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(seed: int, purpose: str, *counters: int | str) -> np.random.Generator:
    """Return a fresh generator for one purpose; the same arguments always give the same stream."""
    return np.random.Generator(np.random.Philox(key=key_128(seed, purpose, *counters)))


def permutation(count: int, seed: int, purpose: str, *counters: int | str) -> np.ndarray:
    """Return a permutation of range(count) (int64), a pure function of the arguments."""
    return generator(seed, purpose, *counters).permutation(count)
