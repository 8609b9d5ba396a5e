"""Token rows packed end to end, without padding: the only form in which the engine sees data.

Shapes: T tokens of the pack, S supervised positions of the pack. Boundaries are lengths that travel with the batch; nothing infers
them from position ids. A row is never split, a preference pair never spread over two packs. With shared prefixes, rows lie as
branches of trees, and what rows of a pack begin with is there once.
Next: `prefixes.py` (the branches), `order.py` (which rows make a step), `train/engine.py` (what is done with a pack).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kivnun.data.prefixes import PrefixTree
from kivnun.data.rows import Trainable, Where


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Rows laid end to end, as branches: a branch is a whole row, or a part that goes on from another branch.

    `ids_T`, `positions_T` int64 [T]. Of branch i: `lengths[i]` tokens; `parents[i]` is the branch it goes on from, -1 for none;
    `owners[i]` the number of the first row through it. Of row i: `rows[i]` is its number in the data set, `where[i]` its origin.
    For supervised position s: `select_S[s]` is the index in T whose hidden state predicts it, `targets_S[s]` the token to
    predict, `weights_S[s]` (float32) its weight, `segment_S[s]` the index i of its row. Positions of weight 0 are left out.
    """

    ids_T: np.ndarray
    positions_T: np.ndarray
    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    owners: tuple[int, ...]
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


def pack(items: Sequence[Trainable], share_prefixes: bool = False) -> PackedBatch:
    """Return rows as one pack; of preference pairs, segments 2i and 2i + 1 are the chosen and the rejected reply of pair i.

    The prediction of a row's first token is never supervised (`TokenRow.weights[0]` is 0).
    """
    rows = [row for item in items for row in item.sides]
    assert all(row.weights[0] == 0 for row in rows)  # else it would be predicted from the row before
    tree = PrefixTree(share_prefixes)
    for row in rows:
        tree.add(row)
    laid = list(tree.branches())
    branches = [branch for branch, _ in laid]
    lengths = tuple(len(branch.ids) for branch in branches)
    places = dict(zip(map(id, branches), itertools.accumulate(lengths[:-1], initial=0), strict=True))
    supervised = [np.flatnonzero(row.weights) for row in rows]
    # Token t is predicted by the state at t - 1, which is in the row's own branch.
    states = [places[id(own)] + at - 1 - own.start for own, at in zip(tree.own(), supervised, strict=True)]
    return PackedBatch(
        ids_T=np.concatenate([branch.ids for branch in branches]).astype(np.int64),
        positions_T=np.concatenate([np.arange(b.start, b.start + len(b.ids)) for b in branches]).astype(np.int64),
        lengths=lengths,
        parents=tuple(parent for _, parent in laid),
        owners=tuple(branch.row for branch in branches),
        rows=tuple(row.row for row in rows),
        where=tuple(row.where for row in rows),
        select_S=np.concatenate(states).astype(np.int64),
        targets_S=np.concatenate([row.ids[at] for row, at in zip(rows, supervised, strict=True)]).astype(np.int64),
        weights_S=np.concatenate([row.weights[at] for row, at in zip(rows, supervised, strict=True)]).astype(np.float32),
        segment_S=np.repeat(np.arange(len(rows)), [len(at) for at in supervised]).astype(np.int64),
    )


def micro_batches(items: Sequence[Trainable], micro_batch_tokens: int, share_prefixes: bool = False) -> list[list[Trainable]]:
    """Return the items, cut into runs that come to at most `micro_batch_tokens` tokens once they are packed.

    They keep their order; with `share_prefixes` those that begin alike stand together. An item longer than the budget gets a run of
    its own: the budget bounds memory, it never drops or splits a row.
    """
    runs: list[list[Trainable]] = []
    tree = PrefixTree(share_prefixes)
    for item in sorted(items, key=_beginning) if share_prefixes else items:
        _add(tree, item)
        if not runs or tree.num_tokens > micro_batch_tokens:
            runs.append([])
            tree = PrefixTree(share_prefixes)
            _add(tree, item)
        runs[-1].append(item)
    return runs


def _add(tree: PrefixTree, item: Trainable) -> None:
    for row in item.sides:
        tree.add(row)


def _beginning(item: Trainable) -> bytes:
    return item.sides[0].ids.astype(">u4").tobytes()
