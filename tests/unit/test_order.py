"""The order of training: a pure function of (seed, step); every row once an epoch; shares and budgets kept."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kivnun.data.order import RowOrder

LENGTHS = tuple(np.random.default_rng(0).integers(1, 60, 45).tolist())


def make_order(
    lengths: tuple[int, ...] = LENGTHS,
    sources: tuple[int, ...] | None = None,
    shares: tuple[float, ...] | None = None,
    batch_rows: int | None = 4,
    batch_tokens: int | None = None,
    epochs: int | None = 3,
    num_steps: int | None = None,
    seed: int = 0,
) -> RowOrder:
    return RowOrder(
        lengths=np.asarray(lengths),
        source_sizes=sources or (len(lengths),),
        shares=shares,
        batch_rows=batch_rows,
        batch_tokens=batch_tokens,
        epochs=epochs,
        num_steps=num_steps,
        seed=seed,
    )


def every_step(order: RowOrder) -> list[list[int]]:
    return [order.rows_of(step).tolist() for step in range(1, order.steps + 1)]


lengths = st.lists(st.integers(1, 50), min_size=1, max_size=40).map(tuple)
sizes = st.one_of(
    st.fixed_dictionaries({"batch_rows": st.integers(1, 9), "batch_tokens": st.none()}),
    st.fixed_dictionaries({"batch_rows": st.none(), "batch_tokens": st.integers(1, 120)}),
)


@given(lengths, sizes, st.integers(1, 4), st.integers(0, 5))
def test_every_row_comes_exactly_once_an_epoch(lengths: tuple[int, ...], size: dict[str, int | None], epochs: int, seed: int):
    order = make_order(lengths, epochs=epochs, seed=seed, **size)
    seen: dict[int, list[int]] = {epoch: [] for epoch in range(epochs)}
    for step, rows in enumerate(every_step(order), start=1):
        assert rows
        seen[order.epoch_of(step)] += rows
    assert all(sorted(rows) == list(range(len(lengths))) for rows in seen.values())
    ends = [step for step in range(1, order.steps + 1) if order.ends_epoch(step)]
    assert len(ends) == epochs
    assert ends[-1] == order.steps


@given(lengths, sizes, st.integers(0, 5), st.randoms(use_true_random=False))
def test_a_step_asked_for_first_or_last_is_the_same(lengths: tuple[int, ...], size: dict[str, int | None], seed: int, random):
    """Resuming at any step needs nothing but the step's number."""
    straight = every_step(make_order(lengths, seed=seed, **size))
    shuffled = list(enumerate(straight, start=1))
    random.shuffle(shuffled)
    order = make_order(lengths, seed=seed, **size)
    for step, rows in shuffled:
        assert order.rows_of(step).tolist() == rows
        assert make_order(lengths, seed=seed, **size).rows_of(step).tolist() == rows


@given(lengths, st.integers(1, 120))
def test_a_step_never_holds_more_tokens_than_asked_but_for_a_longer_row(lengths: tuple[int, ...], batch_tokens: int):
    order = make_order(lengths, batch_rows=None, batch_tokens=batch_tokens)
    for rows in every_step(order):
        assert sum(lengths[row] for row in rows) <= batch_tokens or len(rows) == 1


def test_steps_of_rows_are_full_but_for_an_epochs_last():
    order = make_order(batch_rows=4)
    assert [len(rows) for rows in every_step(order)] == ([4] * 11 + [1]) * 3


def test_epochs_and_seeds_shuffle_otherwise():
    order = make_order()
    first, second = order.epoch_rows(0).tolist(), order.epoch_rows(1).tolist()
    assert first != second
    assert first != sorted(first)
    assert make_order(seed=1).epoch_rows(0).tolist() != first
    assert make_order().epoch_rows(0).tolist() == first


@pytest.mark.parametrize("num_steps", [1, 11, 12, 13, 40])
def test_a_number_of_steps_is_kept_over_as_many_epochs_as_it_takes(num_steps: int):
    by_steps, by_epochs = make_order(epochs=None, num_steps=num_steps), make_order(epochs=4)
    assert by_steps.steps == num_steps
    assert every_step(by_steps) == every_step(by_epochs)[:num_steps]


@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.75, 0.25), (3.0, 1.0), (0.02, 0.98)])
def test_shares_say_how_much_of_an_epoch_a_source_gives(shares: tuple[float, float]):
    order = make_order(sources=(5, 40), shares=shares)
    for epoch in range(3):
        rows = order.epoch_rows(epoch)
        from_first = int((rows < 5).sum())
        assert len(rows) == pytest.approx(45, abs=1)
        assert from_first == max(1, round(45 * shares[0] / sum(shares)))


@given(st.integers(1, 7), st.integers(1, 30), st.floats(0.05, 0.95), st.integers(1, 5))
def test_a_source_repeats_a_row_only_after_all_its_rows(small: int, large: int, share: float, epochs: int):
    order = make_order((3,) * (small + large), sources=(small, large), shares=(share, 1 - share), epochs=epochs)
    counts = Counter(row for epoch in range(epochs) for row in order.epoch_rows(epoch).tolist())
    for rows in (range(small), range(small, small + large)):
        times = [counts[row] for row in rows]
        assert max(times) - min(times) <= 1


def test_rows_of_all_sources_are_mixed():
    rows = make_order(sources=(20, 25)).epoch_rows(0)
    changes = int((np.diff(rows < 20) != 0).sum())
    assert changes > 10
