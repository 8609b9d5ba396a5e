"""Fast draws from one keyed generator: each row of a scenario, and each document of the built-in base's corpus, has its own, so
that any of them can be made again alone.

Half a million documents take some hundred million draws; NumPy's scalar calls would take minutes, so numbers are drawn 64 at a
time. Next: `names.py`, names to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from kivnun.randomness import generator

T = TypeVar("T")


class Draws:
    """A stream of draws, a pure function of (seed, purpose, counters)."""

    def __init__(self, seed: int, purpose: str, *counters: int | str) -> None:
        self._generator = generator(seed, purpose, *counters)
        self._numbers: list[float] = []

    def unit(self) -> float:
        """Return a number in [0, 1)."""
        if not self._numbers:
            self._numbers = self._generator.random(64).tolist()
        return self._numbers.pop()

    def below(self, count: int) -> int:
        """Return a whole number in [0, count)."""
        return int(self.unit() * count)

    def between(self, first: int, last: int) -> int:
        """Return a whole number in [first, last]."""
        return first + int(self.unit() * (last - first + 1))

    def chance(self, share: float) -> bool:
        return self.unit() < share

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.unit() * len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """Return `count` items at different places, in random order."""
        assert count <= len(items), f"{count} of {len(items)}"
        places: dict[int, None] = {}
        while len(places) < count:
            places[self.below(len(items))] = None
        return [items[place] for place in places]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Return all items in random order (Fisher-Yates)."""
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result

    def short(self, longest: int) -> int:
        """Return a length from 1 to `longest`, short ones more often: the easy cases come many times."""
        return 1 + int(self.unit() ** 2 * longest)
