"""The held-out score as anyone would take it with transformers alone, row by row, with nothing of ours but the token ids."""

from __future__ import annotations

import torch
from torch import Tensor

from kivnun.data.rows import PreferencePair
from kivnun.opened import OpenedRun


@torch.no_grad()
def nll_by_hand(model: torch.nn.Module, opened: OpenedRun) -> float:
    """Return the nats per trained token over the held-out rows, each row alone through the plain model."""
    total, weight = 0.0, 0.0
    for item in opened.dataset.validation:
        for row in (item.chosen, item.rejected) if isinstance(item, PreferencePair) else (item,):
            ids = torch.from_numpy(row.ids.astype("int64"))[None]
            log_probs: Tensor = model(input_ids=ids).logits[0, -ids.shape[1] :].double().log_softmax(-1)
            picked = log_probs[:-1].gather(1, ids[0, 1:, None])[:, 0]
            weights = torch.from_numpy(row.weights[1:]).double()
            total -= float((picked * weights).sum())
            weight += float(weights.sum())
    return total / weight
