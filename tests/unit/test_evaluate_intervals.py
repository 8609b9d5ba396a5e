"""Intervals: the bootstrap agrees with closed forms, covers what it should, and its verdicts follow from it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kivnun.evaluate import intervals
from kivnun.evaluate.intervals import difference_interval, interval_of, resample, verdict_of
from kivnun.evaluate.metrics import Measure


def shares(hits: np.ndarray) -> Measure:
    return Measure("exact_match", np.stack([hits.astype(np.float64), np.ones(len(hits))], axis=1))


def losses(sums: np.ndarray, weights: np.ndarray) -> Measure:
    return Measure("nll", np.stack([sums, weights], axis=1))


def test_interval_of_a_share_is_the_normal_interval_on_many_rows() -> None:
    hits = np.arange(4000) < 1200
    found = interval_of(shares(hits), draws=4000, seed=1)
    assert found is not None
    half = 1.96 * math.sqrt(0.3 * 0.7 / 4000)
    assert found.low == pytest.approx(0.3 - half, abs=0.1 * half)
    assert found.high == pytest.approx(0.3 + half, abs=0.1 * half)


def test_spread_of_a_ratio_is_its_linearised_standard_error() -> None:
    rng = np.random.default_rng(3)
    weights = rng.integers(1, 60, size=3000).astype(np.float64)
    sums = weights * rng.gamma(2.0, 1.0, size=3000)
    measure = losses(sums, weights)
    residuals = sums - measure.figure * weights
    expected = math.sqrt((residuals**2).sum()) / weights.sum()
    assert resample(measure, draws=4000, seed=1).std() == pytest.approx(expected, rel=0.05)


def test_interval_covers_the_truth_in_about_95_of_100_samples() -> None:
    rng = np.random.default_rng(11)
    trials = 400
    covered = 0
    for trial in range(trials):
        weights = rng.integers(5, 40, size=80).astype(np.float64)
        per_token = rng.normal(2.0, 0.7, size=80)
        found = interval_of(losses(weights * per_token, weights), draws=400, seed=trial)
        assert found is not None
        covered += found.low <= 2.0 <= found.high
    # 400 trials of a 0.95 event have a standard deviation of 0.011; the percentile interval is a little short at 80 rows.
    assert 0.91 <= covered / trials <= 0.98


def test_paired_interval_sees_a_small_gain_that_unpaired_intervals_cannot() -> None:
    rng = np.random.default_rng(5)
    weights = np.full(200, 10.0)
    base = losses(weights * rng.normal(3.0, 1.0, 200), weights)
    tuned = losses(base.rows_ND[:, 0] - weights * rng.normal(0.05, 0.02, 200), weights)
    difference = difference_interval(base, tuned, draws=1000, seed=7)
    alone = interval_of(base, 1000, 7), interval_of(tuned, 1000, 7)
    assert difference is not None
    assert alone[0] is not None
    assert alone[1] is not None
    assert difference.low < tuned.figure - base.figure < difference.high < 0
    assert verdict_of(difference, higher_is_better=False) == "better"
    assert alone[1].high > alone[0].low


def test_same_scores_give_an_interval_of_zero_width_and_no_detectable_difference() -> None:
    measure = shares(np.arange(50) % 3 == 0)
    difference = difference_interval(measure, measure, draws=200, seed=0)
    assert difference == (0.0, 0.0)
    assert verdict_of(difference, higher_is_better=True) == "no detectable difference"


@pytest.mark.parametrize(("num_rows", "given"), [(10, True), (9, False)])
def test_fewer_than_ten_rows_give_no_interval_and_no_verdict(num_rows: int, given: bool) -> None:
    base, tuned = shares(np.zeros(num_rows)), shares(np.ones(num_rows))
    difference = difference_interval(base, tuned, draws=100, seed=0)
    assert (difference is not None) is given
    assert (interval_of(base, draws=100, seed=0) is not None) is given
    assert verdict_of(difference, higher_is_better=True) == ("better" if given else "too few rows")


@pytest.mark.parametrize(
    ("interval", "higher_is_better", "verdict"),
    [
        ((0.1, 0.2), True, "better"),
        ((0.1, 0.2), False, "worse"),
        ((-0.2, -0.1), True, "worse"),
        ((-0.2, -0.1), False, "better"),
        ((-0.1, 0.1), True, "no detectable difference"),
        ((0.0, 0.1), True, "no detectable difference"),
    ],
)
def test_verdict_follows_from_the_side_of_zero(interval: tuple[float, float], higher_is_better: bool, verdict: str) -> None:
    assert verdict_of(interval, higher_is_better) == verdict


def test_draws_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = shares(np.arange(97) % 2 == 0)
    whole = resample(measure, draws=300, seed=4)
    assert not np.array_equal(whole, resample(measure, draws=300, seed=5))
    monkeypatch.setattr(intervals, "CHUNK_CELLS", 97 * 7)
    np.testing.assert_array_equal(whole, resample(measure, draws=300, seed=4))


@pytest.mark.parametrize(("changed", "verdict"), [(5, "no detectable difference"), (6, "better")])
def test_fewer_than_six_rows_that_differ_are_no_difference(changed: int, verdict: str) -> None:
    """Six that all go one way are the fewest that a sign test calls a difference: 2 / 2**6 is under 5 %, 2 / 2**5 is not."""
    base, tuned = shares(np.zeros(40)), shares(np.arange(40) < changed)
    difference = difference_interval(base, tuned, draws=1000, seed=0)
    assert difference is not None
    assert verdict_of(difference, higher_is_better=True) == verdict
    plain = np.quantile(resample(tuned, 1000, 0) - resample(base, 1000, 0), [0.025, 0.975])
    assert plain[0] > 0
    assert difference.high == pytest.approx(plain[1])
