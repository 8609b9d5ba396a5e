"""The kernels in C against those in torch, and those against autograd in float64: every operation, odd sizes, both precisions."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from kivnun.data.packing import pack
from kivnun.errors import BaseModelError
from kivnun.model import kernels as kernels_package
from kivnun.model.blocks import Stream, normed_sum
from kivnun.model.dropout import Mask
from kivnun.model.kernels import Angles, Kernels, NativeKernels, TorchKernels, choose, native, native_or_reason
from kivnun.model.kernels.reference import split_sum
from kivnun.model.load import load_base

TORCH = TorchKernels()
DTYPES = [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)]
LENGTHS = [5, 1, 40, 16, 133]
HEADS = [(6, 2, 8, None, 0), (8, 4, 64, None, 64), (4, 4, 96, 12, 48), (6, 2, 20, 7, 12), (5, 1, 16, None, 16)]


@pytest.fixture(scope="module")
def compiled() -> NativeKernels:
    found = native_or_reason()
    assert not isinstance(found, str), found
    return found


def _draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def _qkv(heads: int, groups: int, width: int, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    qkv_TO = _draw(sum(LENGTHS), (heads + 2 * groups) * width).to(dtype)
    return qkv_TO, _views(qkv_TO, heads, groups, width)


def _views(x_TO: Tensor, heads: int, groups: int, width: int) -> tuple[Tensor, ...]:
    return tuple(x.view(len(x_TO), -1, width) for x in x_TO.split([heads * width, groups * width, groups * width], dim=1))


def _angles(rotated: int) -> Angles | None:
    turns = _draw(sum(LENGTHS), rotated // 2, seed=3, scale=3.0)
    return Angles(turns.cos(), turns.sin()) if rotated else None


def _gate_backward(of: Kernels, dh: Tensor, gu: Tensor) -> Tensor:
    place = gu.clone()
    of.gate_backward_(dh, place)
    return place


def _parts(given: tuple[Tensor | None, ...]) -> list[Tensor]:
    return [part for part in given if part is not None]


def _pointwise(of: Kernels, dtype: torch.dtype, width: int, rows: slice = slice(0, 37)) -> list[Tensor]:
    """Return what each pointwise kernel makes of the same rows."""
    drawn = _draw(37, width), _draw(37, width, seed=2), _draw(37, 2 * width, seed=4, scale=4.0), _draw(37, width, seed=6, scale=4.0)
    x, dy, gu, logits = (t.to(dtype)[rows] for t in drawn)
    w, targets = _draw(width, seed=1).to(dtype), (torch.arange(37) * 5 % width)[rows]
    mask = Mask((torch.arange(37) * 99)[rows], -5, 0.25)
    (y, scale), z, weights = of.rms_norm(x, w, 1e-5), logits.clone(), _draw(37, seed=7)[rows]
    return [
        y, scale, *_parts(of.add_rms_norm(x, gu[:, :width] / 512, dy, w, 1e-5)), of.rms_norm_backward(dy, x, w, scale),
        of.rms_norm_backward(dy, x, w, scale, gu[:, :width]), of.gate(gu), _gate_backward(of, dy, gu),
        *of.nll_(z, targets, weights, dtype), of.log_prob(logits, targets),
        of.scale_columns(x, w.float()), of.dropped(x, mask), of.dropped(x, mask, gu.clone()[:, width:]),
    ]  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("width", [1, 5, 16, 48, 77, 128, 203])
def test_pointwise_kernels_agree(compiled: NativeKernels, width: int, dtype: torch.dtype, tolerance: float) -> None:
    for found, expected in zip(_pointwise(compiled, dtype, width), _pointwise(TORCH, dtype, width), strict=True):
        assert tiny.relative_difference(found, expected) < tolerance
    x, dy = _draw(37, width).to(dtype), _draw(37, width, seed=2).to(dtype)
    assert tiny.relative_difference(compiled.column_dots(x, dy), TORCH.column_dots(x, dy)) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pointwise_row_depends_on_neither_neighbours_nor_threads(
    compiled: NativeKernels, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    together = _pointwise(compiled, dtype, 77)
    threads(2)
    assert all(map(torch.equal, together, _pointwise(compiled, dtype, 77)))
    for row in (0, 20, 36):
        alone = _pointwise(compiled, dtype, 77, slice(row, row + 1))
        assert all(torch.equal(x, y[row : row + 1]) for x, y in zip(alone, together, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_of_any_size_are_torchs(compiled: NativeKernels, dtype: torch.dtype) -> None:
    """Far out a sigmoid is 0 or 1; what is not finite stays so."""
    g = torch.tensor([-3e38, -1e4, -200.0, -90.0, -80.0, -40.0, -0.0, 40.0, 90.0, 1e4, 3e38, float("inf"), float("nan")])
    gu = torch.cat([g, torch.ones_like(g)])[None].to(dtype)
    found, expected = compiled.gate(gu)[0].float(), F.silu(gu[0, : len(g)].double()).float()
    assert torch.allclose(found[1:-1], expected[1:-1], rtol=4e-3 if dtype == torch.bfloat16 else 4e-6, atol=1e-30)
    assert found[-1].isnan()
    gradient = _gate_backward(compiled, torch.ones(1, len(g)).to(dtype), gu)[0].float()
    assert torch.isfinite(gradient[1:10]).all()
    assert gradient[len(g) - 1].isnan()


@pytest.mark.parametrize("kernels", [TORCH, "compiled"], ids=["torch", "native"])
def test_norm_and_gate_have_autograds_gradients(kernels: Kernels | str, compiled: NativeKernels) -> None:
    of = compiled if isinstance(kernels, str) else kernels
    x, w, dy, gu, dh = _draw(9, 48), _draw(48, seed=1), _draw(9, 48, seed=2), _draw(9, 64, seed=3, scale=4.0), _draw(9, 32, seed=4)
    exact, wide = x.double().requires_grad_(), gu.double().requires_grad_()
    (w.double() * exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)).backward(dy.double())
    (F.silu(wide[:, :32]) * wide[:, 32:]).backward(dh.double())
    _, scale = of.rms_norm(x, w, 1e-5)
    assert tiny.relative_difference(of.rms_norm_backward(dy, x, w, scale), exact.grad) < 1e-6
    assert tiny.relative_difference(_gate_backward(of, dh, gu), wide.grad) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", [TORCH, "compiled"], ids=["torch", "native"])
def test_a_sum_with_its_norm_is_the_two_one_after_the_other(
    kernels: Kernels | str, dtype: torch.dtype, compiled: NativeKernels
) -> None:
    of = compiled if isinstance(kernels, str) else kernels
    h, delta, w = _draw(9, 45).to(dtype), _draw(9, 64, seed=1).to(dtype)[:, :45], _draw(45, seed=2).to(dtype)
    for rest in (None, None if dtype == torch.float32 else (_draw(9, 45, seed=3) / 512).to(dtype)):
        total, over = split_sum(h, rest, delta)
        expected = _parts((total, over, *of.rms_norm(total, w, 1e-5)))
        assert all(map(torch.equal, _parts(of.add_rms_norm(h, rest, delta, w, 1e-5)), expected))


@pytest.mark.parametrize("kernels", [TORCH, "compiled"], ids=["torch", "native"])
def test_many_shares_add_up_in_two_bfloat16_numbers_as_in_float32(kernels: Kernels | str, compiled: NativeKernels) -> None:
    of = compiled if isinstance(kernels, str) else kernels
    shares, w = _draw(64, 9, 48).bfloat16(), torch.ones(48, dtype=torch.bfloat16)
    stream, plain = Stream(shares[0]), shares[0]
    for share in shares[1:]:
        stream, _ = normed_sum(stream._replace(delta_TD=share), w, 1e-5, of)
        plain = plain + share
    assert stream.rest_TD is not None
    assert tiny.relative_difference(stream.h_TD.double() + stream.rest_TD.double(), shares.double().sum(0)) < 4e-5
    assert tiny.relative_difference(plain, shares.double().sum(0)) > 2e-3


@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)], ids=["both", "sum", "norm"])
@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("kernels", [TORCH, "compiled"], ids=["torch", "native"])
def test_a_sum_with_its_norm_has_autograds_gradients(
    kernels: Kernels | str, with_delta: bool, used: tuple[int, ...], compiled: NativeKernels
) -> None:
    of = compiled if isinstance(kernels, str) else kernels
    given = [_draw(9, 48), *([_draw(9, 48, seed=1)] if with_delta else []), _draw(48, seed=2)]
    gradients = [_draw(9, 48, seed=seed) for seed in (3, 4)]
    traced, exact = [x.requires_grad_() for x in given], [x.detach().double().requires_grad_() for x in given]
    stream, y = normed_sum(Stream(traced[0], None, traced[1] if with_delta else None), traced[-1], 1e-5, of)
    ours = stream.h_TD, y
    total = sum(exact[:-1])
    theirs = total, exact[-1] * total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5)
    torch.autograd.backward([ours[i] for i in used], [gradients[i] for i in used])
    torch.autograd.backward([theirs[i] for i in used], [gradients[i].double() for i in used])
    for found, expected in zip(traced, exact, strict=True):
        assert (found.grad is None) == (expected.grad is None)
        assert found.grad is None or tiny.relative_difference(found.grad, expected.grad) < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("heads", "groups", "width", "window", "rotated"), HEADS)
def test_attention_agrees_forward_and_backward(
    compiled: NativeKernels,
    heads: int,
    groups: int,
    width: int,
    window: int | None,
    rotated: int,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    qkv, parts = _qkv(heads, groups, width, dtype)
    dout = _draw(sum(LENGTHS), heads, width, seed=7).to(dtype)
    given = (LENGTHS, width**-0.5, window, _angles(rotated))
    answers = []
    for of in (compiled, TORCH):
        out, lse = of.attention(*parts, *given)
        dqkv = torch.empty_like(qkv)
        of.attention_backward(dout, *parts, out, lse, *given, _views(dqkv, heads, groups, width))  # type: ignore[arg-type]
        answers.append((out, lse, dqkv))
    for found, expected in zip(*answers, strict=True):
        assert tiny.relative_difference(found, expected) < tolerance


def _both_passes(
    of: Kernels,
    parts: tuple[Tensor, ...],
    lengths: list[int],
    window: int | None = None,
    angles: Angles | None = None,
    scale: float = 0.125,
) -> tuple[Tensor, ...]:
    """Return what attention of these queries, keys and values gives, and the three gradients of a drawn dout."""
    q, k, v = parts
    dout, into = _draw(*q.shape, seed=7).to(q.dtype), tuple(torch.empty_like(x) for x in parts)
    out, lse = of.attention(q, k, v, lengths, scale, window, angles)
    of.attention_backward(dout, q, k, v, out, lse, lengths, scale, window, angles, into)  # type: ignore[arg-type]
    return out, *into


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("window", [None, 40, 300])
@pytest.mark.parametrize("scale", [0.125, 2.0])
def test_attention_of_long_rows_agrees(
    compiled: NativeKernels, scale: float, window: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    """Longer than a block of keys; with scores up to a hundred apart."""
    parts = tuple(_draw(1100, heads, 40, seed=seed).to(dtype) for seed, heads in enumerate((4, 2, 2)))
    ours, theirs = (_both_passes(of, parts, [700, 400], window, None, scale) for of in (compiled, TORCH))
    for found, expected in zip(ours, theirs, strict=True):
        assert tiny.relative_difference(found, expected) < tolerance


@pytest.fixture(scope="module", params=["-mno-avx512bf16", "-mno-avx512f", "-mno-avx"])
def lesser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NativeKernels:
    """The kernels as a processor without some instructions has them."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("takes parts of x86's instructions away")
    library = tmp_path_factory.mktemp("lesser") / "kernels.so"
    native._compile(native._compiler(), (*native.FLAGS, request.param), sorted(native.SOURCES.glob("*.c")), library)
    return NativeKernels(ctypes.CDLL(str(library)), request.param)


def test_pointwise_kernels_agree_on_lesser_processors(lesser: NativeKernels) -> None:
    for dtype, tolerance in DTYPES:
        for found, expected in zip(_pointwise(lesser, dtype, 77), _pointwise(TORCH, dtype, 77), strict=True):
            assert tiny.relative_difference(found, expected) < tolerance


def test_attention_agrees_on_lesser_processors(lesser: NativeKernels) -> None:
    for dtype, tolerance in DTYPES:
        for heads, groups, width, window, rotated in HEADS:
            _, parts = _qkv(heads, groups, width, dtype)
            ours, theirs = (_both_passes(of, parts, LENGTHS, window, _angles(rotated)) for of in (lesser, TORCH))
            for found, expected in zip(ours, theirs, strict=True):
                assert tiny.relative_difference(found, expected) < tolerance


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_attention_in_bf16_errs_less_than_torchs(compiled: NativeKernels, spread: float) -> None:
    """Both against float64 of the same numbers; queries and keys rotated as transformers does it, in bf16."""
    lengths, turns = [300, 17], _draw(317, 32, seed=3, scale=3.0)
    angles = Angles(turns.cos(), turns.sin())
    parts = tuple((_draw(317, n, 64, seed=seed) * by).bfloat16() for seed, n, by in ((0, 8, spread), (1, 4, spread), (2, 4, 1.0)))
    exact = _both_passes(TORCH, tuple(x.double() for x in parts), lengths, None, angles)
    ours = _both_passes(compiled, parts, lengths, None, angles)
    for found, theirs, expected in zip(ours, _torchs(parts, lengths, angles), exact, strict=True):
        assert tiny.relative_difference(found, expected) < tiny.relative_difference(theirs, expected)


def _torchs(parts: tuple[Tensor, ...], lengths: list[int], angles: Angles) -> tuple[Tensor, ...]:
    """`_both_passes` by `scaled_dot_product_attention` and autograd."""
    q, k, v = (x.clone().requires_grad_() for x in parts)
    of_rows = zip(*(x.split(lengths) for x in (angles.turned(q), angles.turned(k), v)), strict=True)
    outs = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in row), is_causal=True, scale=0.125, enable_gqa=True)
        for row in of_rows
    ]
    out = torch.cat([x[0].transpose(0, 1) for x in outs])
    return out, *torch.autograd.grad(out, (q, k, v), _draw(*q.shape, seed=7).to(q.dtype))


@pytest.mark.parametrize(("heads", "groups", "width", "window", "rotated"), HEADS)
def test_attentions_gradient_is_autograds(heads: int, groups: int, width: int, window: int | None, rotated: int) -> None:
    qkv, _ = _qkv(heads, groups, width, torch.float64)
    dout = _draw(sum(LENGTHS), heads, width, seed=7).double()
    given = (LENGTHS, width**-0.5, window, _angles(rotated))
    traced = qkv.clone().requires_grad_()
    out, lse = TORCH.attention(*_views(traced, heads, groups, width), *given)
    out.backward(dout)
    dqkv = torch.empty_like(qkv)
    plain = _views(qkv, heads, groups, width)
    exact_lse = lse.detach()
    TORCH.attention_backward(dout, *plain, out.detach(), exact_lse, *given, _views(dqkv, heads, groups, width))  # type: ignore[arg-type]
    assert tiny.relative_difference(dqkv, traced.grad) < 1e-6  # the log-sums are kept in float32


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_the_losss_kernel_agrees_and_pads_with_zero(compiled: NativeKernels, dtype: torch.dtype, tolerance: float) -> None:
    logits, targets, weights = _draw(37, 1003, scale=4.0).to(dtype), torch.arange(33) * 30, _draw(33, seed=1)
    for given in (logits, logits.float(), torch.cat([logits, logits], dim=1)[:, :1003].float()):
        nll, ours = compiled.nll_(given.clone(), targets, weights, dtype)
        expected, theirs = TORCH.nll_(given.clone(), targets, weights, dtype)
        assert ours.dtype == theirs.dtype == dtype
        assert tiny.relative_difference(nll, expected) < 1e-6
        assert tiny.relative_difference(ours, theirs) < tolerance
        assert not ours[33:].any()
    assert tiny.relative_difference(compiled.log_prob(logits, targets), TORCH.log_prob(logits, targets)) < 1e-6


@pytest.mark.parametrize("kernels", [TORCH, "compiled"], ids=["torch", "native"])
def test_a_class_shut_out_by_a_score_of_minus_infinity_has_no_part(kernels: Kernels | str, compiled: NativeKernels) -> None:
    of = compiled if isinstance(kernels, str) else kernels
    logits, targets = _draw(2, 100), torch.tensor([1, 2])
    with_it, without = logits.clone(), torch.cat([logits[:, :40], logits[:, 41:]], dim=1)
    with_it[:, 40] = -float("inf")
    assert tiny.relative_difference(of.log_prob(with_it, targets), of.log_prob(without, targets)) < 1e-6
    (nll, gradient), (expected, _) = (of.nll_(scores, targets, torch.ones(2), torch.float32) for scores in (with_it, without))
    assert tiny.relative_difference(nll, expected) < 1e-6
    assert gradient[:, 40].abs().max() < 1e-30
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kernels", [TORCH, "compiled"], ids=["torch", "native"])
def test_a_score_that_is_not_finite_is_never_hidden(kernels: Kernels | str, bad: float, compiled: NativeKernels) -> None:
    of = compiled if isinstance(kernels, str) else kernels
    logits = _draw(4, 100)
    logits[2, 40] = bad
    nll, _ = of.nll_(logits, torch.tensor([1, 2, 3, 4]), torch.ones(4), torch.float32)
    assert torch.isfinite(nll).tolist() == [True, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 12])
def test_a_row_depends_on_neither_neighbours_nor_threads(compiled: NativeKernels, window: int | None, dtype: torch.dtype) -> None:
    _, parts = _qkv(8, 4, 64, dtype)
    dout = _draw(sum(LENGTHS), 8, 64, seed=7).to(dtype)

    def answers(start: int, lengths: list[int]) -> list[Tensor]:
        here = slice(start, start + sum(lengths))
        q, k, v = (x[here] for x in parts)
        into = tuple(torch.empty_like(x) for x in (q, k, v))
        out, lse = compiled.attention(q, k, v, lengths, 0.125, window, None)
        compiled.attention_backward(dout[here], q, k, v, out, lse, lengths, 0.125, window, None, into)
        return [out, lse.t(), *into]

    together = answers(0, LENGTHS)
    torch.set_num_threads(2)
    try:
        assert all(map(torch.equal, together, answers(0, LENGTHS)))
    finally:
        torch.set_num_threads(1)
    start = 0
    for length in LENGTHS:
        alone = answers(start, [length])
        assert all(torch.equal(x, y[start : start + length]) for x, y in zip(alone, together, strict=True))
        start += length


@pytest.mark.parametrize("name", ["phi3", "phi3_window", "phi4_mini", "llama", "mistral", "qwen2"])
def test_the_fast_path_has_the_gradients_of_torchs_kernels(name: str, tiny_base: Callable[[str], Path]) -> None:
    found = {}
    for which in ("auto", "torch"):
        base = load_base(tiny_base(name), "fp32", kernels=which)
        assert base.slow == []
        trainee = tiny.new_trainee(base, tiny.new_weights(base))
        trainee.forward_backward(pack(tiny.random_rows((5, 30, 2))), 37.0)
        found[which] = tiny.gradients(trainee)
    for site, gradient in found["auto"].items():
        assert tiny.relative_difference(gradient, found["torch"][site]) < 1e-5, site


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["phi3", "gemma2"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_activation_checkpointing_changes_no_bit(
    name: str, kind: str, precision: Literal["fp32", "bf16"], tiny_base: Callable[[str], Path]
) -> None:
    found = []
    for recompute in (False, True):
        base = load_base(tiny_base(name), precision, recompute=recompute)
        trainee = tiny.new_trainee(base, tiny.new_weights(base, kind, dropout=0.2))  # type: ignore[arg-type]
        trainee.forward_backward(pack(tiny.random_rows((5, 30, 2))), 37.0)
        found.append(tiny.gradients(trainee))
    for site, gradient in found[0].items():
        assert torch.equal(gradient, found[1][site]), site


def test_layers_without_a_fast_path_are_named(tiny_base: Callable[[str], Path]) -> None:
    (line,) = load_base(tiny_base("gemma2"), "fp32").slow
    assert line.startswith("2 Gemma2DecoderLayer compute by transformers' own forward")


def test_without_a_compiler_torch_serves_and_native_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    for cached in (native.build, native_or_reason):
        monkeypatch.setattr(cached.__module__ + "." + cached.__name__, cached.__wrapped__)
    monkeypatch.setattr(kernels_package, "build", native.build)
    assert isinstance(choose("auto", "cpu"), TorchKernels)
    with pytest.raises(BaseModelError, match="no-such-compiler does not run"):
        choose("native", "cpu")
