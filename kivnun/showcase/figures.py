"""From what each model gave to each answer to the bars: robust accuracy, MC1 and MC2, their intervals, and what was forgotten.

Everything here is a function of the numbers in showcase.json, so that anybody can compute the chart again. A figure of several
seeds is the mean over them. Its interval comes from drawing seeds and questions with replacement, both at once; a difference to the
base takes the same questions on both sides. With three seeds the draw of seeds can only show what three show. Next: `page.py`.

Source: the percentile bootstrap of `kivnun/evaluate/intervals.py` over two crossed samples (Owen 2007, "The pigeonhole
bootstrap").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kivnun.data.scenarios.multiple_choice.questions import Question
from kivnun.evaluate.intervals import LEVEL, Interval, verdict_of
from kivnun.evaluate.multiple_choice import mc1, mc2
from kivnun.randomness import generator
from kivnun.showcase.scores import Scores

MEASURES = ("robust", "mc1", "mc2")
DRAWS = 2_000
SEED = 7


@dataclass(frozen=True, slots=True)
class Figure:
    """One bar: value, 95 % interval, each seed's value; against the base the difference, its interval and what that says."""

    value: float
    interval: tuple[float, float]
    seeds: tuple[float, ...]
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    verdict: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def of_questions(asked: Sequence[Question], scores: Scores) -> dict[str, np.ndarray]:
    """Return what each question adds to each measure, 0 to 1, float64 [N]: robust, listed (mean over variations), mc1, mc2."""
    rows: list[tuple[float, float, float, float]] = []
    for question, answers, variations in zip(asked, scores.open, scores.listed, strict=True):
        values, num_true = np.array(answers), len(question.true)
        hits = [mc1(options[0], np.array(options[1:])) for options in variations]
        rows.append(
            (min(hits), sum(hits) / len(hits), mc1(answers[0], values[num_true:]), mc2(values[:num_true], values[num_true:]))
        )
    return dict(zip(("robust", "listed", "mc1", "mc2"), np.array(rows).T, strict=True))


def figure(
    tuned_SN: np.ndarray, base_N: np.ndarray | None = None, weights_N: np.ndarray | None = None, *, higher: bool = True
) -> Figure:
    """Return the mean over seeds and questions with its interval, and its difference to the base on the same questions.

    `tuned_SN` has a row per seed; `weights_N` (the tokens of a text) makes the mean over questions a weighted one.
    """
    weights = np.ones(tuned_SN.shape[1]) if weights_N is None else weights_N
    counts_DS, counts_DN = _draws(*tuned_SN.shape)
    per_seed_DS = counts_DN @ (tuned_SN * weights).T / (counts_DN @ weights)[:, None]
    drawn_D = (per_seed_DS * counts_DS).sum(axis=1) / counts_DS.sum(axis=1)
    seeds = (tuned_SN * weights).sum(axis=1) / weights.sum()
    value = float(seeds.mean())
    interval, by_seed = _interval(drawn_D), tuple(float(one) for one in seeds)
    if base_N is None:
        return Figure(value, interval, by_seed)
    base = float((base_N * weights).sum() / weights.sum())
    difference = _interval(drawn_D - counts_DN @ (base_N * weights) / (counts_DN @ weights))
    return Figure(value, interval, by_seed, value - base, difference, verdict_of(difference, higher))


def _draws(num_seeds: int, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how often each seed [D, S] and each question [D, N] is in each draw, a function of the two numbers alone."""
    seeds = generator(SEED, "showcase.seeds", num_seeds).integers(0, num_seeds, size=(DRAWS, num_seeds))
    items = generator(SEED, "showcase.items", num_items).integers(0, num_items, size=(DRAWS, num_items))
    return _counts(seeds, num_seeds), _counts(items, num_items)


def _counts(drawn: np.ndarray, size: int) -> np.ndarray:
    at = drawn + np.arange(len(drawn))[:, None] * size
    return np.bincount(at.ravel(), minlength=len(drawn) * size).reshape(len(drawn), size).astype(np.float64)


def _interval(figures_D: np.ndarray) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(figures_D, [tail, 1 - tail])
    return Interval(float(low), float(high))
