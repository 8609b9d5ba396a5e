"""DoRA's own facts: nothing changes at the start, the magnitude learns in float32, the row norms hold under cancellation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

import tiny
from kivnun.data.packing import pack
from kivnun.model.dropout import Mask, dropped
from kivnun.model.kernels import Kernels, choose
from kivnun.model.linear import DoraSite, DropoutDraw, LoraSite, TunableLinear, dora_row_norm, row_squares
from kivnun.model.load import load_base

TinyBase = Callable[[str], Path]


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _linear(weight_OI: Tensor, bias_O: Tensor | None = None, kernels: Kernels | None = None) -> TunableLinear:
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=bias_O is not None)
    linear.weight = nn.Parameter(weight_OI, requires_grad=False)
    if bias_O is not None:
        linear.bias = nn.Parameter(bias_O, requires_grad=False)
    return TunableLinear(linear, kernels or choose("auto", "cpu"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_new_dora_computes_what_the_base_computes(precision: str, tiny_base: TinyBase):
    base = load_base(tiny_base("phi3"), precision)
    rows = [tiny.random_ids(length) for length in (3, 30)]
    plain = tiny.packed_logits(base, rows)
    with base.using(tiny.new_weights(base, "dora", stirred=False).sites()):
        adapted = tiny.packed_logits(base, rows)
    for found, expected in zip(adapted, plain, strict=True):
        assert tiny.relative_difference(found, expected) < 1e-6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_magnitude_moves_and_stays_float32(precision: str, tiny_base: TinyBase):
    base = load_base(tiny_base("phi3"), precision)
    trainee = tiny.new_trainee(base, tiny.new_weights(base, "dora", stirred=False))
    parameters = trainee.weights.parameters()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    batch = pack(tiny.random_rows((5, 20)))
    for _ in range(20):
        trainee.forward_backward(batch, 25.0)
        trainee.optim_step(1e-4)
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.float32
        assert (parameter != before[name]).float().mean() > 0.99, name


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_small_rate_still_moves_every_element_on_a_bfloat16_base(kind: str, tiny_base: TinyBase):
    base = load_base(tiny_base("phi3"), "bf16")
    trainee = tiny.new_trainee(base, tiny.new_weights(base, kind, targets=["down_proj"]))  # type: ignore[arg-type]
    parameters = trainee.weights.parameters()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    batch = pack(tiny.random_rows((10,)))
    for _ in range(200):
        trainee.forward_backward(batch, 10.0)
        trainee.optim_step(1e-5)
    moved = sum(int((p != before[name]).sum()) for name, p in parameters.items())
    assert moved > 0.99 * sum(p.numel() for p in parameters.values())


@pytest.mark.parametrize(("left", "tolerance"), [(2.0, 1e-6), (0.5, 1e-5), (0.1, 1e-4), (0.01, 1e-2)])
def test_row_norms_equal_the_dense_ones_even_where_the_delta_undoes_the_row(left: float, tolerance: float):
    """W + s B A is `left` times s B A and some noise: the less is left, the more digits cancel."""
    a_RI, b_OR = _draw(8, 40), _draw(24, 8, seed=1)
    weight_OI = (left - 1) * 2.0 * (b_OR @ a_RI) + _draw(24, 40, seed=2) * 0.01
    dense_O = (weight_OI.double() + 2.0 * (b_OR.double() @ a_RI.double())).norm(dim=1)
    found_O = dora_row_norm(weight_OI, a_RI, b_OR, 2.0, row_squares(weight_OI), choose("auto", "cpu"))
    assert found_O.dtype == torch.float32
    assert float(((found_O.double() - dense_O) / dense_O).abs().max()) < tolerance


def test_row_norms_of_a_bfloat16_weight_are_those_of_its_values():
    weight_OI, a_RI, b_OR = _draw(24, 40).bfloat16(), _draw(3, 40, seed=1) * 0.1, _draw(24, 3, seed=2) * 0.1
    dense_O = (weight_OI.double() + 2.0 * (b_OR.double() @ a_RI.double())).norm(dim=1)
    found_O = dora_row_norm(weight_OI, a_RI, b_OR, 2.0, row_squares(weight_OI), choose("auto", "cpu"))
    assert float(((found_O.double() - dense_O) / dense_O).abs().max()) < 1e-3


def test_norms_are_held_constant_in_the_gradient():
    weight_OI, x_TI = _draw(24, 40), _draw(5, 40, seed=1)
    site = DoraSite(
        nn.Parameter(_draw(3, 40, seed=2)),
        nn.Parameter(_draw(24, 3, seed=3)),
        nn.Parameter(_draw(24, seed=4)),
        0.5,
        DropoutDraw(0.0, 0),
    )
    site(x_TI, _linear(weight_OI)).square().sum().backward()
    a, b, m = (p.detach().double().requires_grad_() for p in (site.a_RI, site.b_OR, site.magnitude_O))
    norm_O = (weight_OI.double() + 0.5 * (b @ a)).norm(dim=1).detach()
    y_TO = m / norm_O * (x_TI.double() @ (weight_OI.double() + 0.5 * (b @ a)).T)
    y_TO.square().sum().backward()
    for found, expected in ((site.a_RI, a), (site.b_OR, b), (site.magnitude_O, m)):
        assert tiny.relative_difference(found.grad, expected.grad) < 1e-5


KEYS = torch.arange(60) * 7919


def _sites(rate: float) -> tuple[Tensor, Tensor, Tensor, LoraSite, DoraSite]:
    weight_OI, bias_O, x_TI = _draw(24, 40), _draw(24, seed=5), _draw(60, 40, seed=1)
    a, b, m = nn.Parameter(_draw(3, 40, seed=2)), nn.Parameter(_draw(24, 3, seed=3)), nn.Parameter(_draw(24, seed=4).abs())
    draw = DropoutDraw(rate, 99, KEYS)
    return weight_OI, bias_O, x_TI, LoraSite(a, b, 0.5, draw), DoraSite(a, b, m, 0.5, draw)


def test_lora_drops_the_adapters_input_alone():
    weight_OI, bias_O, x_TI, site, _ = _sites(0.3)
    mask_TI = dropped(torch.ones_like(x_TI), Mask(KEYS, 99, 0.3))
    expected = F.linear(x_TI, weight_OI, bias_O) + 0.5 * (x_TI * mask_TI) @ site.a_RI.T @ site.b_OR.T
    assert tiny.relative_difference(site(x_TI, _linear(weight_OI, bias_O)), expected) < 1e-6


def test_dora_with_dropout_is_pefts_formula_under_the_same_mask():
    weight_OI, bias_O, x_TI, _, site = _sites(0.3)
    base = nn.Linear(40, 24)
    lora_a, lora_b = nn.Linear(40, 3, bias=False), nn.Linear(3, 24, bias=False)
    layer = DoraLinearLayer(fan_in_fan_out=False)
    with torch.no_grad():
        for parameter, value in (
            (base.weight, weight_OI),
            (base.bias, bias_O),
            (lora_a.weight, site.a_RI),
            (lora_b.weight, site.b_OR),
        ):
            parameter.copy_(value)
    layer.weight = nn.Parameter(site.magnitude_O.detach().clone())
    dropped_TI = x_TI * dropped(torch.ones_like(x_TI), Mask(KEYS, 99, 0.3))
    correction = layer(dropped_TI, lora_A=lora_a, lora_B=lora_b, scaling=0.5, base_layer=base)
    assert tiny.relative_difference(site(x_TI, _linear(weight_OI, bias_O)), base(x_TI) + correction) < 1e-6


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_is_the_same_in_any_pack_and_changes_with_the_step(kind: str, tiny_base: TinyBase):
    base = load_base(tiny_base("phi3"), "fp32")
    rows = tiny.random_rows((4, 9, 30))

    def gathered(parts: list[list[int]], after: int) -> dict[str, Tensor]:
        trainee = tiny.new_trainee(base, tiny.new_weights(base, kind, dropout=0.4))  # type: ignore[arg-type]
        trainee.steps = after
        for part in parts:
            trainee.forward_backward(pack([rows[at] for at in part]), 43.0)
        return tiny.gradients(trainee)

    together, apart, later = gathered([[0, 1, 2]], 0), gathered([[2], [1, 0]], 0), gathered([[0, 1, 2]], 1)
    for name, gradient in together.items():
        assert tiny.relative_difference(apart[name], gradient) < 1e-5
        assert tiny.relative_difference(later[name], gradient) > 1e-2


def test_scoring_and_sampling_never_drop(tiny_base: TinyBase):
    base = load_base(tiny_base("phi3"), "fp32")
    with_dropout, without = (tiny.new_trainee(base, tiny.new_weights(base, dropout=rate)) for rate in (0.5, 0.0))
    batch = pack(tiny.random_rows((9,)))
    with_dropout.forward_backward(batch, 9.0)
    assert (with_dropout.forward(batch) == without.forward(batch)).all()


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_written_gradients_are_autograds_in_float64(kind: str, rate: float):
    weight_OI, bias_O, x_TI, lora, dora = _sites(rate)
    site = lora if kind == "lora" else dora
    site.dropout.keys_T = KEYS if rate else None
    x_TI.requires_grad_()
    pull_TO = _draw(60, 24, seed=9)
    (site(x_TI, _linear(weight_OI, bias_O)) * pull_TO).sum().backward()
    trained = [site.a_RI, site.b_OR] + ([dora.magnitude_O] if kind == "dora" else [])
    x, a, b, *m = (p.detach().double().requires_grad_() for p in (x_TI, *trained))
    mask = dropped(torch.ones(60, 40), Mask(KEYS, 99, rate)).double() if rate else 1.0
    w, delta = weight_OI.double(), 0.5 * (x * mask) @ a.T @ b.T
    y = x @ w.T + delta + bias_O.double()
    if m:
        ratio = m[0] / (w + 0.5 * b @ a).norm(dim=1).detach()
        y = x @ w.T + (ratio - 1) * ((x * mask) @ w.T) + ratio * delta + bias_O.double()
    (y * pull_TO.double()).sum().backward()
    for found, expected in zip((x_TI, *trained), (x, a, b, *m), strict=True):
        assert tiny.relative_difference(found.grad, expected.grad) < 2e-6
