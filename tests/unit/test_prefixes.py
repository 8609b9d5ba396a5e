"""Rows as branches of trees: nothing lost, nothing shared that a row is trained on, every state that of the row's own past."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kivnun.data.packing import PackedBatch, micro_batches, pack
from kivnun.data.prefixes import MIN_SHARED
from kivnun.data.rows import PreferencePair, TokenRow, Where


def make_row(ids: list[int], trained: int, row: int = 0) -> TokenRow:
    weights = np.zeros(len(ids), np.float32)
    weights[len(ids) - trained :] = 1.0
    return TokenRow(np.asarray(ids, np.int32), weights, row, Where("rows.jsonl", row + 1), len(ids) - trained)


@st.composite
def like_rows(draw: st.DrawFn) -> list[TokenRow]:
    """Rows put together from few parts, so that many begin alike, some are the same, and some are trained from early on."""
    parts = [[number] * length for number, length in enumerate((1, 7, 16, 17, 40))]
    rows = []
    for number in range(draw(st.integers(1, 9))):
        ids = [9] + [token for part in draw(st.lists(st.sampled_from(parts), max_size=5)) for token in part]
        rows.append(make_row(ids, draw(st.integers(0, len(ids) - 1)), number))
    return rows


def past_of(batch: PackedBatch, at: int) -> list[int]:
    """Return the tokens that the state at a place of the pack has seen, from its row's first one on."""
    starts = np.concatenate([[0], np.cumsum(batch.lengths)])
    branch = int(np.searchsorted(starts, at, side="right")) - 1
    seen = batch.ids_T[starts[branch] : at + 1].tolist()
    while (branch := batch.parents[branch]) >= 0:
        seen = batch.ids_T[starts[branch] : starts[branch + 1]].tolist() + seen
    return seen


@given(like_rows())
def test_every_trained_token_is_predicted_from_its_own_rows_past(rows: list[TokenRow]) -> None:
    batch, plain = pack(rows, share_prefixes=True), pack(rows)
    for name in ("rows", "where"):
        assert getattr(batch, name) == getattr(plain, name)
    for name in ("targets_S", "weights_S", "segment_S"):
        assert np.array_equal(getattr(batch, name), getattr(plain, name))
    for ours, theirs in zip(batch.select_S, plain.select_S, strict=True):
        past = past_of(batch, int(ours))
        assert past == past_of(plain, int(theirs))
        assert batch.positions_T[ours] == len(past) - 1
    assert len(set(batch.select_S.tolist())) == len(batch.select_S)  # no state has two targets


@given(like_rows())
def test_a_branch_comes_after_the_one_it_goes_on_from_and_is_worth_it(rows: list[TokenRow]) -> None:
    batch = pack(rows, share_prefixes=True)
    starts = np.cumsum([0, *batch.lengths])
    assert len(batch.ids_T) == len(batch.positions_T) == starts[-1] <= sum(row.length for row in rows)
    for number, (start, parent) in enumerate(zip(starts, batch.parents, strict=False)):
        assert -1 <= parent < number
        goes_on_at = batch.positions_T[starts[parent + 1] - 1] + 1 if parent >= 0 else 0
        assert batch.positions_T[start] == goes_on_at
    roots = [start for start, parent in zip(starts, batch.parents, strict=False) if parent < 0]
    for root, end in zip(roots, [*roots[1:], starts[-1]], strict=True):  # a tree lies in one place
        assert set(np.flatnonzero(batch.positions_T == 0)) & set(range(root, end)) == {root}


@given(like_rows())
def test_rows_side_by_side_are_branches_of_no_other(rows: list[TokenRow]) -> None:
    batch = pack(rows)
    assert set(batch.parents) == {-1}
    assert batch.owners == batch.rows


def test_what_rows_have_in_common_is_there_once() -> None:
    system, first, second = [5] * 50, [6] * 30, [7] * 20
    ids = [system + first + [1, 2], system + first + [3, 4, 4], system + second + [1, 2], [8] * 40 + [1, 2]]
    batch = pack([make_row(row, 2, number) for number, row in enumerate(ids)], share_prefixes=True)
    # The state of the last prompt token predicts the first trained one, so it stays with its row.
    assert batch.lengths == (50, 29, 3, 4, 22, 42)
    assert batch.parents == (-1, 0, 1, 1, 0, -1)
    assert batch.owners == (0, 0, 0, 1, 2, 3)


@pytest.mark.parametrize(("common", "tokens"), [(MIN_SHARED - 1, 2 * MIN_SHARED + 2), (MIN_SHARED, MIN_SHARED + 4)])
def test_a_short_beginning_is_not_worth_sharing(common: int, tokens: int) -> None:
    rows = [make_row([5] * common + [6 + number, 1], 1, number) for number in range(2)]
    assert pack(rows, share_prefixes=True).num_tokens == tokens


def test_what_one_row_is_trained_on_no_other_shares() -> None:
    ids = [5] * 60 + [1]
    early, late = make_row(ids, 40, 0), make_row(ids, 1, 1)
    batch = pack([late, early], share_prefixes=True)
    assert batch.lengths == (20, 41, 41)
    assert batch.num_tokens == pack([early, late], share_prefixes=True).num_tokens


@given(like_rows(), st.integers(1, 120))
def test_runs_of_shared_rows_come_to_the_budget_once_packed(rows: list[TokenRow], budget: int) -> None:
    runs = micro_batches(rows, budget, share_prefixes=True)
    assert sorted(row.row for run in runs for row in run) == [row.row for row in rows]
    for run in runs:
        assert pack(run, share_prefixes=True).num_tokens <= budget or len(run) == 1
    for run, following in pairwise(runs):
        assert pack([*run, following[0]], share_prefixes=True).num_tokens > budget


def test_rows_that_begin_alike_meet_in_one_run() -> None:
    rows = [make_row([number % 3] * 80 + [4 + number, 1], 1, number) for number in range(12)]
    assert len(micro_batches(rows, 100)) == 12
    assert [pack(run, share_prefixes=True).num_tokens for run in micro_batches(rows, 100, share_prefixes=True)] == [88, 88, 88]


def test_a_pairs_prompt_is_there_once_and_its_sides_keep_their_order() -> None:
    chosen, rejected = (make_row([5] * 40 + [reply, 2], 2, number) for number, reply in enumerate((8, 3)))
    batch = pack([PreferencePair(chosen, rejected, 0, Where("pairs.jsonl", 1))], share_prefixes=True)
    assert batch.num_tokens == 39 + 3 + 3
    assert batch.rows == (0, 1)
    assert batch.targets_S.tolist() == [8, 2, 3, 2]
