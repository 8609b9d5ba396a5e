"""Rows that begin alike, laid out so that what they share is there once: a tree of branches (a trie, Fredkin 1960).

A branch is a run of tokens; a row is the branches from a root down to one of its own. In a causal model the states of a prompt do
not depend on what follows it, so a prompt that B rows begin with is computed once instead of B times, and its gradient is the sum
over them: the same mathematics in another order of sums. What a row is trained on is always in its own branch.
Next: `packing.py` (branches to a pack), `model/attention.py` (what a branch sees).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from kivnun.data.rows import TokenRow

# The least worth sharing: attention computes keys in vectors of this many.
MIN_SHARED = 16


@dataclass(eq=False, slots=True)
class Branch:
    """Tokens that follow `start` others in each of its rows; the first `shareable` may be shared with rows still to come.

    `row` is the number of the first row through it.
    """

    ids: np.ndarray
    start: int
    shareable: int
    row: int
    continued: list[Branch] = field(default_factory=list["Branch"])
    _by_beginning: dict[bytes, Branch] = field(default_factory=dict[bytes, "Branch"])

    def like(self, ids: np.ndarray) -> Branch | None:
        """Return the branch after this one that begins with at least MIN_SHARED of these tokens, if there is one."""
        return self._by_beginning.get(ids[:MIN_SHARED].tobytes()) if len(ids) >= MIN_SHARED else None

    def add(self, branch: Branch) -> None:
        """Let another branch go on from this one."""
        self.continued.append(branch)
        if branch.shareable >= MIN_SHARED:
            self._by_beginning[branch.ids[:MIN_SHARED].tobytes()] = branch

    def split(self, branch: Branch, at: int) -> Branch:
        """Put the first `at` tokens of a branch that goes on from here between the two, as a branch of their own; return that."""
        shared = Branch(branch.ids[:at], branch.start, at, branch.row)
        self.continued[self.continued.index(branch)] = shared
        self._by_beginning[shared.ids[:MIN_SHARED].tobytes()] = shared
        branch.ids, branch.start, branch.shareable = branch.ids[at:], branch.start + at, branch.shareable - at
        shared.add(branch)
        return shared


class PrefixTree:
    """Rows as branches. `num_tokens` is what they come to, each shared token counted once."""

    def __init__(self, share: bool) -> None:
        self._share = share
        self._root = Branch(np.empty(0, dtype=np.int32), 0, 0, -1)
        self._own: list[Branch] = []
        self.num_tokens = 0

    def add(self, row: TokenRow) -> None:
        """Let a row go on from what it has in common with those before, if that is enough to be worth it."""
        at, here = 0, self._root
        end = _shareable(row) if self._share else 0
        while (branch := here.like(row.ids[at:end])) is not None:
            common = _common(branch.ids[: branch.shareable], row.ids[at:end])
            here = branch if common == len(branch.ids) else here.split(branch, common)
            at += common
        own = Branch(row.ids[at:], at, end - at, row.row)
        here.add(own)
        self._own.append(own)
        self.num_tokens += len(own.ids)

    def branches(self) -> Iterator[tuple[Branch, int]]:
        """Yield every branch with the number of the one it goes on from (-1: none), that one always before it."""
        waiting, number = [(branch, -1) for branch in reversed(self._root.continued)], 0
        while waiting:
            branch, parent = waiting.pop()
            yield branch, parent
            waiting += [(after, number) for after in reversed(branch.continued)]
            number += 1

    def own(self) -> list[Branch]:
        """Return the branch that is each row's alone, in the order in which rows were added."""
        return self._own


def _shareable(row: TokenRow) -> int:
    """Return how many tokens a row may share: those before the state that predicts the first trained one, and never all."""
    trained = np.flatnonzero(row.weights)
    return (int(trained[0]) if len(trained) else row.length) - 1


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many tokens both begin with."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length
