"""Held-out loss: what a model gives to replies it was not trained on, in nats per trained token.

The sums stay with their rows, in float64, so that the figure does not depend on how rows were batched and can be resampled
(`intervals.py`). `Scorer` is all that evaluation needs of a model: a trainee, or the bare base of an engine.
Next: `evaluation.py`, which joins this with the tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kivnun.data.packing import PackedBatch, micro_batches, pack
from kivnun.data.rows import PreferencePair, TokenRow, Trainable
from kivnun.errors import NonFiniteLossError
from kivnun.evaluate.metrics import Measure
from kivnun.model.generate import SamplingParams

Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all)."""


class Scorer(Protocol):
    """A model that can be scored: token log-probabilities, and replies."""

    def forward(self, batch: PackedBatch) -> np.ndarray:
        """Return the log-probability of each target of the batch, float32 [S], in batch order."""
        ...

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """Return the new token ids of each prompt."""
        ...


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The loss over held-out rows. `sums_N`, `weights_N` float64: each row's weighted loss (nats) and weight.

    `chosen_wins_N` is there for preference pairs alone: 1 where the chosen reply is the likelier of the two, else 0.
    """

    nll: float
    sums_N: np.ndarray
    weights_N: np.ndarray
    rows: int
    chosen_wins_N: np.ndarray | None = None

    def measures(self) -> list[Measure]:
        """Return the loss, and for pairs the preference accuracy, as measures that can be resampled."""
        loss = Measure("nll", np.stack([self.sums_N, self.weights_N], axis=1))
        if self.chosen_wins_N is None:
            return [loss]
        wins = np.stack([self.chosen_wins_N, np.ones_like(self.chosen_wins_N)], axis=1)
        return [loss, Measure("preference_accuracy", wins)]


def held_out_nll(
    scorer: Scorer, rows: Sequence[Trainable], micro_batch_tokens: int, on_progress: Progress | None = None
) -> HeldOut:
    """Return the loss over `rows`: the sum of weighted NLL over the sum of weights, both in float64.

    `rows` must not be empty. Preference pairs count with their chosen reply; both replies are scored. Raises
    NonFiniteLossError, naming the first row.
    """
    scored, log_probs = target_log_probs(scorer, rows, micro_batch_tokens, on_progress)
    sums = np.array([-np.dot(_target_weights(row), values) for row, values in zip(scored, log_probs, strict=True)])
    _refuse_non_finite(scored, sums)
    weights = np.array([row.total_weight for row in scored])
    chosen_wins = None
    if isinstance(rows[0], PreferencePair):
        chosen_wins = (sums[0::2] < sums[1::2]).astype(np.float64)
        sums, weights = sums[0::2], weights[0::2]
    return HeldOut(float(sums.sum() / weights.sum()), sums, weights, len(rows), chosen_wins)


def target_log_probs(
    scorer: Scorer, rows: Sequence[Trainable], micro_batch_tokens: int, on_progress: Progress | None
) -> tuple[list[TokenRow], list[np.ndarray]]:
    """Return the token rows scored (of a pair: chosen, rejected) and each one's target log-probabilities, float64."""
    scored: list[TokenRow] = []
    log_probs: list[np.ndarray] = []
    done = 0
    for run in micro_batches(rows, micro_batch_tokens):
        batch_rows = [row for item in run for row in item.sides]
        ends = np.cumsum([len(_target_weights(row)) for row in batch_rows])
        values = scorer.forward(pack(run)).astype(np.float64)
        assert len(values) == ends[-1], (len(values), ends[-1])
        scored.extend(batch_rows)
        log_probs.extend(np.split(values, ends[:-1]))
        done += len(run)
        if on_progress is not None:
            on_progress(done, len(rows))
    return scored, log_probs


def _target_weights(row: TokenRow) -> np.ndarray:
    return row.weights[row.weights != 0].astype(np.float64)


def _refuse_non_finite(rows: list[TokenRow], sums: np.ndarray) -> None:
    broken = np.flatnonzero(~np.isfinite(sums))
    if len(broken):
        where = rows[broken[0]].where
        raise NonFiniteLossError(
            f"the held-out loss is not finite for {len(broken)} of {len(rows)} rows, first {where}",
            hint="the weights hold NaN or infinite values: lower schedule.learning_rate, or start from an earlier checkpoint",
        )
