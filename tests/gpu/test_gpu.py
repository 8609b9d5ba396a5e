"""The same facts on CUDA: packed = alone, steps as on the CPU, states that go on, answers that stay. Tolerances instead of bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from kivnun.data.packing import pack
from kivnun.model.attention import _one_row
from kivnun.model.dropout import Mask, dropped, token_keys
from kivnun.model.generate import SamplingParams, generate
from kivnun.model.kernels import choose, triton_or_reason
from kivnun.model.load import load_base
from kivnun.model.varlen import Bounds, serving, varlen_or_reason
from kivnun.train.engine import TorchEngine, Trainee
from kivnun.train.objectives import LikelihoodObjective
from kivnun.train.optim import MuonSettings
from kivnun.train.weights import FullWeights

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is false"),
]

TinyBase = Callable[[str], Path]
# fp32 on CUDA differs from the CPU by summation order; bf16 by its eight bits.
TOLERANCE = {"fp32": 2e-5, "bf16": 4e-2}
ROWS = [tiny.random_ids(length) for length in (1, 2, 12, 13, 24, 25, 100)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_packed_rows_are_rows_alone_and_those_of_the_cpu(name: str, precision: str, tiny_base: TinyBase):
    base, exact = load_base(tiny_base(name), precision, DEVICE), load_base(tiny_base(name), "fp32")
    tolerance = TOLERANCE[precision]
    for ids, logits in zip(ROWS, tiny.packed_logits(base, ROWS), strict=True):
        assert tiny.relative_difference(logits, tiny.packed_logits(base, [ids])[0]) < tolerance
        assert tiny.relative_difference(logits, tiny.packed_logits(exact, [ids])[0]) < tolerance


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_token_changed_in_one_row_changes_no_other_row(precision: str, tiny_base: TinyBase):
    base = load_base(tiny_base("phi3_window"), precision, DEVICE)
    before = tiny.packed_logits(base, ROWS)
    other = [*ROWS[:-1], [*ROWS[-1][:-1], ROWS[-1][-1] % (tiny.VOCAB - 1) + 1]]
    after = tiny.packed_logits(base, other)
    assert all(torch.equal(x, y) for x, y in zip(before[:-1], after[:-1], strict=True))
    assert not torch.equal(before[-1], after[-1])


def _trainee(folder: Path, kind: str, precision: str, device: str) -> Trainee:
    base = load_base(folder, precision, device)
    weights = FullWeights(base) if kind == "full" else tiny.new_weights(base, kind, dropout=0.3)  # type: ignore[arg-type]
    return tiny.new_trainee(base, weights, max_grad_norm=1.0)


def _losses(trainee: Trainee, steps: int, rate: float = 1e-3) -> list[float]:
    losses = []
    for step in range(steps):
        rows = [tiny.token_row(tiny.random_ids(length, step), at) for at, length in enumerate((2, 9, 60))]
        total = sum(row.total_weight for row in rows)
        losses.append(sum(trainee.forward_backward(pack(part), total) for part in (rows[:1], rows[1:])))
        trainee.optim_step(rate)
    return losses


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("name", ["phi3", "phi4_mini", "gemma2"])
def test_steps_have_the_losses_of_the_cpu(name: str, kind: str, precision: str, tiny_base: TinyBase):
    """Dropout included: its masks are the same on every device."""
    here = _losses(_trainee(tiny_base(name), kind, precision, DEVICE), 8)
    there = _losses(_trainee(tiny_base(name), kind, "fp32", "cpu"), 8)
    assert here == pytest.approx(there, rel=1e-4 if precision == "fp32" else 3e-2)


def test_gradients_are_those_of_the_cpu(tiny_base: TinyBase):
    rows = tiny.random_rows((1, 7, 50))
    both: list[dict[str, Tensor]] = []
    for device in (DEVICE, "cpu"):
        trainee = _trainee(tiny_base("phi3"), "dora", "fp32", device)
        trainee.forward_backward(pack(rows), 58.0)
        both.append(tiny.gradients(trainee))
    for name, gradient in both[0].items():
        assert tiny.relative_difference(gradient, both[1][name]) < 1e-4, name


def test_dropout_masks_are_those_of_the_cpu_to_the_bit():
    rows_T, positions_T = torch.arange(40) // 10, torch.arange(40) % 10
    x = torch.ones(40, 65)
    here = dropped(x.to(DEVICE), Mask(token_keys(1, 2, rows_T.to(DEVICE), positions_T.to(DEVICE)), 3, 0.3))
    assert torch.equal(here.cpu(), dropped(x, Mask(token_keys(1, 2, rows_T, positions_T), 3, 0.3)))


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_a_saved_state_goes_on(kind: str, tiny_base: TinyBase, tmp_path: Path):
    straight, resumed = (_trainee(tiny_base("phi3"), kind, "bf16", DEVICE) for _ in range(2))
    _losses(straight, 3)
    straight.save(tmp_path)
    resumed.load(tmp_path)
    for name, parameter in straight.weights.parameters().items():
        assert parameter.device.type == DEVICE
        assert torch.equal(parameter, resumed.weights.parameters()[name])
    assert _losses(resumed, 3) == pytest.approx(_losses(straight, 3), rel=1e-3)


def test_muon_steps_on_the_device(tiny_base: TinyBase):
    base = load_base(tiny_base("phi3"), "bf16", DEVICE)
    settings = MuonSettings(momentum=0.95, weight_decay=0.0, adamw_share=0.5, adamw=tiny.ADAMW)
    losses = _losses(TorchEngine(base).open(FullWeights(base), LikelihoodObjective(), settings, 1.0), 6, 3e-3)
    assert all(torch.isfinite(torch.tensor(losses)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["phi3_window", "phi4_mini", "gemma2"])
def test_answers_are_those_of_the_cpu_and_of_rows_alone(name: str, temperature: float, tiny_base: TinyBase):
    prompts = [tiny.random_ids(length) for length in (1, 13, 20, 30)]
    params = SamplingParams(10, (), temperature=temperature, seed=3)
    base = load_base(tiny_base(name), "fp32", DEVICE)
    answers = generate(base, prompts, params)
    assert answers == generate(load_base(tiny_base(name), "fp32"), prompts, params)
    assert generate(base, prompts[:1], params) == answers[:1]


def test_greedy_answers_are_transformers_on_the_device(tiny_base: TinyBase):
    folder = tiny_base("phi4_mini")
    model = tiny.reference(folder).to(DEVICE)
    prompt = tiny.random_ids(20)
    ids = torch.tensor([prompt], device=DEVICE)
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10, eos_token_id=None)
    assert generate(load_base(folder, "fp32", DEVICE), [prompt], SamplingParams(10, ()))[0] == theirs[0, 20:].tolist()


def test_attention_is_one_call_for_the_pack_or_says_why_not():
    whole = varlen_or_reason(torch.device(DEVICE))
    print(whole)
    assert not isinstance(whole, str), whole


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize(("heads", "groups", "width"), [(8, 2, 64), (4, 4, 96), (6, 2, 128)])
def test_one_call_for_the_pack_is_attention_row_by_row(heads: int, groups: int, width: int, window: int | None):
    whole = serving(torch.empty(1, heads, width, dtype=torch.bfloat16, device=DEVICE), window)
    if whole is None:
        pytest.skip(f"this torch does not serve it: {varlen_or_reason(torch.device(DEVICE))}")
    lengths = [5, 1, 300, 16, 133]
    draws = torch.Generator().manual_seed(0)
    sizes = ((sum(lengths), n, width) for n in (heads, groups, groups, heads))
    q, k, v, dout = (torch.randn(size, generator=draws).to(DEVICE, torch.bfloat16) for size in sizes)
    found = []
    for call in ("whole", "rows"):
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        if call == "whole":
            out = whole(given[0], given[1], given[2], Bounds.of(lengths, q.device), width**-0.5, window)
        else:
            parts = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in given), strict=True)
            out = torch.cat([_one_row(*part, width**-0.5, window, None) for part in parts], dim=1).transpose(0, 1)
        found.append([out, *torch.autograd.grad(out, given, dout)])
    for ours, theirs in zip(*found, strict=True):
        assert tiny.relative_difference(ours, theirs) < 1e-2


def test_kernels_in_triton_are_chosen_or_say_why_not():
    found = triton_or_reason()
    if isinstance(found, str) and "cannot be imported" in found:
        pytest.skip(found)
    assert not isinstance(found, str), found
    assert choose("auto", DEVICE) is found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_kernels_in_triton_train_as_torchs_do(kind: str, precision: str, tiny_base: TinyBase):
    if isinstance(triton_or_reason(), str):
        pytest.skip(str(triton_or_reason()))
    found = []
    for device, kernels in ((DEVICE, "auto"), (DEVICE, "torch"), ("cpu", "torch")):
        base = load_base(tiny_base("phi4_mini"), precision, device, kernels=kernels)
        trainee = tiny.new_trainee(base, tiny.new_weights(base, kind, dropout=0.2))  # type: ignore[arg-type]
        trainee.forward_backward(pack(tiny.random_rows((5, 30, 2))), 37.0)
        found.append(tiny.gradients(trainee))
    for name, gradient in found[0].items():
        # In 16 bits two ways to round are as far apart as torch is from itself on another device.
        itself = tiny.relative_difference(found[1][name], found[2][name])
        allowed = 1e-4 if precision == "fp32" else 1.5 * itself + 0.02
        assert tiny.relative_difference(gradient, found[1][name]) < allowed, name


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_activation_checkpointing_changes_no_gradient_beyond_rounding(precision: str, tiny_base: TinyBase):
    found = []
    for recompute in (False, True):
        base = load_base(tiny_base("phi3"), precision, DEVICE, recompute=recompute)
        trainee = tiny.new_trainee(base, tiny.new_weights(base, "lora", dropout=0.2))
        trainee.forward_backward(pack(tiny.random_rows((5, 30, 2))), 37.0)
        found.append(tiny.gradients(trainee))
    for name, gradient in found[0].items():
        assert tiny.relative_difference(gradient, found[1][name]) < 1e-2, name
