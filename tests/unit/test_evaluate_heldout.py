"""Held-out loss: sums stay with their rows, and batching changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from kivnun.data.packing import PackedBatch
from kivnun.data.rows import PreferencePair, TokenRow, Where
from kivnun.errors import NonFiniteLossError
from kivnun.evaluate.heldout import held_out_nll
from kivnun.model.generate import SamplingParams


class TableScorer:
    """A scorer at the protocol: the log-probability of a token depends on the token alone."""

    def __init__(self, log_probs: np.ndarray) -> None:
        self.log_probs = log_probs
        self.batches: list[PackedBatch] = []

    def forward(self, batch: PackedBatch) -> np.ndarray:
        self.batches.append(batch)
        return self.log_probs[batch.targets_S].astype(np.float32)

    def forward_and_choice(self, batch: PackedBatch) -> tuple[np.ndarray, np.ndarray]:
        return self.forward(batch), batch.targets_S < 3

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        return [list(prompt) for prompt in prompts]


def row(ids: Sequence[int], weights: Sequence[float], number: int = 0) -> TokenRow:
    return TokenRow(np.array(ids, np.int32), np.array(weights, np.float32), number, Where("rows.jsonl", number + 1), 1)


TABLE = -np.arange(10, dtype=np.float64) / 4  # exact in float32


def test_nll_is_weighted_sum_over_weight() -> None:
    rows = [row([1, 2, 3], [0, 1, 1], 0), row([1, 4, 8], [0, 0.5, 0], 1)]
    found = held_out_nll(TableScorer(TABLE), rows, micro_batch_tokens=100)
    assert found.sums_N.tolist() == [5 / 4, 0.5]
    assert found.weights_N.tolist() == [2.0, 0.5]
    assert found.nll == 1.75 / 2.5
    assert found.rows == 2


def test_accuracy_is_the_share_of_trained_tokens_that_nothing_was_likelier_than_in_chosen_replies_alone() -> None:
    rows = [row([1, 2, 3], [0, 1, 1], 0), row([1, 1, 8], [0, 0.5, 0], 1)]
    found = held_out_nll(TableScorer(TABLE), rows, micro_batch_tokens=4)
    assert found.accuracy == 2 / 3, "of 2, 3 and 1: weights above nothing count alike, as in a step's accuracy"
    assert [measure.name for measure in found.measures()] == ["nll"]
    pair = PreferencePair(row([1, 2], [0, 1]), row([1, 9, 9], [0, 1, 1]), 0, Where("p.jsonl", 1))
    assert held_out_nll(TableScorer(TABLE), [pair], micro_batch_tokens=100).accuracy == 1.0


def test_batches_do_not_change_any_row() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, 30, size=40)
    rows = [row(rng.integers(0, 10, n), [0, *rng.integers(0, 3, n - 2), 1.0], i) for i, n in enumerate(lengths)]
    table = -rng.gamma(2.0, 1.0, size=10)
    whole = held_out_nll(TableScorer(table), rows, micro_batch_tokens=10_000)
    scorer = TableScorer(table)
    cut = held_out_nll(scorer, rows, micro_batch_tokens=32)
    assert len(scorer.batches) > 10
    np.testing.assert_array_equal(whole.sums_N, cut.sums_N)
    assert whole.nll == cut.nll


def test_progress_counts_rows_to_the_end() -> None:
    heard: list[tuple[int, int]] = []
    rows = [row([1, 2, 3], [0, 1, 1], i) for i in range(5)]
    held_out_nll(TableScorer(TABLE), rows, micro_batch_tokens=6, on_progress=lambda done, total: heard.append((done, total)))
    assert heard == [(2, 5), (4, 5), (5, 5)]


def test_preference_pairs_count_with_the_chosen_reply_and_give_accuracy() -> None:
    def pair(chosen: int, rejected: int, number: int) -> PreferencePair:
        return PreferencePair(row([1, chosen], [0, 1], number), row([1, rejected], [0, 1], number), number, Where("p.jsonl", 1))

    found = held_out_nll(TableScorer(TABLE), [pair(1, 2, 0), pair(4, 3, 1), pair(2, 8, 2)], micro_batch_tokens=4)
    assert found.nll == pytest.approx((1 + 4 + 2) / 4 / 3)
    loss, accuracy = found.measures()
    assert (loss.name, loss.figure) == ("nll", pytest.approx(found.nll))
    assert (accuracy.name, accuracy.figure) == ("preference_accuracy", pytest.approx(2 / 3))


def test_loss_that_is_not_finite_is_refused_with_the_row() -> None:
    table = TABLE.copy()
    table[7] = math.nan
    rows = [row([1, 2], [0, 1], 0), row([1, 7], [0, 1], 1)]
    with pytest.raises(NonFiniteLossError, match=r"1 of 2 rows, first rows\.jsonl:2"):
        held_out_nll(TableScorer(table), rows, micro_batch_tokens=100)
