"""Dropout's masks: the asked rate, no pattern, and a pure function of what they are for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kivnun.model.dropout import Mask, dropped, scale_and_limit, site_key, token_keys


def mask(seed: int = 0, step: int = 1, site: str = "a", rate: float = 0.5, tokens: int = 200, channels: int = 300) -> Tensor:
    """Return which elements are kept, bool [T, D], for a row of this many tokens."""
    keys_T = token_keys(seed, step, torch.zeros(tokens, dtype=torch.long), torch.arange(tokens))
    return dropped(torch.ones(tokens, channels), Mask(keys_T, site_key(seed, site), rate)) > 0


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_the_share_dropped_is_the_rate_in_all_directions(rate: float):
    kept_TD = mask(rate=rate).float()
    spread = (rate * (1 - rate)) ** 0.5
    assert abs(1 - rate - float(kept_TD.mean())) < 5 * spread / kept_TD.numel() ** 0.5
    for direction in (0, 1):
        means = kept_TD.mean(direction)
        count = kept_TD.shape[direction]
        assert float((means - (1 - rate)).abs().max()) < 5 * spread / count**0.5
        assert float(means.std()) == pytest.approx(spread / count**0.5, rel=0.25)  # as wide as chance makes it, no wider


def test_what_is_kept_is_scaled_so_that_the_mean_stays():
    keys_T = token_keys(0, 1, torch.zeros(50, dtype=torch.long), torch.arange(50))
    out = dropped(torch.full((50, 40), 2.0), Mask(keys_T, 1, 0.2))
    scale, limit = scale_and_limit(0.2)
    assert set(out.unique().tolist()) == {0.0, 2.0 * float(torch.tensor(scale))}
    assert scale * (1 - limit / 65536) == pytest.approx(1.0, abs=1e-12)
    assert limit / 65536 == pytest.approx(0.2, abs=1 / 65536)


@pytest.mark.parametrize(
    "other", [mask(seed=1), mask(step=2), mask(site="b"), mask()[torch.arange(199, -1, -1)], mask().roll(1, 1), mask().roll(1, 0)]
)
def test_masks_for_other_purposes_share_nothing(other: Tensor):
    agreement = float((mask() == other).float().mean())
    assert agreement == pytest.approx(0.5, abs=0.01)


def test_a_mask_is_the_same_in_any_pack_and_on_recompute():
    rows_T = torch.tensor([3] * 4 + [8] * 6)
    positions_T = torch.cat([torch.arange(4), torch.arange(6)])
    x = torch.ones(10, 33)
    together = dropped(x, Mask(token_keys(5, 2, rows_T, positions_T), 7, 0.3))
    assert torch.equal(together, dropped(x, Mask(token_keys(5, 2, rows_T, positions_T), 7, 0.3)))
    swapped = dropped(x, Mask(token_keys(5, 2, rows_T.roll(6), positions_T.roll(6)), 7, 0.3))
    assert torch.equal(swapped, together.roll(6, 0))
    assert torch.equal(dropped(x[:4], Mask(token_keys(5, 2, rows_T[:4], positions_T[:4]), 7, 0.3)), together[:4])
    assert not torch.equal(together[:4], together[4:8])


def test_keys_are_those_of_this_table():
    """A mask drawn today must be the mask of a run resumed with a later version."""
    keys = token_keys(7, 3, torch.tensor([0, 0, 12]), torch.tensor([0, 1, 5]))
    assert [site_key(7, "model.layers.0.mlp.down_proj"), *keys.tolist()] == [
        -65643787227138757,
        5234787543590436132,
        -8558489558054471798,
        8261231616692808960,
    ]


def test_the_dtype_of_the_input_stays():
    keys_T = token_keys(0, 1, torch.zeros(3, dtype=torch.long), torch.arange(3))
    assert dropped(torch.ones(3, 5, dtype=torch.bfloat16), Mask(keys_T, 1, 0.5)).dtype == torch.bfloat16


def test_a_gradient_passes_where_its_input_was_kept():
    keys_T = token_keys(0, 1, torch.zeros(9, dtype=torch.long), torch.arange(9))
    x = torch.ones(9, 20, requires_grad=True)
    out = dropped(x, Mask(keys_T, 1, 0.5))
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
