"""How near test texts come to training texts: equal ones, and the nearest by shared runs of characters.

Held-out topics do not prove that a question is new: the same sentence with another name is nearly the same sentence. This counts
what is equal and shows the closest pair, so that a reader can judge. Next: `scenarios/overlap.py`, which leaves out what a template
says in every row, and `scenarios/multiple_choice/questions.py`.

Source: the resemblance of Broder 1997, "On the resemblance and containment of documents", with runs of characters as shingles.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

RUN = 5


@dataclass(frozen=True, slots=True)
class Nearest:
    """One test text and the training text most like it. `likeness` is 0 to 1: shared runs of RUN characters over all of both."""

    test: int
    train: int
    likeness: float


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """`equal` counts test texts that stand in training as they are; `nearest` has one entry per test text, in their order."""

    equal: int
    nearest: tuple[Nearest, ...]

    @property
    def closest(self) -> Nearest:
        return max(self.nearest, key=lambda pair: pair.likeness)

    def above(self, likeness: float) -> int:
        """Return how many test texts have a training text of at least this likeness."""
        return sum(pair.likeness >= likeness for pair in self.nearest)


def near_duplicates(train: Sequence[str], test: Sequence[str]) -> NearDuplicates:
    """Compare each test text with every training text. Neither may be empty. White space and case do not count."""
    assert train, "no training text"
    assert test, "no test text"
    kept, asked = [plain(text) for text in train], [plain(text) for text in test]
    known = set(kept)
    nearest = nearest_by_runs([runs_of(text, RUN) for text in kept], [runs_of(text, RUN) for text in asked])
    return NearDuplicates(sum(text in known for text in asked), tuple(nearest))


def nearest_by_runs(train: Sequence[Set[str]], test: Sequence[Set[str]]) -> list[Nearest]:
    """Return for each test text, given as its runs, the training text that is most like it, the first of equals."""
    holders: dict[str, list[int]] = defaultdict(list)
    for number, own in enumerate(train):
        for run in own:
            holders[run].append(number)
    return [_nearest(number, own, train, holders) for number, own in enumerate(test)]


def runs_of(text: str, length: int) -> set[str]:
    """Return the runs of so many characters; a shorter text is one run."""
    return {text[start : start + length] for start in range(max(1, len(text) - length + 1))}


def _nearest(test: int, own: Set[str], runs: Sequence[Set[str]], holders: Mapping[str, Sequence[int]]) -> Nearest:
    shared: Counter[int] = Counter()
    for run in own:
        shared.update(holders.get(run, ()))
    best = Nearest(test, 0, 0.0)
    for train, both in shared.items():
        likeness = both / (len(own) + len(runs[train]) - both)
        if likeness > best.likeness or (likeness == best.likeness and train < best.train):
            best = Nearest(test, train, likeness)
    return best


def plain(text: str) -> str:
    return " ".join(text.casefold().split())
