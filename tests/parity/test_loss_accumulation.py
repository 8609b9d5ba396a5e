"""A step is its rows, however they are cut: gradients and loss of every split equal, and equal to transformers' mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from kivnun.data.packing import micro_batches, pack
from kivnun.errors import NonFiniteLossError
from kivnun.model.load import load_base
from kivnun.train.engine import Trainee
from kivnun.train.weights import FullWeights

TinyBase = Callable[[str], Path]
TRAINED = (1, 7, 50, 300)
SPLITS = ([[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]], [[3], [2, 0, 1]])


def _trainee(folder: Path, kind: str) -> Trainee:
    base = load_base(folder, "fp32")
    return tiny.new_trainee(base, FullWeights(base) if kind == "full" else tiny.new_weights(base, kind))  # type: ignore[arg-type]


def _step(trainee: Trainee, split: list[list[int]]) -> tuple[float, dict[str, torch.Tensor]]:
    rows = tiny.random_rows(TRAINED)
    total = float(sum(TRAINED))
    loss = sum(trainee.forward_backward(pack([rows[at] for at in part]), total) for part in split)
    return loss, tiny.gradients(trainee)


@pytest.mark.parametrize("kind", ["full", "lora", "dora"])
def test_every_split_of_a_step_has_one_gradient(kind: str, tiny_base: TinyBase):
    whole_loss, whole = _step(_trainee(tiny_base("phi3"), kind), SPLITS[0])
    for split in SPLITS[1:]:
        loss, gradients = _step(_trainee(tiny_base("phi3"), kind), split)
        assert loss == pytest.approx(whole_loss, rel=1e-6)
        for name, gradient in gradients.items():
            assert tiny.relative_difference(gradient, whole[name]) < 2e-6, name


def test_the_loss_is_transformers_mean_per_trained_token(tiny_base: TinyBase):
    loss, _ = _step(_trainee(tiny_base("phi3"), "full"), [[0, 1], [2, 3]])
    with torch.no_grad():
        expected = float(tiny.reference_loss(tiny.reference(tiny_base("phi3")), tiny.random_rows(TRAINED)))
    assert loss == pytest.approx(expected, rel=1e-6)


def test_weights_of_single_tokens_weigh(tiny_base: TinyBase):
    """A token of weight 0.25 counts a quarter, in the loss and in the total."""
    trainee = _trainee(tiny_base("phi3"), "lora")
    row = tiny.random_rows((4,))[0]
    row.weights[-4:] = [1.0, 0.25, 0.0, 2.0]
    batch = pack([row])
    nll = -trainee.forward(batch)
    assert len(nll) == 3
    loss = trainee.forward_backward(batch, row.total_weight)
    assert loss == pytest.approx(float(nll @ np.array([1.0, 0.25, 2.0]) / 3.25), rel=1e-6)


def test_scores_before_training_are_transformers_log_probabilities(tiny_base: TinyBase):
    trainee = _trainee(tiny_base("phi3"), "lora")
    rows = tiny.random_rows((5, 9))
    batch = pack(rows)
    twin = tiny.peft_twin(tiny_base("phi3"), trainee.weights.adapter)  # type: ignore[attr-defined]
    for row, found in zip(rows, tiny.row_log_probs(trainee.forward(batch), batch), strict=True):
        scores = torch.log_softmax(tiny.reference_logits(twin, row.ids), 1)
        expected = [float(scores[at - 1, row.ids[at]]) for at in np.flatnonzero(row.weights)]
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_a_rows_scores_do_not_depend_on_its_pack(tiny_base: TinyBase):
    trainee = _trainee(tiny_base("phi3"), "dora")
    rows = tiny.random_rows((1, 7, 50))
    together = pack(rows)
    for row, found in zip(rows, tiny.row_log_probs(trainee.forward(together), together), strict=True):
        alone = trainee.forward(pack([row]))
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-6)


def test_an_end_token_that_is_the_pad_token_is_trained(tmp_path: Path):
    """The table's row of the pad id must keep its gradient, or the model never learns to stop."""
    config = tiny.CONFIGS["phi3"]()
    config.pad_token_id = config.eos_token_id
    base = load_base(tiny.write_base(tmp_path, config), "fp32")
    trainee = tiny.new_trainee(base, FullWeights(base))
    end = config.eos_token_id
    row = tiny.token_row([5, end, 7, end])
    trainee.forward_backward(pack([row]), 3.0)
    gradients = tiny.gradients(trainee)
    assert gradients["model.embed_tokens.weight"][end].any()
    assert gradients["lm_head.weight"][end].any()


def test_a_micro_batch_without_trained_tokens_adds_nothing(tiny_base: TinyBase):
    trainee = _trainee(tiny_base("phi3"), "lora")
    mute = tiny.token_row(tiny.random_ids(9), trained=0)
    assert trainee.forward_backward(pack([mute]), 1.0) == 0.0
    assert all(not gradient.any() for gradient in tiny.gradients(trainee).values())


def test_clipping_scales_to_the_limit_and_tells(tiny_base: TinyBase):
    results = []
    for limit in (None, 1e-3, 1e9):
        base = load_base(tiny_base("phi3"), "fp32")
        trainee = tiny.new_trainee(base, tiny.new_weights(base), max_grad_norm=limit)
        _, gradients = _step(trainee, SPLITS[0])
        results.append(trainee.optim_step(1e-3))
        norm = float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())
        assert results[-1].grad_norm == pytest.approx(norm, rel=1e-5)
    assert [result.clip_factor for result in results] == [1.0, pytest.approx(1e-3 / results[1].grad_norm, rel=1e-2), 1.0]


def test_a_loss_that_is_not_finite_names_its_rows_and_updates_nothing(tiny_base: TinyBase):
    base = load_base(tiny_base("phi3"), "fp32")
    trainee = tiny.new_trainee(base, tiny.new_weights(base))
    before = {name: p.detach().clone() for name, p in trainee.weights.parameters().items()}
    rows = tiny.random_rows((3, 5))
    with torch.no_grad():  # a token met in the second row alone spoils it
        rows[1].ids[2] = 99
        rows[0].ids[rows[0].ids == 99] = 3
        base.model.get_input_embeddings().weight[99] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"step 1 is nan; rows in it: rows\.jsonl:2\n"):
        trainee.forward_backward(pack(rows), 8.0)
    assert all(torch.equal(p, before[name]) for name, p in trainee.weights.parameters().items())


def test_a_gradient_that_is_not_finite_stops_before_the_update(tiny_base: TinyBase):
    base = load_base(tiny_base("phi3"), "fp32")
    trainee = tiny.new_trainee(base, tiny.new_weights(base))
    trainee.forward_backward(pack(tiny.random_rows((3,))), 3.0)
    parameters = trainee.weights.parameters()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    next(iter(parameters.values())).grad[0, 0] = float("inf")
    with pytest.raises(NonFiniteLossError, match="gradient of step 1 is inf"):
        trainee.optim_step(1e-3)
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())


def test_micro_batches_keep_every_row_in_order():
    rows = tiny.random_rows(TRAINED)
    parts = micro_batches(rows, 60)
    assert [[row.row for row in part] for part in parts] == [[0, 1], [2], [3]]
