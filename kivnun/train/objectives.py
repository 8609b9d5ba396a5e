"""What is made small: the likelihood of replies or text, or DPO's preference loss. Each turns a pack into weights per token.

An objective says how much an item counts in its step, and which weight each supervised token's NLL gets;
the engine does the rest, the same for all. Next: `engine.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from kivnun.data.packing import PackedBatch
from kivnun.data.rows import TokenRow, Trainable
from kivnun.model.loss import dpo_weights


class Objective(Protocol):
    """A loss over packed rows, written as weights per token."""

    def weight_of(self, item: Trainable) -> float:
        """Return what an item adds to its step's total weight."""
        ...

    def token_weights(
        self, batch: PackedBatch, total_weight: float, log_probs: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the weight of each token's NLL (float32 [S], the division by `total_weight` done) and, where the loss is not
        the weighted NLL itself, the batch's share of the loss (scalar). `log_probs()` gives the policy's log-probabilities [S]."""
        ...


class LikelihoodObjective:
    """Supervised replies and running text: the mean NLL per trained token of the step."""

    def weight_of(self, item: Trainable) -> float:
        return cast(TokenRow, item).total_weight

    def token_weights(
        self, batch: PackedBatch, total_weight: float, log_probs: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        return torch.from_numpy((batch.weights_S.astype(np.float64) / total_weight).astype(np.float32)), None


@dataclass(frozen=True, slots=True)
class DpoObjective:
    """Direct preference optimisation: the mean loss per pair of the step.

    `reference` holds the summed log-probabilities (chosen, rejected) of each pair, by the pair's row number, under the model as
    it was when the run began.
    """

    beta: float
    reference: Mapping[int, tuple[float, float]]

    def weight_of(self, item: Trainable) -> float:
        return 1.0

    def token_weights(
        self, batch: PackedBatch, total_weight: float, log_probs: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        policy_P2 = row_sums(log_probs().cpu().double(), batch).view(-1, 2)
        reference_P2 = torch.tensor([self.reference[row] for row in batch.rows[::2]], dtype=torch.float64)
        loss_P, weights_P2 = dpo_weights(policy_P2, reference_P2, self.beta)
        segments_S = torch.from_numpy(batch.segment_S)
        return (weights_P2.flatten()[segments_S] / total_weight).float(), loss_P.sum() / total_weight


def row_sums(values_S: Tensor, batch: PackedBatch) -> Tensor:
    """Return the sum of the values of each row of the pack, float64."""
    sums = torch.zeros(len(batch.rows), dtype=torch.float64)
    return sums.index_add_(0, torch.from_numpy(batch.segment_S), values_S.double())
