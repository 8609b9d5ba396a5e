"""Products of the kernels in C against float64: odd sizes, both types, packed or not, with a second product in the same sums."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from kivnun.data.packing import pack
from kivnun.model.dropout import Mask, dropped
from kivnun.model.kernels import NativeKernels, TorchKernels, native, native_or_reason
from kivnun.model.linear import TunableLinear
from kivnun.model.load import load_base
from kivnun.model.products import LowRank, PackedMatrix, over_tokens, packed, times, times_transposed, whole

TinyBase = Callable[[str], Path]
DTYPES = [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)]
ROWS = [1, 3, 14, 15, 113, 300]
SIZES = [(16, 8), (33, 30), (48, 512), (100, 1538), (513, 4100)]  # columns, depth: tails, parts of the depth, rows 4 KiB apart


@pytest.fixture(scope="module")
def kernels() -> NativeKernels:
    found = native_or_reason()
    assert isinstance(found, NativeKernels), found
    if not found.multiplies(torch.bfloat16, 2):
        pytest.skip("this processor lacks AVX-512 with bfloat16")
    return found


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("columns", "depth"), SIZES)
def test_products_are_those_of_float64(kernels: NativeKernels, dtype: torch.dtype, tolerance: float, columns: int, depth: int):
    w_NK, a_RK, b_NR = (_draw(*shape).to(dtype) for shape in ((columns, depth), (6, depth), (columns, 6)))
    for rows in ROWS:
        x_TK, y_TN = _draw(rows, depth, seed=1).to(dtype), _draw(rows, columns, seed=2).to(dtype)
        low_TR = _draw(rows, 6, seed=3).to(dtype)
        expected = x_TK.double() @ w_NK.double().T + low_TR.double() @ b_NR.double().T
        found = times_transposed(x_TK, w_NK, kernels, LowRank(low_TR, packed(b_NR, kernels)))
        assert tiny.relative_difference(found, expected) < tolerance
        expected = y_TN.double() @ w_NK.double() + low_TR.double() @ a_RK.double()
        found = times(y_TN, w_NK, kernels, LowRank(low_TR, packed(a_RK, kernels)))
        assert tiny.relative_difference(found, expected) < tolerance


@pytest.mark.parametrize("columns", [1024, 1000])
def test_a_product_may_be_added_to_in_place(kernels: NativeKernels, columns: int) -> None:
    """As PEFT's AdaLoRA does; the rows of 1024 numbers lie apart."""
    linear = TunableLinear(torch.nn.Linear(32, columns, bias=False).requires_grad_(False), kernels)
    x_TK = torch.ones(5, 32, requires_grad=True)
    y_TN = linear.plain(x_TK)
    y_TN += 1.0
    y_TN.sum().backward()
    assert x_TK.grad is not None
    assert torch.allclose(x_TK.grad[0], linear.dense().sum(0), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_matrix_is_the_same_to_the_bit(kernels: NativeKernels, dtype: torch.dtype) -> None:
    for columns, depth in [(8, 6), (48, 512), (514, 1538)]:
        w_NK, x_TK, y_TN = (_draw(*s, seed=9).to(dtype) for s in ((columns, depth), (70, depth), (70, columns)))
        matrix = packed(w_NK, kernels)
        assert isinstance(matrix, PackedMatrix)
        assert torch.equal(matrix.dense(), w_NK)
        assert torch.equal(times_transposed(x_TK, matrix, kernels), times_transposed(x_TK, w_NK, kernels))
        assert torch.equal(times(y_TN, matrix, kernels), times(y_TN, w_NK, kernels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_neither_neighbours_nor_threads(kernels: NativeKernels, dtype: torch.dtype) -> None:
    x_TK, w_NK = _draw(200, 1540).to(dtype), _draw(70, 1540, seed=1).to(dtype)
    together = times_transposed(x_TK, w_NK, kernels)
    for start, end in [(0, 1), (3, 17), (100, 200)]:
        assert torch.equal(times_transposed(x_TK[start:end], w_NK, kernels), together[start:end])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 2 + 1)
        assert torch.equal(times_transposed(x_TK, w_NK, kernels), together)
        other = over_tokens(x_TK[:, :8].contiguous(), x_TK, kernels)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(over_tokens(x_TK[:, :8].contiguous(), x_TK, kernels), other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 4, 7, 16, 30])
def test_sums_over_tokens_are_those_of_float64(kernels: NativeKernels, dtype: torch.dtype, rank: int) -> None:
    for tokens in (1, 2, 127, 129, 300):
        a_TR, b_TN = _draw(tokens, rank).to(dtype), _draw(tokens, 77, seed=1).to(dtype)
        found = over_tokens(a_TR, b_TN, kernels)
        assert found.dtype == torch.float32
        assert tiny.relative_difference(found, a_TR.double().T @ b_TN.double()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "depth"), SIZES)
def test_dropout_on_the_way_is_the_dropped_matrix_multiplied(
    kernels: NativeKernels, dtype: torch.dtype, columns: int, depth: int
) -> None:
    """Bit by bit where dropping comes before a product; to float32's digits where it comes after, and is rounded once."""
    w_NK, a_RK = _draw(columns, depth).to(dtype), packed(_draw(6, depth).to(dtype), kernels)
    for rows in ROWS:
        x_TK, y_TN = _draw(rows, depth, seed=1).to(dtype), _draw(rows, columns, seed=2).to(dtype)
        low_TR, mask = _draw(rows, 6, seed=3).to(dtype), Mask(torch.arange(rows) * 7919, -5, 0.3)
        dropped_TK = kernels.dropped(x_TK, mask)
        assert torch.equal(dropped_TK, TorchKernels().dropped(x_TK, mask))
        assert torch.equal(times_transposed(x_TK, a_RK, kernels, mask=mask), times_transposed(dropped_TK, a_RK, kernels))
        assert torch.equal(times_transposed(x_TK, w_NK, kernels, mask=mask), times_transposed(dropped_TK, w_NK, kernels))
        assert torch.equal(over_tokens(low_TR, x_TK, kernels, mask), over_tokens(low_TR, dropped_TK, kernels))
        found = times(y_TN, w_NK, kernels, LowRank(low_TR, a_RK, mask)).double()
        expected = y_TN.double() @ w_NK.double() + dropped(low_TR.double() @ a_RK.dense().double(), mask)
        assert tiny.relative_difference(found, expected) < (2e-6 if dtype == torch.float32 else 4e-3)


def test_what_the_kernels_do_not_take_goes_through_torch(kernels: NativeKernels) -> None:
    x_TK, w_NK = _draw(9, 15).bfloat16(), _draw(12, 15).bfloat16()  # an odd depth: bfloat16 is multiplied in pairs
    assert not isinstance(packed(w_NK, kernels), PackedMatrix)
    assert torch.equal(times_transposed(x_TK, w_NK, kernels), x_TK @ w_NK.T)
    mask = Mask(torch.arange(9) * 7919, 3, 0.3)
    assert torch.equal(times_transposed(x_TK, w_NK, kernels, mask=mask), kernels.dropped(x_TK, mask) @ w_NK.T)
    y_TN, low_TR, a_RK = _draw(9, 12).bfloat16(), _draw(9, 3).bfloat16(), _draw(3, 15).bfloat16()
    expected = y_TN.double() @ w_NK.double() + dropped(low_TR.double() @ a_RK.double(), mask)
    assert tiny.relative_difference(times(y_TN, w_NK, kernels, LowRank(low_TR, a_RK, mask)).double(), expected) < 8e-3
    assert times_transposed(x_TK.double(), w_NK.double(), kernels).dtype == torch.float64
    assert whole(37, kernels, torch.bfloat16) == 37
    assert whole(37, TorchKernels(), torch.bfloat16) == 48


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="takes parts of x86's instructions away")
@pytest.mark.parametrize(("without", "left"), [("-mno-avx512bf16", {torch.float32}), ("-mno-avx512f", set())])
def test_lesser_processors_say_what_they_multiply(without: str, left: set[torch.dtype], tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    native._compile(native._compiler(), (*native.FLAGS, without), sorted(native.SOURCES.glob("*.c")), library)
    lesser = NativeKernels(ctypes.CDLL(str(library)), without)
    assert {dtype for dtype in native.ENDING if lesser.multiplies(dtype, 2)} <= left


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_packed_base_trains_the_same_to_the_bit(precision: str, kind: str, tiny_base: TinyBase) -> None:
    results = []
    for is_packed in (False, True):
        base = load_base(tiny_base("phi3"), precision, packed=is_packed)
        trainee = tiny.new_trainee(base, tiny.new_weights(base, kind=kind, dropout=0.1))
        loss = trainee.forward_backward(pack(tiny.random_rows([5, 9, 33])), 30.0)
        results.append((loss, [p.grad for p in trainee.weights.parameters().values()], base.num_parameters, base.tied))
    (loss, gradients, *facts), (packed_loss, packed_gradients, *packed_facts) = results
    assert (loss, facts) == (packed_loss, packed_facts)
    assert all(map(torch.equal, gradients, packed_gradients))
