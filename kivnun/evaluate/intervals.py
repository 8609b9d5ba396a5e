"""How sure a figure is: the percentile bootstrap over held-out rows, paired when two models scored the same rows.

Rows are drawn with replacement by a generator keyed by the seed and the number of rows alone; a metric is a function of sums over
rows (`metrics.py`), so all draws are one matrix product. Next: `tasks.py`.

Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapters 6 and 13; Koehn 2004, "Statistical Significance
Tests for Machine Translation Evaluation" (the paired form).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from kivnun.evaluate.metrics import Measure
from kivnun.randomness import generator

Verdict = Literal["better", "no detectable difference", "worse", "too few rows"]

LEVEL = 0.95
# Below this many rows an interval from resampling is far too narrow (a 95 % one covers under 90 %), so none is given.
MIN_ROWS = 10
# With fewer rows that differ between two models no exact test can tell them apart at this level: five that all go one way do so by
# chance one time in sixteen. Resampling alone would call four of two hundred a difference.
MIN_CHANGED = 6
# Resampled row counts held at once: 4 M int64 are 32 MB, whatever the number of rows.
CHUNK_CELLS = 4_000_000


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def resample(measure: Measure, draws: int, seed: int) -> np.ndarray:
    """Return the figure in each of `draws` resamplings of the rows, float64 [draws].

    Which rows a draw holds depends on the seed and the number of rows alone: two measures of the same rows are paired.
    """
    num_rows = measure.rows
    rng = generator(seed, "bootstrap", num_rows)
    chunk = max(1, CHUNK_CELLS // num_rows)
    figures: list[np.ndarray] = []
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        drawn = rng.integers(0, num_rows, size=(size, num_rows)) + np.arange(size)[:, None] * num_rows
        counts = np.bincount(drawn.ravel(), minlength=size * num_rows).reshape(size, num_rows)
        figures.append(measure.value(counts.astype(np.float64) @ measure.rows_ND))
    return np.concatenate(figures)


def interval_of(measure: Measure, draws: int, seed: int) -> Interval | None:
    """Return the 95 % percentile interval of one measure; None where there are no draws or too few rows."""
    if draws < 1 or measure.rows < MIN_ROWS:
        return None
    return _percentiles(resample(measure, draws, seed))


def difference_interval(base: Measure, tuned: Measure, draws: int, seed: int) -> Interval | None:
    """Return the paired 95 % interval of tuned minus base, as `interval_of`. Both hold the same rows in the same order. Where fewer
    than MIN_CHANGED of them differ it reaches to zero."""
    assert base.name == tuned.name, (base.name, tuned.name)
    assert base.rows_ND.shape == tuned.rows_ND.shape, (base.rows_ND.shape, tuned.rows_ND.shape)
    if draws < 1 or base.rows < MIN_ROWS:
        return None
    low, high = _percentiles(resample(tuned, draws, seed) - resample(base, draws, seed))
    changed = int((base.rows_ND != tuned.rows_ND).any(axis=1).sum())
    return Interval(low, high) if changed >= MIN_CHANGED else Interval(min(low, 0.0), max(high, 0.0))


def verdict_of(difference: tuple[float, float] | None, higher_is_better: bool) -> Verdict:
    """Return what an interval of tuned minus base says: better or worse only where it excludes zero."""
    if difference is None:
        return "too few rows"
    low, high = difference
    if low <= 0.0 <= high:
        return "no detectable difference"
    return "better" if (low > 0.0) == higher_is_better else "worse"


def _percentiles(figures: np.ndarray) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(figures, [tail, 1 - tail])
    return Interval(float(low), float(high))
