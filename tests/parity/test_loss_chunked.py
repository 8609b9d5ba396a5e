"""The loss without logits: against cross entropy and autograd, in every precision, over every border of its chunks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from kivnun.data.packing import pack
from kivnun.model.kernels import TorchKernels, choose
from kivnun.model.linear import TunableLinear
from kivnun.model.load import load_base
from kivnun.model.loss import FrozenHead, GraphHead, token_log_probs, weighted_nll
from kivnun.train.weights import FullWeights

WIDTH, VOCAB = 24, 103
COUNTS = [1, 15, 16, 255, 256, 257, 1300]


def _problem(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states, a head, targets and weights, some of them zero or negative (as DPO's are)."""
    draws = torch.Generator().manual_seed(count)
    h_SD = torch.randn(count, WIDTH, generator=draws).to(dtype).requires_grad_()
    head_VD = torch.randn(VOCAB, WIDTH, generator=draws).to(dtype).requires_grad_()
    targets_S = torch.randint(0, VOCAB, (count,), generator=draws)
    weights_S = torch.randn(count, generator=draws) * (torch.rand(count, generator=draws) > 0.2)
    return h_SD, head_VD, targets_S, weights_S


def _ours(h_SD: Tensor, head_VD: Tensor, targets_S: Tensor, weights_S: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, nll_S = weighted_nll(GraphHead(lambda h: F.linear(h, head_VD), [head_VD], TorchKernels()), h_SD, targets_S, weights_S)
    (loss * 3.0).backward()  # a factor from outside must reach the gradients
    return loss, nll_S, h_SD.grad, head_VD.grad


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_loss_and_gradients_are_cross_entropys(count: int, dtype: torch.dtype, tolerance: float):
    h_SD, head_VD, targets_S, weights_S = _problem(count, dtype)
    loss, nll_S, dh_SD, dhead_VD = _ours(h_SD, head_VD, targets_S, weights_S)
    exact_h, exact_head = (x.detach().double().requires_grad_() for x in (h_SD, head_VD))
    exact_S = F.cross_entropy(exact_h @ exact_head.T, targets_S, reduction="none")
    exact = (exact_S * weights_S.double()).sum()
    (exact * 3.0).backward()
    assert nll_S.dtype == torch.float32
    assert not nll_S.requires_grad
    assert tiny.relative_difference(nll_S, exact_S) < tolerance
    assert float(loss.detach()) == pytest.approx(
        float(exact.detach()), rel=tolerance, abs=tolerance * float(exact_S.detach().sum())
    )
    assert tiny.relative_difference(dh_SD, exact_h.grad) < tolerance
    assert tiny.relative_difference(dhead_VD, exact_head.grad) < tolerance


@pytest.mark.parametrize("frozen", [True, False])
def test_a_bfloat16_gradient_is_not_longer_or_shorter_for_the_number_of_tokens(frozen: bool):
    """1/219 rounded to bfloat16 is 1.0025 of it: rounded with the gradient of the logits it would lengthen all of it by that."""
    count, vocab, draws = 219, 5000, torch.Generator().manual_seed(0)
    assert float(torch.tensor(1 / count).bfloat16()) * count > 1.0024
    h_SD = torch.randn(count, WIDTH, generator=draws).bfloat16().requires_grad_()
    head_VD = (torch.randn(vocab, WIDTH, generator=draws) / 10).bfloat16().requires_grad_()
    targets_S = torch.randint(0, vocab, (count,), generator=draws)
    linear = TunableLinear(nn.Linear(WIDTH, vocab, bias=False), choose("auto", "cpu"))
    linear.weight = nn.Parameter(head_VD.detach())
    head = FrozenHead(linear) if frozen else GraphHead(lambda h: F.linear(h, head_VD), [head_VD], TorchKernels())
    weighted_nll(head, h_SD, targets_S, torch.full((count,), 1 / count))[0].backward()
    exact_h = h_SD.detach().double().requires_grad_()
    F.cross_entropy(exact_h @ head_VD.detach().double().T, targets_S).backward()
    assert float(h_SD.grad.double().norm() / exact_h.grad.norm()) == pytest.approx(1.0, abs=4e-4)


@pytest.mark.parametrize("count", COUNTS)
def test_scores_are_log_softmax(count: int):
    h_SD, head_VD, targets_S, _ = _problem(count, torch.float32)
    found_S = token_log_probs(GraphHead(lambda h: F.linear(h, head_VD), [], TorchKernels()), h_SD, targets_S)
    expected_S = torch.log_softmax(h_SD @ head_VD.T, 1).gather(1, targets_S[:, None])[:, 0]
    torch.testing.assert_close(found_S, expected_S.detach(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("count", [1, 15, 17])
def test_a_heads_bias_feels_the_given_positions_alone(count: int):
    """Short chunks are padded for the matrix product; the padding must not reach the bias."""
    h_SD, head_VD, targets_S, weights_S = _problem(count, torch.float32)
    bias_V = torch.zeros(VOCAB, requires_grad=True)
    loss, _ = weighted_nll(
        GraphHead(lambda h: F.linear(h, head_VD, bias_V), [head_VD, bias_V], TorchKernels()), h_SD, targets_S, weights_S
    )
    (found_V,) = torch.autograd.grad(loss, bias_V)
    exact = (F.cross_entropy(h_SD @ head_VD.T + bias_V, targets_S, reduction="none") * weights_S).sum()
    (expected_V,) = torch.autograd.grad(exact, bias_V)
    assert tiny.relative_difference(found_V, expected_V) < 1e-6


def test_a_position_of_weight_zero_gives_exactly_no_gradient():
    h_SD, head_VD, targets_S, _ = _problem(20, torch.float32)
    weights_S = torch.zeros(20)
    weights_S[3] = 1.0
    _, _, dh_SD, _ = _ours(h_SD, head_VD, targets_S, weights_S)
    assert torch.nonzero(dh_SD.abs().sum(1))[:, 0].tolist() == [3]


def test_no_position_at_all_is_a_loss_of_zero():
    loss, nll_S, dh_SD, dhead_VD = _ours(*_problem(0, torch.float32))
    assert float(loss.detach()) == 0.0
    assert len(nll_S) == 0
    assert not dhead_VD.any()
    assert dh_SD.shape == (0, WIDTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
def test_a_confident_token_keeps_the_digits_of_its_gradient(p: float, dtype: torch.dtype):
    """p - 1 at the true class: rounded to bfloat16 before the subtraction it would be wrong by up to 100 %."""
    vocabulary = 10
    logits_V = torch.full((vocabulary,), 0.0)
    logits_V[4] = torch.log(torch.tensor(p / (1 - p) * (vocabulary - 1)))
    logits_V = logits_V.to(dtype)
    exact_V = torch.softmax(logits_V.double(), 0)
    h_SD = torch.ones(1, 1, dtype=dtype, requires_grad=True)
    head_VD = logits_V.detach()[:, None].clone().requires_grad_()
    loss, _ = weighted_nll(
        GraphHead(lambda h: F.linear(h, head_VD), [head_VD], TorchKernels()), h_SD, torch.tensor([4]), torch.ones(1)
    )
    loss.backward()
    found = float(head_VD.grad[4, 0])
    assert found == pytest.approx(float(exact_V[4]) - 1, rel=0.005)


def test_a_soft_cap_takes_part_in_the_gradient(tiny_base: Callable[[str], Path]):
    base = load_base(tiny_base("gemma2"), "fp32")
    h_SD, targets_S = torch.randn(7, 48, requires_grad=True), torch.arange(7)
    loss, _ = weighted_nll(base.language_head(()), h_SD, targets_S, torch.ones(7))
    (found,) = torch.autograd.grad(loss, h_SD)
    expected_loss = F.cross_entropy(
        2.5 * torch.tanh(F.linear(h_SD, base.linears[base.head_name].weight) / 2.5), targets_S, reduction="sum"
    )
    (expected,) = torch.autograd.grad(expected_loss, h_SD)
    assert tiny.relative_difference(found, expected) < 1e-6


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_weights_gradient_is_transformers_own(name: str, tiny_base: Callable[[str], Path]):
    """Full tuning, tied and untied heads, biases, norms and embeddings included."""
    folder = tiny_base(name)
    base = load_base(folder, "fp32")
    trainee = tiny.new_trainee(base, FullWeights(base))
    rows = tiny.random_rows((1, 7, 15))  # within LongRoPE's original length: transformers' batch takes one set of factors
    loss = trainee.forward_backward(pack(rows), 23.0)
    model = tiny.reference(folder)
    expected = tiny.reference_loss(model, rows)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    theirs = {n: p.grad for n, p in model.named_parameters()}
    ours = tiny.gradients(trainee)
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        # A bias on keys moves all scores of a query alike: its true gradient is zero, and what is left is rounding.
        if key.endswith("k_proj.bias"):
            continue
        assert tiny.relative_difference(gradient, theirs[key]) < 2e-5, key


def test_an_embeddings_gradient_is_summed_in_float32(tiny_base: Callable[[str], Path]):
    """A token met 400 times with equal shares: summed in bfloat16, the sum would stop growing at 256 of them."""
    base = load_base(tiny_base("phi3"), "bf16")
    embedding: nn.Module = base.model.get_input_embeddings()
    embedding.weight.requires_grad_(True)
    ids = torch.full((400,), 5)
    embedding(ids).sum().backward()
    assert embedding.weight.grad[5].tolist() == [400.0] * 48
    plain = torch.zeros(tiny.VOCAB, 48, dtype=torch.bfloat16, requires_grad=True)
    F.embedding(ids, plain).sum().backward()
    assert plain.grad[5, 0] == 256  # what torch's own does
    assert torch.count_nonzero(embedding.weight.grad.sum(1)) == 1
