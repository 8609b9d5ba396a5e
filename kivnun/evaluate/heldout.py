"""Held-out loss: what a model gives to replies it was not trained on, in nats per trained token.

The sums stay with their rows, in float64, so that the figure does not depend on how rows were batched and can be resampled
(`intervals.py`). `Scorer` is all that evaluation needs of a model: a trainee, or the bare base of an engine.
Next: `evaluation.py`, which joins this with the tasks.
"""

from __future__ import annotations

import math
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

    def forward_and_choice(self, batch: PackedBatch) -> tuple[np.ndarray, np.ndarray]:
        """Return what `forward` does, and for each target whether no token is likelier there, bool [S]."""
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

    `chosen_wins_N` is there for preference pairs alone: 1 where the chosen reply is the likelier of the two, else 0. `accuracy` is
    the share of the trained tokens that no other was likelier than; told as it is, and no measure that runs are compared by.
    """

    nll: float
    sums_N: np.ndarray
    weights_N: np.ndarray
    rows: int
    chosen_wins_N: np.ndarray | None = None
    accuracy: float = math.nan

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
    scored, values = _of_targets(scorer.forward_and_choice, rows, micro_batch_tokens, on_progress)
    log_probs, hits = [found.astype(np.float64) for found, _ in values], [chosen for _, chosen in values]
    sums = np.array([-np.dot(_target_weights(row), values) for row, values in zip(scored, log_probs, strict=True)])
    _refuse_non_finite(scored, sums)
    weights = np.array([row.total_weight for row in scored])
    chosen_wins = None
    if isinstance(rows[0], PreferencePair):
        chosen_wins = (sums[0::2] < sums[1::2]).astype(np.float64)
        sums, weights, hits = sums[0::2], weights[0::2], hits[0::2]
    return HeldOut(float(sums.sum() / weights.sum()), sums, weights, len(rows), chosen_wins, float(np.concatenate(hits).mean()))


def target_log_probs(
    scorer: Scorer, rows: Sequence[Trainable], micro_batch_tokens: int, on_progress: Progress | None
) -> tuple[list[TokenRow], list[np.ndarray]]:
    """Return the token rows scored (of a pair: chosen, rejected) and each one's target log-probabilities, float64."""
    scored, values = _of_targets(lambda batch: (scorer.forward(batch),), rows, micro_batch_tokens, on_progress)
    return scored, [found.astype(np.float64) for (found,) in values]


def _of_targets(
    verb: Callable[[PackedBatch], tuple[np.ndarray, ...]],
    rows: Sequence[Trainable],
    micro_batch_tokens: int,
    on_progress: Progress | None,
) -> tuple[list[TokenRow], list[tuple[np.ndarray, ...]]]:
    """Return the token rows (of a pair: chosen, rejected), and what a verb says of the targets [S] of each."""
    scored: list[TokenRow] = []
    found: list[tuple[np.ndarray, ...]] = []
    done = 0
    for run in micro_batches(rows, micro_batch_tokens):
        batch_rows = [row for item in run for row in item.sides]
        ends = np.cumsum([len(_target_weights(row)) for row in batch_rows])
        values = verb(pack(run))
        assert all(len(part) == ends[-1] for part in values), ([len(part) for part in values], ends[-1])
        scored.extend(batch_rows)
        found.extend(zip(*(np.split(part, ends[:-1]) for part in values), strict=True))
        done += len(run)
        if on_progress is not None:
            on_progress(done, len(rows))
    return scored, found


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
