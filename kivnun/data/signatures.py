"""Near duplicates among many texts, in memory that does not grow with them: a sketch of each text, and buckets of alike ones.

Comparing each text with each is out of the question for a million rows. A sketch is the lowest hashes of a text's runs of
characters. Numbers drawn from them fall into the same buckets for texts that are alike (MinHash with bands), and the pairs found
there are compared by their sketches: exactly where texts have fewer than SKETCH different runs, as most rows have, and by an
estimate beyond. Likeness is what `near.py` says it is. All is a pure function of the texts. Next: `repeats.py`, which asks.

Sources: Broder 1997, "On the resemblance and containment of documents"; Shrivastava and Li 2014, "Densifying one permutation
hashing via rotation for fast near neighbor search"; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kivnun.data.near import RUN, plain
from kivnun.randomness import generator

NEAR = 0.8
"""Texts of at least this likeness are near duplicates."""
SKETCH = 256
"""Hashes kept of a text. The likeness of two texts of more runs is off by 0.025 (standard error at 0.8)."""
BANDS, PER_BAND = 20, 6
BINS = BANDS * PER_BAND
"""Numbers by which texts are bucketed: a pair of likeness 0.8 shares a band with probability 0.998, one of 0.5 with 0.27."""
NEIGHBOURS = 8
"""Texts that each is compared with in each band: where a template makes all texts alike, a bucket holds very many."""
TRIES = 8
"""Sketches that each text is compared with in all. The most promising are not sought out: the first found are taken."""
_WORTH_A_TRY = NEAR - 0.15  # by the estimate from bins, which is off by 0.06 (standard error) for a text of 50 runs
_AT_ONCE = 65_536  # letters hashed at once, and pairs estimated at once
_NUMBERS = np.arange(BINS)
_EMPTY = np.uint32(0xFFFF_FFFF)

_drawn = generator(0, "near.signatures")
_LETTERS = _drawn.integers(0, 2**64, RUN, dtype=np.uint64) | np.uint64(1)
_EDGES = (np.arange(BINS, dtype=np.uint64) * np.uint64(2**32) // np.uint64(BINS)).astype(np.uint32)


@dataclass(frozen=True, slots=True)
class Sketch:
    """What is kept of a text: its lowest hashes in order (uint32, at most SKETCH), and its number in each of BINS bins (uint16)."""

    lowest: np.ndarray
    bins: np.ndarray


def sketch_of(text: str) -> Sketch:
    """Return the sketch of a text. White space and case do not count."""
    letters = np.frombuffer(plain(text).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    if len(letters) < RUN:
        letters = np.pad(letters, (0, RUN - len(letters)))  # a shorter text is one run
    lowest, bins = np.empty(0, dtype=np.uint32), np.full(BINS, _EMPTY)
    for start in range(0, len(letters) - RUN + 1, _AT_ONCE):
        runs = _distinct(_hashes_of_runs(letters[start : start + _AT_ONCE + RUN - 1]))
        np.minimum(bins, _lowest_of_bins(runs), out=bins)
        lowest = runs[:SKETCH] if not start else _distinct(np.concatenate([lowest, runs[:SKETCH]]))[:SKETCH]
    return Sketch(lowest, _filled(bins).astype(np.uint16))


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Return the likeness, 0 to 1, of two texts by their lowest hashes: shared runs over the runs of both."""
    # Beyond the last hash of a full sketch nothing is known of its text.
    known = min((int(one[-1]) for one in (a, b) if len(one) == SKETCH), default=int(_EMPTY))
    a, b = (one[: int(np.searchsorted(one, known, side="right"))] for one in (a, b))
    both = np.concatenate([a, b])
    both.sort()
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(a) + len(b) - shared)


def find_near(
    bins: np.ndarray, lowest: Callable[[int], np.ndarray], train: np.ndarray, asked: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each text in `asked` a text of `train` of likeness NEAR or more (-1: none was found), and their likeness.

    `train` and `asked` are numbers of texts: rows of `bins` [N, BINS], arguments of `lowest`, which gives the hashes of one. Asked
    about `train` itself, a text is compared with those before it. The work grows with the number of texts and no faster.
    """
    found, alike = np.full(len(asked), -1, dtype=np.int64), np.zeros(len(asked))
    tries = np.zeros(len(asked), dtype=np.int64)
    for first in range(0, BINS, PER_BAND):
        keys = _keys(bins[train, first : first + PER_BAND])
        order = np.argsort(keys, kind="stable")  # stable: within a bucket, as the texts came
        keys = keys[order]
        if asked is train:
            own, ends = keys, np.arange(len(train))
            of_asked = order
        else:
            own = _keys(bins[asked, first : first + PER_BAND])
            ends, of_asked = np.searchsorted(keys, own, side="right"), np.arange(len(asked))
        for back in range(1, NEIGHBOURS + 1):
            at = ends - back
            places = np.flatnonzero((at >= 0) & (keys[np.maximum(at, 0)] == own) if len(keys) else [])
            places = places[(found[of_asked[places]] < 0) & (tries[of_asked[places]] < TRIES)]
            pairs = zip(of_asked[places].tolist(), train[order[at[places]]].tolist(), strict=True)
            likely = _likely(bins, asked[of_asked[places]], train[order[at[places]]])
            for (mine, other), worth in zip(pairs, likely.tolist(), strict=True):
                if worth:
                    tries[mine] += 1
                    value = likeness(lowest(int(asked[mine])), lowest(other))
                    if value >= NEAR:
                        found[mine], alike[mine] = other, value
    return found, alike


def _likely(bins: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return which pairs of texts are worth a comparison, by the share of their bins that are equal."""
    parts = [
        (bins[a[at : at + _AT_ONCE]] == bins[b[at : at + _AT_ONCE]]).mean(axis=1) >= _WORTH_A_TRY
        for at in range(0, len(a), _AT_ONCE)
    ]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.bool_)


def _distinct(hashes: np.ndarray) -> np.ndarray:
    """Return the hashes in order, each once. numpy's own `unique` goes through a hash table, which takes four times as long."""
    hashes.sort()
    first = np.empty(len(hashes), dtype=np.bool_)
    first[0] = True
    np.not_equal(hashes[1:], hashes[:-1], out=first[1:])
    return hashes[first]


def _lowest_of_bins(runs: np.ndarray) -> np.ndarray:
    """Return the lowest of the hashes, which are in order, in each bin; _EMPTY where there is none."""
    at = np.searchsorted(runs, _EDGES)
    ends = np.append(at[1:], len(runs))
    return np.where(at < ends, runs[np.minimum(at, len(runs) - 1)], _EMPTY)


def _filled(bins: np.ndarray) -> np.ndarray:
    """Return bins in which an empty one has the number of the filled one before it, around the end."""
    places = np.flatnonzero(bins != _EMPTY)
    return bins[places[np.searchsorted(places, _NUMBERS, side="right") - 1]]


def _hashes_of_runs(letters: np.ndarray) -> np.ndarray:
    """Return a well-mixed 32-bit hash of each run of RUN letters (the last steps of SplitMix64, Steele, Lea and Flood 2014)."""
    count = len(letters) - RUN + 1
    mixed = np.zeros(count, dtype=np.uint64)
    for at, factor in enumerate(_LETTERS):
        mixed += letters[at : at + count] * factor
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))).astype(np.uint32)


def _keys(part: np.ndarray) -> np.ndarray:
    """Return a 64-bit key of each row of [N, PER_BAND]: equal for equal rows, and for others hardly ever."""
    keys = np.zeros(len(part), dtype=np.uint64)
    for column in part.T:
        keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys
