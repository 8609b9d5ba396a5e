"""Rows keep to themselves: packed = alone to the bit, and the attention kernels against the formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import tiny
from kivnun.errors import BaseModelError
from kivnun.model.activation import WholeVectors
from kivnun.model.attention import KVCache, MatmulAttention, Rows, rows_attention
from kivnun.model.load import Base, load_base

LENGTHS = (1, 2, 15, 16, 17, 100)
Threads = Callable[[int], None]


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes at which the matrix libraries begin to choose among kernels and to split work among threads."""
    sizes = {
        "vocab_size": 1031,
        "hidden_size": 192,
        "intermediate_size": 520,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
    }
    config = transformers.Phi3Config(**sizes, num_attention_heads=6, num_key_value_heads=3, pad_token_id=0, sliding_window=50)
    return tiny.write_base(tmp_path_factory.mktemp("wide"), config)


def _packs() -> list[list[list[int]]]:
    rows = [tiny.random_ids(length) for length in LENGTHS]
    return [rows, rows[::-1], [rows[3], rows[0], rows[0], rows[5], rows[1]], [rows[2], rows[4]], [rows[0], rows[1]]]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "num_threads"),
    [
        ("wide", 1),
        ("wide", 2),
        ("phi3", 1),
        ("phi3", 2),
        ("phi4_mini", 1),
        ("gemma2", 1),
        ("qwen3", 1),
        ("phi", 1),
        ("llama", 1),
        ("mistral", 1),
        ("qwen2_window", 2),
    ],
)
def test_a_row_in_a_pack_equals_the_row_alone_to_the_bit(
    name: str, precision: str, num_threads: int, wide_base: Path, tiny_base: Callable[[str], Path], threads: Threads
):
    threads(num_threads)
    base = load_base(wide_base if name == "wide" else tiny_base(name), precision)
    alone = {len(ids): tiny.packed_logits(base, [ids])[0] for ids in map(tiny.random_ids, LENGTHS)}
    for pack in _packs()[: 5 if num_threads == 1 else 2]:  # two threads on one busy core wait for each other
        for ids, logits in zip(pack, tiny.packed_logits(base, pack), strict=True):
            assert torch.equal(logits, alone[len(ids)]), f"row of {len(ids)} among {[len(row) for row in pack]}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["phi3", "phi3_window", "phi4_mini", "gemma2"])
def test_a_token_changed_in_one_row_changes_no_other_row(name: str, precision: str, tiny_base: Callable[[str], Path]):
    base = load_base(tiny_base(name), precision)
    rows = [tiny.random_ids(length) for length in LENGTHS]
    before = tiny.packed_logits(base, rows)
    for changed in range(len(rows)):
        other = [list(row) for row in rows]
        other[changed][-1] = other[changed][-1] % (tiny.VOCAB - 1) + 1
        after = tiny.packed_logits(base, other)
        for row in range(len(rows)):
            assert torch.equal(before[row], after[row]) == (row != changed)


def test_rows_that_begin_alike_or_hold_one_token_shift_no_boundary(tiny_base: Callable[[str], Path]):
    base = load_base(tiny_base("phi3"), "fp32")
    rows = [[1, 1, 1, 7, 9], [1], [1, 1, 5], [1], [1, 1, 1, 7, 9]]
    logits = tiny.packed_logits(base, rows)
    assert torch.equal(logits[0], logits[4])
    assert torch.equal(logits[1], logits[3])
    # Rows that begin alike are alike until they differ.
    torch.testing.assert_close(logits[2][:2], logits[0][:2])


def test_gradients_of_other_rows_are_exactly_zero(tiny_base: Callable[[str], Path]):
    base = load_base(tiny_base("phi3_window"), "fp32")
    embedding: nn.Parameter = base.model.get_input_embeddings().weight
    embedding.requires_grad_(True)
    rows = [list(range(3, 23)), list(range(30, 60)), list(range(60, 77))]
    ids_T = torch.tensor([token for row in rows for token in row])
    positions_T = torch.cat([torch.arange(len(row)) for row in rows])
    h_TD = base.hidden(ids_T, positions_T, Rows([len(row) for row in rows]))
    h_TD[20:50].square().sum().backward()
    felt = set(torch.nonzero(embedding.grad.abs().sum(1))[:, 0].tolist())
    assert felt == set(rows[1])


def _formula(q_HLK: Tensor, k_GCK: Tensor, v_GCK: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """Attention of the last L of C positions, written out in float64."""
    groups = q_HLK.shape[0] // k_GCK.shape[0]
    k_HCK, v_HCK = (x.double().repeat_interleave(groups, 0) for x in (k_GCK, v_GCK))
    scores_HLC = q_HLK.double() @ k_HCK.transpose(1, 2) * scale
    if softcap is not None:
        scores_HLC = softcap * torch.tanh(scores_HLC / softcap)
    length, context = scores_HLC.shape[1:]
    for query in range(length):
        at = context - length + query
        for key in range(context):
            if key > at or (window is not None and key <= at - window):
                scores_HLC[:, query, key] = -math.inf
    return torch.softmax(scores_HLC, -1) @ v_HCK


class _Layer(nn.Module):
    layer_idx = 0


def _draw(length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(length)
    return tuple(torch.randn(1, heads, length, 8, generator=draws).to(dtype) for heads in (6, 2, 2))  # type: ignore[return-value]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_each_row_is_the_formula(dtype: torch.dtype, window: int | None, softcap: float | None):
    lengths = [1, 4, 5, 13]
    q, k, v = _draw(sum(lengths), dtype)
    out, _ = rows_attention(_Layer(), q, k, v, None, 0.3, 0.0, window, softcap, rows=Rows(lengths))
    expected = [
        _formula(*(x[0, :, at : at + n] for x in (q, k, v)), 0.3, window, softcap) for at, n in ((0, 1), (1, 4), (5, 5), (10, 13))
    ]
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out[0].transpose(0, 1).double(), torch.cat(expected, 1), rtol=0, atol=tolerance)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 4])
def test_attention_over_a_cache_is_attention_over_the_whole_row(window: int | None, softcap: float | None):
    q, k, v = _draw(14)
    whole, _ = rows_attention(_Layer(), q, k, v, None, 0.3, 0.0, window, softcap, rows=Rows([14]))
    cache, parts = KVCache(), []
    for at in (slice(0, 3), slice(3, 9), slice(9, 10), slice(10, 11), slice(11, 14)):
        new = [x[:, :, at] for x in (q, k, v)]
        parts.append(rows_attention(_Layer(), *new, None, 0.3, 0.0, window, softcap, rows=Rows([new[0].shape[2]], cache, [7]))[0])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-6)


def test_a_dropped_slot_starts_anew_and_leaves_the_others():
    q, k, v = _draw(6)
    cache = KVCache()
    rows_attention(_Layer(), q, k, v, None, rows=Rows([3, 3], cache, [0, 1]))
    cache.drop(0)
    keys, _ = cache.append(0, 0, k[0, :, :2], v[0, :, :2])
    assert keys.shape[1] == 2
    keys, _ = cache.append(0, 1, k[0, :, :1], v[0, :, :1])
    assert torch.equal(keys[:, :3], k[0, :, 3:])


def test_a_cache_that_grows_keeps_what_it_held():
    _, k, v = _draw(200)
    cache = KVCache()
    for at in range(0, 200, 40):
        keys, values = cache.append(0, 0, k[0, :, at : at + 40], v[0, :, at : at + 40])
    assert torch.equal(keys, k[0])
    assert torch.equal(values, v[0])


def test_backward_of_the_bfloat16_kernel_is_autograd_of_the_formula():
    q, k, v = (x[0].requires_grad_() for x in _draw(11))
    weight = torch.randn(6, 11, 8, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((MatmulAttention.apply(q, k, v, 0.3) * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((_formula(q, k, v, 0.3, None, None) * weight).sum(), (q, k, v))
    for found, expected in zip(ours, theirs, strict=True):
        assert tiny.relative_difference(found, expected) < 1e-6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"attention_mask": torch.ones(1)}, "mask=True"),
        ({"s_aux": torch.ones(6)}, "s_aux"),
        ({"is_causal": False}, "is_causal=False"),
        ({"rows": None}, "not told where rows end"),
    ],
)
def test_what_would_change_the_mathematics_is_refused(change: dict[str, object], words: str):
    q, k, v = _draw(5)
    given: dict[str, object] = {"attention_mask": None, "rows": Rows([5]), **change}
    with pytest.raises(BaseModelError, match=words):
        rows_attention(_Layer(), q, k, v, **given)  # type: ignore[arg-type]


def test_arguments_that_say_nothing_are_taken():
    q, k, v = _draw(5)
    rows_attention(
        _Layer(), q, k, v, None, rows=Rows([5]), use_cache=False, position_ids=torch.arange(5), is_causal=True, s_aux=None
    )


def _logits_of_pass(base: Base, rows: list[list[int]]) -> Tensor:
    return torch.cat(tiny.packed_logits(base, rows))


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("features", [88, 128])
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(approximate="tanh"), nn.Sigmoid()])
def test_an_activation_is_the_same_wherever_its_tokens_stand(
    activation: nn.Module, features: int, num_threads: int, threads: Threads
):
    threads(num_threads)
    x_TF = torch.randn(703, features, generator=torch.Generator().manual_seed(0)) * 3
    whole = WholeVectors(activation)(x_TF)
    torch.testing.assert_close(whole, activation(x_TF), rtol=1e-6, atol=1e-6)
    for start, end in ((0, 1), (1, 18), (5, 400), (333, 703), (702, 703)):
        assert torch.equal(WholeVectors(activation)(x_TF[start:end].clone()), whole[start:end])


def test_one_matrix_product_does_not_mix_row_counts(wide_base: Path):
    """Every count of tokens from 1 to 40 beside one fixed row gives that row the same bits."""
    base = load_base(wide_base, "fp32")
    fixed = tiny.random_ids(5)
    alone = _logits_of_pass(base, [fixed])
    for extra in range(1, 41):
        assert torch.equal(_logits_of_pass(base, [tiny.random_ids(extra, 1), fixed])[extra:], alone), extra
