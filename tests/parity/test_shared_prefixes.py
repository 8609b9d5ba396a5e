"""Rows that share what they begin with compute what they compute side by side: kernels, losses, gradients, every precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from kivnun.data.packing import PackedBatch, pack
from kivnun.data.rows import PreferencePair, TokenRow, Where
from kivnun.errors import BaseModelError
from kivnun.model.kernels import Angles, Kernels, NativeKernels, TorchKernels, native_or_reason
from kivnun.model.load import load_base
from kivnun.train.engine import Trainee
from kivnun.train.objectives import DpoObjective, row_sums
from kivnun.train.weights import FullWeights

TinyBase = Callable[[str], Path]
TORCH = TorchKernels()
# Branches of three trees: a prompt that goes on in three, one of them in two; a row alone; a prompt longer than a block of keys.
LENGTHS = [37, 5, 50, 1, 18, 9, 20, 300, 16, 40]
PARENTS = [-1, 0, 0, 2, 2, 0, -1, -1, 7, 7]
HEADS = [(6, 2, 8, None, 0), (8, 4, 64, None, 64), (4, 4, 96, 12, 48), (6, 2, 20, 60, 12), (4, 2, 32, 330, 32)]


@pytest.fixture(scope="module")
def compiled() -> NativeKernels:
    found = native_or_reason()
    assert not isinstance(found, str), found
    return found


def _seen(branch: int) -> list[int]:
    """Return the branches from the root down to this one."""
    return [*(_seen(PARENTS[branch]) if PARENTS[branch] >= 0 else []), branch]


def _parts(heads: int, groups: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    draws = torch.Generator().manual_seed(1)
    return [torch.randn(sum(LENGTHS), n, width, generator=draws).to(dtype) for n in (heads, groups, groups, heads)]


def _angles(rotated: int) -> Angles | None:
    """Return angles of each token, drawn for its place in its row."""
    if not rotated:
        return None
    turns = torch.randn(500, rotated // 2, generator=torch.Generator().manual_seed(2)) * 3
    starts = [sum(LENGTHS[before] for before in _seen(branch)[:-1]) for branch in range(len(LENGTHS))]
    at = torch.cat([torch.arange(start, start + length) for start, length in zip(starts, LENGTHS, strict=True)])
    return Angles(turns[at].cos(), turns[at].sin())


def _both_passes(of: Kernels, parts: list[Tensor], scale: float, window: int | None, angles: Angles | None) -> list[Tensor]:
    q, k, v, dout = parts
    out, lse = of.attention(q, k, v, LENGTHS, scale, window, angles, PARENTS)
    into = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    of.attention_backward(dout, q, k, v, out, lse, LENGTHS, scale, window, angles, into, PARENTS)
    return [out, lse.t(), *into]


def _side_by_side(parts: list[Tensor], scale: float, window: int | None, angles: Angles | None) -> list[Tensor]:
    """Return the same from whole rows, each with all the branches it consists of: outputs of a branch from any of its rows, and
    gradients from one row per branch, in which that branch alone has a gradient of its output, all added up."""
    places = [torch.arange(sum(LENGTHS[:branch]), sum(LENGTHS[: branch + 1])) for branch in range(len(LENGTHS))]
    rows = [torch.cat([places[branch] for branch in _seen(last)]) for last in range(len(LENGTHS))]
    at, lengths = torch.cat(rows), [len(row) for row in rows]
    own = torch.cat([torch.isin(row, places[last]) for last, row in enumerate(rows)])
    turns = None if angles is None else Angles(angles.cos_TR[at].contiguous(), angles.sin_TR[at].contiguous())
    q, k, v, dout = (part[at] for part in parts)
    out, lse = TORCH.attention(q, k, v, lengths, scale, window, turns)
    into = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    TORCH.attention_backward(dout * own[:, None, None], q, k, v, out, lse, lengths, scale, window, turns, into)
    sums = [torch.zeros_like(part, dtype=torch.float64).index_add_(0, at, g.double()) for part, g in zip(parts, into, strict=False)]
    return [out[own], lse.t()[own], *sums]


@pytest.mark.parametrize(("heads", "groups", "width", "window", "rotated"), HEADS)
def test_a_branch_sees_what_its_rows_see(heads: int, groups: int, width: int, window: int | None, rotated: int) -> None:
    parts, angles = _parts(heads, groups, width, torch.float64), _angles(rotated)
    ours, theirs = _both_passes(TORCH, parts, 0.2, window, angles), _side_by_side(parts, 0.2, window, angles)
    for found, expected in zip(ours, theirs, strict=True):
        assert tiny.relative_difference(found, expected) < 1e-6  # the log-sums are kept in float32


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize(("heads", "groups", "width", "window", "rotated"), HEADS)
def test_the_kernels_in_c_agree_on_branches(
    compiled: NativeKernels,
    heads: int,
    groups: int,
    width: int,
    window: int | None,
    rotated: int,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    parts, angles = _parts(heads, groups, width, dtype), _angles(rotated)
    ours, theirs = (_both_passes(of, parts, width**-0.5, window, angles) for of in (compiled, TORCH))
    for found, expected in zip(ours, theirs, strict=True):
        assert tiny.relative_difference(found, expected) < tolerance


def test_a_tree_depends_on_neither_neighbours_nor_threads(compiled: NativeKernels) -> None:
    parts = _parts(6, 2, 40, torch.float32)
    one = _both_passes(compiled, parts, 0.2, None, None)
    torch.set_num_threads(2)
    try:
        assert all(map(torch.equal, one, _both_passes(compiled, parts, 0.2, None, None)))
    finally:
        torch.set_num_threads(1)
    first = sum(LENGTHS[:6])
    q, k, v, _ = (part[:first] for part in parts)
    alone, _ = compiled.attention(q, k, v, LENGTHS[:6], 0.2, None, None, PARENTS[:6])
    assert torch.equal(alone, one[0][:first])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [0, 39, 250, 445])
def test_a_number_that_is_not_finite_reaches_all_who_see_it_and_nobody_else(
    compiled: NativeKernels, at: int, dtype: torch.dtype
) -> None:
    parts = _parts(4, 2, 32, dtype)
    parts[1][at] = float("nan")
    (ours, *_), (theirs, *_) = (_both_passes(of, parts, 0.2, None, None) for of in (compiled, TORCH))
    assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs))
    assert not torch.isfinite(ours).all()


def _rows() -> list[TokenRow]:
    """Rows of one long prompt, of which two have a second prompt in common, and one row that begins otherwise."""
    system, more = tiny.random_ids(19, 1), tiny.random_ids(17, 2)
    beginnings = [system, system + more, tiny.random_ids(18, 3), system + more]
    return [tiny.token_row(ids + tiny.random_ids(4 + n, 9, n), n, 3 + n) for n, ids in enumerate(beginnings)]


def _step(trainee: Trainee, batch: PackedBatch) -> tuple[float, dict[str, Tensor], np.ndarray]:
    loss = trainee.forward_backward(batch, 18.0)
    return loss, tiny.gradients(trainee), trainee.forward(batch)


def _assert_near(shared: Trainee, apart: Trainee, rows: list[TokenRow], tolerance: float, of_gradients: float) -> None:
    """The tolerances that docs/concepts/packing.md states."""
    together = pack(rows, share_prefixes=True)
    assert together.num_tokens == sum(row.length for row in rows) - 19 - 19 - 17
    (loss, gradients, log_probs), (their_loss, theirs, their_log_probs) = _step(shared, together), _step(apart, pack(rows))
    assert loss == pytest.approx(their_loss, rel=tolerance)
    assert tiny.relative_difference(torch.from_numpy(log_probs), torch.from_numpy(their_log_probs)) < tolerance
    for name, gradient in theirs.items():
        assert tiny.relative_difference(gradients[name], gradient) < of_gradients, name


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("name", ["phi3", "phi3_window", "qwen3", "mistral", "phi", "gemma2"])
def test_losses_and_gradients_are_those_of_rows_side_by_side(tiny_base: TinyBase, name: str, kernels: str) -> None:
    shared, apart = (
        tiny.new_trainee(base := load_base(tiny_base(name), "fp32", kernels=kernels), tiny.new_weights(base)) for _ in "12"
    )
    _assert_near(shared, apart, _rows(), 2e-6, 1e-5)


@pytest.mark.parametrize("precision", ["bf16", "nf4", "int8"])
def test_they_are_as_near_as_the_precision_is_fine(tiny_base: TinyBase, precision: str) -> None:
    shared, apart = (tiny.new_trainee(base := load_base(tiny_base("phi3"), precision), tiny.new_weights(base)) for _ in "12")
    _assert_near(shared, apart, _rows(), 4e-3, 3e-2)


def test_sharing_errs_less_than_bf16_does(tiny_base: TinyBase) -> None:
    answers = []
    for precision, share in (("fp32", False), ("bf16", False), ("bf16", True)):
        base = load_base(tiny_base("phi3"), precision)
        _, gradients, log_probs = _step(tiny.new_trainee(base, tiny.new_weights(base)), pack(_rows(), share))
        answers.append((torch.cat([gradient.flatten() for gradient in gradients.values()]), torch.from_numpy(log_probs)))
    for exact, apart, shared in zip(*answers, strict=True):
        assert tiny.relative_difference(shared, apart) < 0.5 * tiny.relative_difference(apart, exact)
        assert tiny.relative_difference(shared, exact) < 1.1 * tiny.relative_difference(apart, exact)


def test_a_whole_model_trains_on_shared_prefixes(tiny_base: TinyBase) -> None:
    shared, apart = (tiny.new_trainee(base := load_base(tiny_base("phi3_tied"), "fp32"), FullWeights(base)) for _ in "12")
    _assert_near(shared, apart, _rows(), 2e-6, 1e-5)


def test_activation_checkpointing_changes_no_bit_of_shared_prefixes(tiny_base: TinyBase) -> None:
    answers = []
    for recompute in (False, True):
        base = load_base(tiny_base("phi3"), "fp32", recompute=recompute)
        answers.append(_step(tiny.new_trainee(base, tiny.new_weights(base)), pack(_rows(), share_prefixes=True)))
    (loss, gradients, _), (their_loss, theirs, _) = answers
    assert loss == their_loss
    assert all(torch.equal(gradients[name], theirs[name]) for name in theirs)


def test_preferences_of_a_shared_prompt_have_the_same_loss_and_gradient(tiny_base: TinyBase) -> None:
    pairs = []
    for number in range(3):
        prompt = tiny.random_ids(20, number)
        sides = [tiny.token_row(prompt + tiny.random_ids(5, number, side), 2 * number + side, 5) for side in range(2)]
        pairs.append(PreferencePair(sides[0], sides[1], number, Where("pairs.jsonl", number + 1)))
    answers = []
    for share in (True, False):
        base, batch = load_base(tiny_base("phi3"), "fp32"), pack(pairs, share)
        plain = tiny.new_trainee(base, tiny.new_weights(base, stirred=False))
        sums = row_sums(torch.from_numpy(plain.forward(batch)), batch).view(-1, 2).tolist()
        objective = DpoObjective(0.3, {row: (a, b) for row, (a, b) in zip(batch.rows[::2], sums, strict=True)})
        trainee = tiny.new_trainee(base, tiny.new_weights(base), objective)
        answers.append((trainee.forward_backward(batch, 3.0), tiny.gradients(trainee), batch.num_tokens))
    (loss, gradients, tokens), (their_loss, theirs, their_tokens) = answers
    assert tokens == their_tokens - 3 * 19
    assert loss == pytest.approx(their_loss, rel=1e-6)
    for name, gradient in theirs.items():
        assert tiny.relative_difference(gradients[name], gradient) < 1e-5, name


def test_rows_that_turn_by_other_factors_do_not_share(tiny_base: TinyBase) -> None:
    """A prompt of a long row is rotated by LongRoPE's long factors, the same prompt of a short row by the short ones."""
    system = tiny.random_ids(18, 1)
    rows = [tiny.token_row(system + tiny.random_ids(count, 2), number, count) for number, count in enumerate((4, 30))]
    batch = pack(rows, share_prefixes=True)
    base = load_base(tiny_base("phi4_mini"), "fp32")
    with pytest.raises(BaseModelError, match=r"rows of more than 24 tokens are rotated by other factors"):
        tiny.new_trainee(base, tiny.new_weights(base)).forward(batch)
    fixed = load_base(tiny_base("phi4_mini"), "fp32", rope_factors="long")
    trainee = tiny.new_trainee(fixed, tiny.new_weights(fixed))
    for found, expected in zip(trainee.forward(batch), trainee.forward(pack(rows)), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
