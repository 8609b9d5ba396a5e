"""What DPO holds the tuned model to: how likely the model found each reply before it was trained. Computed once, kept in the run.

Next: `objectives.py` (what is done with it).
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch

from kivnun.artifacts import atomic_write
from kivnun.data.packing import micro_batches, pack
from kivnun.data.rows import PreferencePair
from kivnun.spec import ComputeSpec
from kivnun.train.engine import FixedModel
from kivnun.train.objectives import row_sums

PAIRS_AT_ONCE = 8_192  # held in memory: all that begin alike among so many are computed together


def reference_sums(
    model: FixedModel, pairs: Sequence[PreferencePair], key: str, cache: Path, compute: ComputeSpec, writes: bool
) -> dict[int, tuple[float, float]]:
    """Return the summed log-probabilities (chosen, rejected) of each pair, by the chosen row's number.

    Pairs are packed as they are in training, so that a policy that has not moved is as likely as the reference.
    """
    kept = _read(cache, key)
    if kept is not None:
        return kept
    sums: dict[int, tuple[float, float]] = {}
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        some = pairs[start : start + PAIRS_AT_ONCE]
        for part in micro_batches(some, cast(int, compute.micro_batch_tokens), compute.share_prefixes):
            batch = pack(part, compute.share_prefixes)
            both = row_sums(torch.from_numpy(model.forward(batch)), batch).view(-1, 2).tolist()
            sums.update(zip(batch.rows[::2], map(tuple, both), strict=True))
    if not writes:
        return sums
    stream = io.BytesIO()
    np.savez(stream, key=np.array(key), rows=np.array(list(sums)), sums=np.array(list(sums.values())))
    atomic_write(cache, stream.getvalue())
    return sums


def _read(cache: Path, key: str) -> dict[int, tuple[float, float]] | None:
    """Return what `cache` holds, or None where it is absent, damaged or of other rows or another base: it is made again then."""
    try:
        with np.load(io.BytesIO(cache.read_bytes())) as kept:
            if str(kept["key"]) != key:
                return None
            return dict(zip(kept["rows"].tolist(), map(tuple, kept["sums"].tolist()), strict=True))
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile):
        return None
