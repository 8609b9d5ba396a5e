"""Matrices of 4 and 8 bits against bitsandbytes, to the bit: codes, scales and values.

bitsandbytes 0.50 on a CPU quantises 4 bits and rows of 8 by its code in torch and scales of scales by its C++; how it decodes
stands in `bitsandbytes_reference.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitsandbytes_reference import decoded_nf4
from kivnun.model.kernels import native
from kivnun.model.kernels.reference import NF4, TorchKernels
from kivnun.model.quantised import (
    BLOCK,
    DecodeBuffer,
    Int8Matrix,
    Kernels,
    NestedScales,
    Nf4Matrix,
    QuantisedMatrix,
    dynamic_map,
    nested_scales,
    pieces_of,
)

SHAPES = [(48, 70), (7, 64), (1, 4), (33, 130), (300, 512), (129, 66), (80, 48), (7, 9)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def bnb() -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: nothing to compare with")
    import bitsandbytes.functional

    return bitsandbytes.functional


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernels_named(request.param)


def kernels_named(name: str) -> Kernels:
    if name == "torch":
        return TorchKernels()
    try:
        return native.build()
    except native.CannotBuild as error:
        pytest.skip(f"no kernels in C: {error}")


def weight_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return weights with a row of zeros, a row of tiny ones and an outlier."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) * 0.05
    if shape[0] > 4:
        weight[1] = 0.0
        weight[2] *= 1e-20
        weight[3, 0] = 40.0
    return weight.to(dtype)


def quantised(form: Any, weight: Tensor, kernels: Kernels, dtype: torch.dtype) -> QuantisedMatrix:
    return form.quantise([weight.flatten()], weight.shape, DecodeBuffer(dtype, kernels))


def codes_of(matrix: QuantisedMatrix, name: str, count: int) -> Tensor:
    return matrix.get_parameter(name).view(torch.uint8)[:count]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_codes_scales_and_values_are_bitsandbytes_own(
    shape: tuple[int, int], dtype: torch.dtype, kernels: Kernels, bnb: Any
) -> None:
    weight = weight_of(shape, dtype)
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=BLOCK)
    matrix = quantised(Nf4Matrix, weight, kernels, dtype)
    assert torch.equal(codes_of(matrix, "codes", codes.numel()), codes.flatten())
    assert torch.equal(codes_of(matrix, "scale_codes", len(state.absmax)), state.absmax)
    assert torch.equal(matrix.get_parameter("group_scales"), state.state2.absmax)
    assert torch.equal(matrix.get_parameter("scale_offset"), state.offset)
    assert torch.equal(matrix.get_parameter("scale_map"), state.state2.code)
    values = matrix.dense()
    assert values.dtype == dtype
    assert torch.equal(values, decoded_nf4(codes, state))


def test_scales_of_many_groups_are_bitsandbytes_own(bnb: Any) -> None:
    draws = torch.Generator().manual_seed(3)
    for count in (1, 255, 256, 257, 20_000, 100_001):
        scales = torch.rand(count, generator=draws) * 0.2 + 0.01
        offset = scales.mean()
        codes, state = bnb.quantize_blockwise(scales - offset, blocksize=256)
        ours = nested_scales(scales)
        assert torch.equal(ours.codes, codes)
        assert torch.equal(ours.group_scales, state.absmax)


def test_the_dynamic_map_is_bitsandbytes_own(bnb: Any) -> None:
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())
    assert torch.equal(torch.tensor(NF4), bnb.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_codes_and_values_are_bitsandbytes_own(shape: tuple[int, int], dtype: torch.dtype, kernels: Kernels, bnb: Any) -> None:
    weight = weight_of(shape, dtype)
    weight[weight.abs().amax(1) == 0, 0] = 1.0  # of a row of zeros bitsandbytes makes codes of NaN
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight.clone())
    matrix = quantised(Int8Matrix, weight, kernels, dtype)
    assert torch.equal(matrix.get_parameter("codes").view(torch.int8)[: codes.numel()].view(shape), codes)
    assert torch.equal(matrix.get_parameter("row_absmax"), absmax)
    assert torch.equal(matrix.dense(), bnb.int8_vectorwise_dequant(codes, absmax).to(dtype))


def test_a_row_of_zeros_stays_zero_in_int8(kernels: Kernels) -> None:
    matrix = quantised(Int8Matrix, torch.zeros(3, 8), kernels, torch.float32)
    assert torch.equal(matrix.dense(), torch.zeros(3, 8))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (512, 96)])
def test_the_kernels_in_c_give_the_values_of_those_in_torch(shape: tuple[int, int], dtype: torch.dtype, threads: int) -> None:
    in_c, in_torch, before = kernels_named("native"), kernels_named("torch"), torch.get_num_threads()
    weight = weight_of(shape)
    torch.set_num_threads(threads)
    try:
        for block in (32, BLOCK, 128, 4096):
            for values in (weight.flatten(), weight.flatten().bfloat16(), weight.flatten().half()):
                codes, scales = encoded(in_torch, values, block)
                for ours, theirs in zip(encoded(in_c, values, block), (codes, scales), strict=True):
                    assert torch.equal(ours, theirs)
            assert_same(lambda kernels, out: kernels.nf4_decode(codes, scales, block, out), in_c, in_torch, shape, dtype)  # noqa: B023
            nested = nested_scales(scales)
            given = (codes, nested.codes, nested.map_256, nested.group_scales, nested.offset, block)
            assert_same(lambda kernels, out: kernels.nf4_decode_nested(*given, out), in_c, in_torch, shape, dtype)  # noqa: B023
        codes_OI = torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(1))
        absmax_O = weight.abs().amax(1)
        assert_same(lambda kernels, out: kernels.int8_decode(codes_OI, absmax_O, out), in_c, in_torch, shape, dtype)
    finally:
        torch.set_num_threads(before)


def encoded(kernels: Kernels, values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    codes, scales = torch.empty(-(-len(values) // 2), dtype=torch.uint8), torch.empty(-(-len(values) // block))
    kernels.nf4_encode(values, block, codes, scales)
    return codes, scales


def assert_same(decode: Any, in_c: Kernels, in_torch: Kernels, shape: tuple[int, int], dtype: torch.dtype) -> None:
    ours, theirs = torch.full(shape, 7.0, dtype=dtype), torch.full(shape, 8.0, dtype=dtype)
    decode(in_c, ours)
    decode(in_torch, theirs)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("form", [Nf4Matrix, Int8Matrix])
def test_quantising_in_pieces_is_quantising_at_once(form: Any, kernels: Kernels) -> None:
    weight = weight_of((200, 96))
    whole = quantised(form, weight, kernels, torch.bfloat16)
    pieces = form.quantise(pieces_of(weight, rows=64), weight.shape, DecodeBuffer(torch.bfloat16, kernels))
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter.view(-1).view(torch.uint8), pieces.get_parameter(name).view(-1).view(torch.uint8)), name


def test_scales_may_stand_unquantised(kernels: Kernels) -> None:
    weight = weight_of((40, 96))
    codes, scales = encoded(kernels, weight.flatten(), BLOCK)
    matrix = Nf4Matrix(weight.shape, codes, scales, DecodeBuffer(torch.float32, kernels))
    expected = torch.empty(40, 96)
    TorchKernels().nf4_decode(codes, scales, BLOCK, expected)
    assert torch.equal(matrix.dense(), expected)


def test_matrices_share_one_buffer_and_a_backward_pass_that_needs_what_was_overwritten_raises(kernels: Kernels) -> None:
    buffer = DecodeBuffer(torch.float32, kernels)
    first, second = (Nf4Matrix.quantise([weight_of(shape).flatten()], torch.Size(shape), buffer) for shape in ((48, 64), (64, 32)))
    x = torch.randn(3, 64, requires_grad=True)
    (x @ first.dense().T).sum().backward()  # nothing decoded in between
    assert x.grad is not None
    y = (x @ first.dense().T).sum()
    assert second.dense().data_ptr() == first.dense().data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_memory_first_used_in_inference_mode_serves_training_afterwards(kernels: Kernels) -> None:
    matrix = quantised(Nf4Matrix, weight_of((48, 64)), kernels, torch.float32)
    with torch.inference_mode():
        matrix.dense()
    x = torch.randn(3, 64, requires_grad=True)
    (x @ matrix.dense().T).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("form", [Nf4Matrix, Int8Matrix])
def test_codes_are_frozen_floating_parameters_that_no_cast_changes(form: Any, kernels: Kernels) -> None:
    matrix = quantised(form, weight_of((48, 70)), kernels, torch.bfloat16)
    assert all(p.is_floating_point() and not p.requires_grad for p in matrix.parameters())
    before = matrix.dense().clone()
    model = nn.Sequential(matrix, nn.Linear(2, 2))
    for cast in (model.bfloat16, model.half, model.float, lambda: model.to("cpu", torch.bfloat16)):
        cast()
        assert torch.equal(matrix.dense(), before)
    copy = quantised(form, torch.zeros(48, 70), kernels, torch.bfloat16)
    copy.load_state_dict(matrix.state_dict())
    assert torch.equal(copy.dense(), before)


@pytest.mark.parametrize(("form", "share"), [(Nf4Matrix, 0.27), (Int8Matrix, 0.51)])
def test_a_matrix_takes_its_share_of_bfloat16(form: Any, share: float, kernels: Kernels) -> None:
    matrix = quantised(form, weight_of((512, 512)), kernels, torch.bfloat16)
    held = sum(p.numel() * p.element_size() for p in matrix.parameters())
    assert held <= share * 2 * 512 * 512


def test_nested_scales_of_zeros_are_zero() -> None:
    found = nested_scales(torch.full((300,), 0.5))
    assert isinstance(found, NestedScales)
    assert torch.equal(found.group_scales, torch.zeros(2))
    assert not found.codes.any()
