"""Intervals over rows and seeds together: the paired bootstrap of `evaluate/intervals.py`, with the seeds resampled too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kivnun.evaluate.intervals import LEVEL, Interval, resample
from kivnun.evaluate.metrics import Measure
from kivnun.randomness import generator

DRAWS = 2_000


def effect_over_seeds(base: Sequence[Measure], tuned: Sequence[Measure], seed: int = 0) -> tuple[float, Interval]:
    """Return (tuned minus base, its 95 % interval), positive where tuned is better.

    Each has one measure per seed, all of the same rows (one measure stands for every seed where the other has several). A draw
    takes the same rows for all and as many seeds, with replacement, as there are.
    """
    higher = tuned[0].higher_is_better
    sign = 1.0 if higher else -1.0
    count = max(len(base), len(tuned))
    figures = [np.stack([resample(measure, DRAWS, seed) for measure in group]) for group in (base, tuned)]
    before_SN, after_SN = (np.broadcast_to(group, (count, DRAWS)) for group in figures)
    picks_NS = generator(seed, "seeds", count).integers(0, count, size=(DRAWS, count))
    drawn_NS = np.take_along_axis((after_SN - before_SN).T, picks_NS, axis=1)
    point = sign * (np.mean([m.figure for m in tuned]) - np.mean([m.figure for m in base]))
    return float(point), percentiles(sign * drawn_NS.mean(axis=1))


def ratio_interval(ratios: Sequence[float], seed: int = 0) -> Interval:
    """Return the 95 % bootstrap interval of the geometric mean of ratios, one per seed or repeat. With few of them it is little
    more than their range."""
    logs = np.log(np.asarray(ratios, dtype=np.float64))
    picks = generator(seed, "ratios", len(logs)).integers(0, len(logs), size=(DRAWS, len(logs)))
    low, high = percentiles(logs[picks].mean(axis=1))
    return Interval(float(np.exp(low)), float(np.exp(high)))


def percentiles(figures: np.ndarray) -> Interval:
    """Return the middle 95 %."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(figures, [tail, 1 - tail])
    return Interval(float(low), float(high))


def mean_interval(low: float, high: float) -> Interval:
    """Return an interval from its ends, in whichever order they come."""
    return Interval(min(low, high), max(low, high))
