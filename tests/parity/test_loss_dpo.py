"""DPO as weights per token: ln 2 at the start, autograd of the formula after it, the same packed or not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from kivnun.data.packing import micro_batches, pack
from kivnun.data.rows import PreferencePair, TokenRow, Where
from kivnun.model.load import load_base
from kivnun.model.loss import dpo_weights
from kivnun.train.engine import Trainee
from kivnun.train.objectives import DpoObjective, row_sums

TinyBase = Callable[[str], Path]
BETA = 0.3


def _pairs() -> list[PreferencePair]:
    """Pairs of a common prompt and two replies of unlike lengths."""
    pairs = []
    for number, (chosen, rejected) in enumerate(((1, 9), (30, 4), (6, 7))):
        prompt = tiny.random_ids(4, number)
        sides = [
            tiny.token_row(prompt + tiny.random_ids(count, number, side), 2 * number + side, count)
            for side, count in enumerate((chosen, rejected))
        ]
        pairs.append(PreferencePair(sides[0], sides[1], number, Where("pairs.jsonl", number + 1)))
    return pairs


def _reference(trainee: Trainee, pairs: list[PreferencePair]) -> dict[int, tuple[float, float]]:
    batch = pack(pairs)
    sums = row_sums(torch.from_numpy(trainee.forward(batch)), batch).view(-1, 2).tolist()
    return {row: (chosen, rejected) for row, (chosen, rejected) in zip(batch.rows[::2], sums, strict=True)}


def _trainee(folder: Path, reference: dict[int, tuple[float, float]] | None = None, *, stirred: bool = True) -> Trainee:
    """Return a trainee with the given reference log-probabilities, or with those of the plain base (an adapter at its start)."""
    base = load_base(folder, "fp32")
    plain = tiny.new_trainee(base, tiny.new_weights(base, stirred=False))
    return tiny.new_trainee(
        base, tiny.new_weights(base, stirred=stirred), DpoObjective(BETA, reference or _reference(plain, _pairs()))
    )


def test_the_loss_of_the_first_step_is_ln_2(tiny_base: TinyBase):
    trainee = _trainee(tiny_base("phi3"), stirred=False)
    loss = trainee.forward_backward(pack(_pairs()), 3.0)
    assert loss == pytest.approx(math.log(2), rel=1e-6)


def test_loss_and_gradient_are_autograd_of_the_formula(tiny_base: TinyBase):
    folder = tiny_base("phi3")
    trainee = _trainee(folder)
    loss = trainee.forward_backward(pack(_pairs()), 3.0)
    twin = tiny.peft_twin(folder, trainee.weights.adapter)  # type: ignore[attr-defined]
    plain = tiny.reference(folder)

    def score(model: torch.nn.Module, row: TokenRow) -> Tensor:
        logits_TV = model(input_ids=torch.from_numpy(row.ids)[None].long(), use_cache=False).logits[0]
        nll_T = F.cross_entropy(logits_TV[:-1], torch.from_numpy(row.ids[1:]).long(), reduction="none")
        return -(nll_T * torch.from_numpy(row.weights[1:])).sum()

    losses = []
    for pair in _pairs():
        with torch.no_grad():
            margin = score(plain, pair.chosen) - score(plain, pair.rejected)
        losses.append(-F.logsigmoid(BETA * (score(twin, pair.chosen) - score(twin, pair.rejected) - margin)))
    expected = torch.stack(losses).mean()
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    theirs = dict(twin.named_parameters())
    for name, gradient in tiny.gradients(trainee).items():
        assert tiny.relative_difference(gradient, theirs[tiny.peft_name(name)].grad) < 2e-5, name


def test_packed_pairs_and_pairs_one_by_one_have_one_loss_and_gradient(tiny_base: TinyBase):
    packed, single = _trainee(tiny_base("phi3")), _trainee(tiny_base("phi3"))
    loss = packed.forward_backward(pack(_pairs()), 3.0)
    losses = [single.forward_backward(pack([pair]), 3.0) for pair in reversed(_pairs())]
    assert sum(losses) == pytest.approx(loss, rel=1e-6)
    apart = tiny.gradients(single)
    for name, gradient in tiny.gradients(packed).items():
        assert tiny.relative_difference(apart[name], gradient) < 2e-6, name


def test_a_pair_is_never_split():
    pairs = _pairs()
    for budget in (1, 20, 50, 1000):
        parts = micro_batches(pairs, budget)
        assert [pair for part in parts for pair in part] == pairs
    batch = pack(pairs)
    assert batch.rows == (0, 1, 2, 3, 4, 5)
    assert set(batch.segment_S.tolist()) == set(range(6))


def test_training_widens_the_margin(tiny_base: TinyBase):
    trainee = _trainee(tiny_base("phi3"), stirred=False)
    losses = []
    for _ in range(12):
        losses.append(trainee.forward_backward(pack(_pairs()), 3.0))
        trainee.optim_step(1e-2)
    assert losses[-1] < 0.1 < losses[0]


def test_weights_per_token_are_the_derivative_of_the_loss():
    policy = torch.tensor([[-3.0, -2.0], [-1.0, -80.0], [-90.0, -1.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-2.5, -2.5], [-1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    loss_P, weights_P2 = dpo_weights(policy.detach(), reference, BETA)
    margin = (policy[:, 0] - reference[:, 0]) - (policy[:, 1] - reference[:, 1])
    expected_P = -F.logsigmoid(BETA * margin)
    expected_P.sum().backward()
    torch.testing.assert_close(loss_P, expected_P.detach())
    # A weight is on the negative log-likelihood, hence the sign.
    torch.testing.assert_close(weights_P2, -policy.grad)
