"""One call for the whole pack, with a double in place of torch's kernel: what is asked of it, and when."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from kivnun.data.packing import pack
from kivnun.model import attention
from kivnun.model.attention import Rows
from kivnun.model.load import base_from_model, load_base
from kivnun.model.varlen import Bounds, VariableLength, serving, varlen_or_reason


def masked(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, _starts: Tensor, longest: int, _longest: int, *, scale: float,
           window_size: tuple[int, int], enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """Compute what torch's documentation says of `varlen_attn`, by one mask over the pack."""
    assert starts.dtype == torch.int32
    assert longest == int((starts[1:] - starts[:-1]).max())
    row = torch.bucketize(torch.arange(len(q)), starts[1:].long(), right=True)
    at = torch.arange(len(q)) - starts[row]
    seen = (row[:, None] == row[None]) & (at[None] <= at[:, None] + window_size[1])
    if window_size[0] >= 0:
        seen &= at[None] >= at[:, None] - window_size[0]
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (torch.einsum("thk,shk->hts", q, k) * scale).masked_fill(~seen, -torch.inf)
    return torch.einsum("hts,shk->thk", torch.softmax(scores, -1), v)


@pytest.mark.parametrize("groups", [None, {"enable_gqa": True}], ids=["repeated", "grouped"])
@pytest.mark.parametrize("name", ["phi3", "phi3_window", "phi4_mini", "mistral", "qwen3"])
def test_one_call_gives_the_gradients_of_rows_alone(
    name: str, groups: dict[str, bool] | None, tiny_base: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for whole in (None, VariableLength(masked, groups, True)):
        monkeypatch.setattr(attention, "serving", lambda _q, _window, whole=whole: whole)
        trainee = tiny.new_trainee(base := load_base(tiny_base(name), "fp32", kernels="torch"), tiny.new_weights(base))
        trainee.forward_backward(pack(tiny.random_rows((5, 30, 2))), 37.0)
        found.append(tiny.gradients(trainee))
    for site, gradient in found[0].items():
        assert tiny.relative_difference(found[1][site], gradient) < 1e-5, site


def test_bounds_are_made_once_for_a_pass() -> None:
    rows = Rows([3, 5, 1])
    bounds = rows.bounds_on(torch.device("cpu"))
    assert bounds.starts.tolist() == [0, 3, 8, 9]
    assert bounds.longest == 5
    assert rows.bounds_on(torch.device("cpu")) is bounds


def test_the_probe_refuses_a_wrong_answer_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no variable-length attention")

    def found(call: Callable[..., Tensor]) -> VariableLength | str:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", call)
        return varlen_or_reason.__wrapped__(torch.device("cpu"))

    right = found(masked)
    assert isinstance(right, VariableLength)
    assert right.windows
    assert right.groups == {"enable_gqa": True}

    def leaking(
        q: Tensor, k: Tensor, v: Tensor, *_bounds: object, scale: float, window_size: tuple[int, int], **more: bool
    ) -> Tensor:
        one = Bounds.of([len(q)], q.device).starts
        return masked(q, k, v, one, one, len(q), len(q), scale=scale, window_size=window_size, **more)

    leaking.__signature__ = inspect.signature(masked)  # type: ignore[attr-defined]
    assert "relative differences" in str(found(leaking))
    assert "takes no scale" in str(found(lambda q, k, v, is_causal=False: q))


def test_it_is_for_cuda_alone() -> None:
    assert serving(torch.zeros(4, 2, 16, dtype=torch.bfloat16), None) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4", "int8"])
@pytest.mark.parametrize("name", ["phi3", "phi4_mini"])
def test_a_model_in_memory_is_the_base_of_its_folder(name: str, precision: str, tiny_base: Callable[[str], Path]) -> None:
    folder = tiny_base(name)
    rows = [tiny.random_ids(length) for length in (1, 30, 9)]
    loaded, built = load_base(folder, precision), base_from_model(tiny.reference(folder), precision)
    assert built.num_parameters == loaded.num_parameters
    for found, expected in zip(tiny.packed_logits(built, rows), tiny.packed_logits(loaded, rows), strict=True):
        assert torch.equal(found, expected)
