"""Generation: greedy answers are transformers', an answer depends on its own row alone, draws follow the distribution."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from kivnun.model import generate as module
from kivnun.model.generate import SamplingParams, generate
from kivnun.model.load import Base, load_base

TinyBase = Callable[[str], Path]
# Of one token, below and beyond the sliding window (12); rows of 20 cross LongRoPE's original length (24) while writing.
PROMPTS = [tiny.random_ids(length) for length in (1, 5, 13, 20, 30)]


def _greedy(count: int, stop_ids: tuple[int, ...] = ()) -> SamplingParams:
    return SamplingParams(count, stop_ids)


# transformers' Olmo 2 goes on with keys turned by the short factors when a row has crossed LongRoPE's original length.
@pytest.mark.parametrize("name", [name for name in tiny.CONFIGS if name != "olmo2_longrope"])
def test_greedy_answers_are_transformers(name: str, tiny_base: TinyBase):
    folder = tiny_base(name)
    answers = generate(load_base(folder, "fp32"), PROMPTS, _greedy(16))
    model = tiny.reference(folder)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, min_new_tokens=16, eos_token_id=None
        )
        assert answer == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", ["phi3_window", "phi4_mini", "gemma2"])
def test_an_answer_is_the_same_alone_and_among_others(name: str, temperature: float, precision: str, tiny_base: TinyBase):
    base = load_base(tiny_base(name), precision)
    params = SamplingParams(12, (), temperature=temperature, seed=3)
    together = generate(base, PROMPTS, params)
    # The same row number beside others: shorter, longer, and stopping earlier.
    others = [[prompt if row == at else [7] * (row + 1) for row, prompt in enumerate(PROMPTS)] for at in range(len(PROMPTS))]
    for at, prompts in enumerate(others):
        assert generate(base, prompts, params)[at] == together[at]
    assert generate(base, PROMPTS[:1], params) == together[:1]


def test_groups_of_rows_change_no_answer(tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch):
    base = load_base(tiny_base("phi3"), "fp32")
    params = SamplingParams(6, (), temperature=1.0, seed=1)
    whole = generate(base, PROMPTS, params)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 2)
    assert generate(base, PROMPTS, params) == whole


def test_draws_depend_on_seed_and_row_and_place_alone(tiny_base: TinyBase):
    base = load_base(tiny_base("phi3"), "fp32")

    def answers(prompts: list[list[int]], seed: int, count: int = 8) -> list[list[int]]:
        return generate(base, prompts, SamplingParams(count, (), temperature=1.5, seed=seed))

    first = answers([PROMPTS[1]] * 3, 5)
    assert first == answers([PROMPTS[1]] * 3, 5)
    assert len({tuple(answer) for answer in first}) == 3  # equal prompts in other rows draw otherwise
    assert answers([PROMPTS[1]] * 3, 6) != first
    assert [answer[:3] for answer in first] == answers([PROMPTS[1]] * 3, 5, 3)  # a longer answer begins like a shorter one


def test_a_stop_token_ends_a_row_and_is_left_out(tiny_base: TinyBase):
    base = load_base(tiny_base("phi3"), "fp32")
    free = generate(base, PROMPTS, _greedy(10))
    stop = free[2][4]
    heard: list[tuple[int, int]] = []
    stopped = generate(base, PROMPTS, _greedy(10, (stop, tiny.VOCAB - 1)), lambda row, token: heard.append((row, token)))
    for before, after in zip(free, stopped, strict=True):
        cut = [at for at, token in enumerate(before) if token in (stop, tiny.VOCAB - 1)]
        assert after == before[: cut[0] if cut else None]
    assert len(stopped[2]) <= 4
    assert [[token for at, token in heard if at == row] for row in range(len(PROMPTS))] == stopped


@pytest.mark.parametrize("count", [1, 2, 7])
def test_no_answer_is_longer_than_asked(count: int, tiny_base: TinyBase):
    answers = generate(load_base(tiny_base("phi3"), "fp32"), PROMPTS, _greedy(count))
    assert [len(answer) for answer in answers] == [count] * len(PROMPTS)
    assert generate(load_base(tiny_base("phi3"), "fp32"), [], _greedy(count)) == []


def _next_token_distribution(base: Base, prompt: list[int], temperature: float) -> np.ndarray:
    logits_V = tiny.packed_logits(base, [prompt])[0][-1].double()
    return torch.softmax(logits_V / temperature, 0).numpy()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (2.0, 0.9)])
def test_draws_follow_the_models_distribution(temperature: float, top_p: float, tiny_base: TinyBase):
    base = load_base(tiny_base("phi3"), "fp32")
    prompt, draws = PROMPTS[1], 3000
    p_V = _next_token_distribution(base, prompt, temperature)
    order = np.argsort(-p_V)
    kept = order[: int(np.searchsorted(np.cumsum(p_V[order]), top_p)) + 1] if top_p < 1 else order
    expected_V = np.zeros_like(p_V)
    expected_V[kept] = p_V[kept] / p_V[kept].sum()
    # The draw alone, so that thousands of them take no forward pass each.
    logits_V = tiny.packed_logits(base, [prompt])[0][-1]
    params = SamplingParams(1, (), temperature=temperature, top_p=top_p, seed=9)
    stream = np.random.default_rng(0)
    counts_V = np.bincount([module._choose(logits_V, params, stream) for _ in range(draws)], minlength=tiny.VOCAB)
    assert not counts_V[expected_V == 0].any()
    # Pearson's chi-squared over tokens expected at least five times; its mean is the number of cells, its variance twice that.
    cells = expected_V * draws >= 5
    statistic = float(((counts_V - expected_V * draws)[cells] ** 2 / (expected_V * draws)[cells]).sum())
    assert statistic < cells.sum() + 5 * np.sqrt(2 * cells.sum())


def test_greedy_takes_the_lowest_id_among_equals():
    assert module._choose(torch.tensor([0.0, 2.0, 2.0]), _greedy(1), None) == 1


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits_V = torch.log(torch.tensor([0.5, 0.3, 0.2]))

    def drawn(top_p: float) -> set[int]:
        params = SamplingParams(1, (), temperature=1.0, top_p=top_p)
        stream = np.random.default_rng(1)
        return {module._choose(logits_V, params, stream) for _ in range(200)}

    assert drawn(0.4) == {0}
    assert drawn(0.6) == {0, 1}
    assert drawn(0.81) == {0, 1, 2}
    assert drawn(1.0) == {0, 1, 2}
    assert drawn(1e-9) == drawn(0.0) == {0}
