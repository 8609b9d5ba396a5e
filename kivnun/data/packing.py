"""Token rows packed end to end, without padding: the only form in which the engine sees data.

Shapes: T tokens of the pack, S supervised positions of the pack. Row boundaries are cumulative lengths that travel with the
batch; nothing infers them from position ids. A row is never split, a preference pair never spread over two packs.
Next: `order.py` (which rows make a step), `train/engine.py` (what is done with a pack).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kivnun.data.rows import PreferencePair, TokenRow, Trainable, Where


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Rows laid end to end.

    `ids_T`, `positions_T` int64 [T]; `lengths[i]` tokens of row i; `rows[i]` its number in the data set; `where[i]` its origin.
    For supervised position s: `select_S[s]` is the index in T whose hidden state predicts it, `targets_S[s]` the token to
    predict, `weights_S[s]` (float32) its weight, `segment_S[s]` the index i of its row. Positions of weight 0 are left out.
    """

    ids_T: np.ndarray
    positions_T: np.ndarray
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    where: tuple[Where, ...]
    select_S: np.ndarray
    targets_S: np.ndarray
    weights_S: np.ndarray
    segment_S: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.ids_T)

    @property
    def total_weight(self) -> float:
        return float(self.weights_S.sum(dtype=np.float64))


def pack(rows: Sequence[TokenRow]) -> PackedBatch:
    """Return the rows as one pack. The prediction of a row's first token is never supervised (`TokenRow.weights[0]` is 0)."""
    assert all(row.weights[0] == 0 for row in rows)  # else it would be predicted from the row before
    lengths = tuple(row.length for row in rows)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    supervised = [np.flatnonzero(row.weights) for row in rows]
    return PackedBatch(
        ids_T=np.concatenate([row.ids for row in rows]).astype(np.int64),
        positions_T=np.concatenate([np.arange(length) for length in lengths]).astype(np.int64),
        lengths=lengths,
        rows=tuple(row.row for row in rows),
        where=tuple(row.where for row in rows),
        # Token t is predicted by the hidden state at t - 1 of the same row.
        select_S=np.concatenate([start + at - 1 for start, at in zip(starts, supervised, strict=True)]).astype(np.int64),
        targets_S=np.concatenate([row.ids[at] for row, at in zip(rows, supervised, strict=True)]).astype(np.int64),
        weights_S=np.concatenate([row.weights[at] for row, at in zip(rows, supervised, strict=True)]).astype(np.float32),
        segment_S=np.repeat(np.arange(len(rows)), [len(at) for at in supervised]).astype(np.int64),
    )


def pack_pairs(pairs: Sequence[PreferencePair]) -> PackedBatch:
    """Return preference pairs as one pack: segments 2i and 2i + 1 are the chosen and the rejected reply of pair i."""
    return pack([row for pair in pairs for row in (pair.chosen, pair.rejected)])


def micro_batches(items: Sequence[Trainable], micro_batch_tokens: int) -> list[list[Trainable]]:
    """Return the items in their order, cut into runs of at most `micro_batch_tokens` tokens.

    An item longer than the budget gets a run of its own: the budget bounds memory, it never drops or splits a row.
    """
    runs: list[list[Trainable]] = []
    room = 0
    for item in items:
        if not runs or item.length > room:
            runs.append([])
            room = micro_batch_tokens
        runs[-1].append(item)
        room -= item.length
    return runs
