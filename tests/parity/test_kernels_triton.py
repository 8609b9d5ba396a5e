"""The kernels in Triton against those in torch: on a CUDA device where there is one, else by Triton's interpreter on the CPU.

Run the latter with `TRITON_INTERPRET=1`. Skipped, with the reason, where Triton cannot be imported or has nothing to run on.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import Tensor

import tiny
from kivnun.model.dropout import Mask
from kivnun.model.kernels import Angles, Kernels, TorchKernels
from kivnun.model.kernels.triton import TritonKernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def _missing() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return "" if INTERPRETED or torch.cuda.is_available() else "no CUDA device, and TRITON_INTERPRET is not 1"


pytestmark = [
    pytest.mark.skipif(bool(_missing()), reason=_missing() or "Triton runs here"),
    # Triton's own, and NumPy's on the wrapping products of hashes that the interpreter computes with it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning"),
]
TORCH = TorchKernels()
# Triton's interpreter cuts bfloat16 off where devices round: bits can be compared in float32 only, there.
DTYPES = [(torch.float32, 2e-6), (torch.bfloat16, 1e-2 if INTERPRETED else 4e-3)]


@pytest.fixture(scope="module")
def kernels() -> TritonKernels:
    return TritonKernels()


def _same(found: Tensor, expected: Tensor) -> bool:
    if INTERPRETED and found.dtype == torch.bfloat16:
        return torch.allclose(found, expected, rtol=2**-7, atol=0.0)
    return torch.equal(found, expected)


def _draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_pointwise_kernels_agree(kernels: TritonKernels, dtype: torch.dtype, tolerance: float) -> None:
    x, w, dy, gu = (
        t.to(dtype) for t in (_draw(37, 1100), _draw(1100, seed=1), _draw(37, 1100, seed=2), _draw(37, 2200, seed=4, scale=4.0))
    )
    factor = _draw(1100, seed=5)

    def answers(of: Kernels) -> list[Tensor]:
        y, scale = of.rms_norm(x, w, 1e-5)
        backward = of.rms_norm_backward(dy, x, w, scale)
        place = gu.clone()
        of.gate_backward_(gu[:, :1100].contiguous(), place)
        gates = [of.gate(gu), place]
        sums = []
        for rest in (None, gu[:, :1100].contiguous() / 512):
            total, over, *normed = of.add_rms_norm(x, rest, dy, w, 1e-5)
            # The interpreter cuts off where it should round, and what is left over is another number then: their sum is the same.
            sums += [total.float() if over is None else total.float() + over.float(), *normed]
        return [y, scale, backward, *gates, *sums, of.scale_columns(x, factor), of.column_dots(x, dy)]

    for found, expected in zip(answers(kernels), answers(TORCH), strict=True):
        assert found.dtype == expected.dtype
        assert tiny.relative_difference(found, expected) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("site", [-5, 2**62 + 12345, -(2**63)])
def test_dropout_has_the_same_bits(kernels: TritonKernels, site: int, dtype: torch.dtype) -> None:
    x, keys = _draw(9, 1027).to(dtype), torch.arange(9, device=DEVICE) * 0x1234567890ABCDE
    assert _same(kernels.dropped(x, Mask(keys, site, 0.3)), TORCH.dropped(x, Mask(keys, site, 0.3)))
    onto = _draw(9, 1027, seed=1).to(dtype)
    added = [of.dropped(x, Mask(keys, site, 0.3), onto.clone()) for of in (kernels, TORCH)]
    assert tiny.relative_difference(*added) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_the_losss_kernel_agrees_and_pads_with_zero(kernels: TritonKernels, dtype: torch.dtype, tolerance: float) -> None:
    logits, weights = _draw(23, 9001, scale=4.0).to(dtype), _draw(19, seed=1)
    targets = torch.arange(19, device=DEVICE) * 470
    logits[3, targets[3]] = 60.0  # a token that the model is sure of: 1 - p has no digits
    (found, ours), (expected, theirs) = (of.nll_(logits.clone(), targets, weights, dtype) for of in (kernels, TORCH))
    assert torch.allclose(found, expected, rtol=2e-6, atol=0.0)
    assert tiny.relative_difference(ours, theirs) < tolerance
    assert torch.allclose(ours[3, targets[3]].float(), theirs[3, targets[3]].float(), rtol=1e-2 if dtype != torch.float32 else 1e-5)
    assert not ours[19:].any()
    assert torch.allclose(kernels.log_prob(logits, targets), TORCH.log_prob(logits, targets), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_never_hidden(kernels: TritonKernels, bad: float) -> None:
    logits = _draw(4, 5000)
    logits[2, 40] = bad
    nll, _ = kernels.nll_(logits, torch.tensor([1, 2, 3, 4], device=DEVICE), torch.ones(4, device=DEVICE), torch.float32)
    assert torch.isfinite(nll).tolist() == [True, True, False, True]


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize(("width", "rotated"), [(128, 96), (96, 96), (20, 12)])
def test_rotations_agree_on_heads_inside_projections(kernels: TritonKernels, width: int, rotated: int, direction: int) -> None:
    turns = _draw(7, rotated // 2, seed=3, scale=3.0)
    angles = Angles(turns.cos(), turns.sin())
    x_THK = _draw(7, 13 * width)[:, : 11 * width].view(7, 11, width)
    assert tiny.relative_difference(kernels.turned(x_THK, angles, direction), angles.turned(x_THK, direction)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_decoded_to_the_bit(kernels: TritonKernels, dtype: torch.dtype) -> None:
    size, block = 40 * 64 * 3, 64
    codes = torch.randint(0, 256, (size // 2,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    scales, found, expected = _draw(size // block).abs(), *(torch.empty(size, dtype=dtype, device=DEVICE) for _ in range(2))
    kernels.nf4_decode(codes, scales, block, found)
    TORCH.nf4_decode(codes, scales, block, expected)
    assert _same(found, expected)

    scale_codes, scale_map = codes[: size // block], _draw(256, seed=1)
    nested = (codes, scale_codes, scale_map, _draw(1, seed=2), torch.tensor(0.3, device=DEVICE), block)
    kernels.nf4_decode_nested(*nested, found)
    TORCH.nf4_decode_nested(*nested, expected)
    assert _same(found, expected)

    bytes_OI, absmax = codes.view(torch.int8).view(-1, 96), _draw(size // 2 // 96, seed=3).abs()
    one, other = (torch.empty(bytes_OI.shape, dtype=dtype, device=DEVICE) for _ in range(2))
    kernels.int8_decode(bytes_OI, absmax, one)
    TORCH.int8_decode(bytes_OI, absmax, other)
    assert _same(one, other)
