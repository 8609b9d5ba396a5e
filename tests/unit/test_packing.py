"""Packs: rows end to end, labels inside their rows alone, nothing lost, nothing split."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kivnun.data.packing import micro_batches, pack
from kivnun.data.rows import TokenRow, Where


def make_row(ids: list[int], weights: list[float], row: int = 0) -> TokenRow:
    return TokenRow(np.asarray(ids, np.int32), np.asarray(weights, np.float32), row, Where("rows.jsonl", row + 1), 1)


@st.composite
def token_rows(draw: st.DrawFn) -> list[TokenRow]:
    rows = []
    for number in range(draw(st.integers(1, 6))):
        ids = draw(st.lists(st.integers(0, 300), min_size=1, max_size=12))
        rest = draw(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=len(ids) - 1, max_size=len(ids) - 1))
        rows.append(make_row(ids, [0.0, *rest], number))
    return rows


@given(token_rows())
def test_every_token_and_every_weight_is_there_once(rows: list[TokenRow]):
    batch = pack(rows)
    assert batch.ids_T.tolist() == [token for row in rows for token in row.ids]
    assert batch.positions_T.tolist() == [at for row in rows for at in range(row.length)]
    assert batch.lengths == tuple(row.length for row in rows)
    assert batch.num_tokens == sum(batch.lengths)
    assert batch.total_weight == sum(row.total_weight for row in rows)
    assert len(batch.targets_S) == sum(int(np.count_nonzero(row.weights)) for row in rows)


@given(token_rows())
def test_a_target_is_the_token_after_its_position_in_the_same_row(rows: list[TokenRow]):
    batch = pack(rows)
    row_of_T = np.repeat(np.arange(len(rows)), batch.lengths)
    for select, target, weight, segment in zip(batch.select_S, batch.targets_S, batch.weights_S, batch.segment_S, strict=True):
        row = rows[segment]
        assert row_of_T[select] == segment
        at = int(batch.positions_T[select]) + 1
        assert 0 < at < row.length  # never a row's first token
        assert target == row.ids[at]
        assert weight == row.weights[at] != 0


def test_a_weight_on_a_first_token_is_refused():
    """It would be predicted from the last token of the row before."""
    with pytest.raises(AssertionError):
        pack([make_row([1, 2], [0.0, 1.0]), make_row([3, 4], [1.0, 1.0])])


@given(token_rows(), st.integers(1, 40))
def test_micro_batches_keep_all_rows_in_order_within_the_budget(rows: list[TokenRow], budget: int):
    parts = micro_batches(rows, budget)
    assert [row for part in parts for row in part] == rows
    for part in parts:
        assert sum(row.length for row in part) <= budget or len(part) == 1
    for part, following in pairwise(parts):
        assert sum(row.length for row in part) + following[0].length > budget  # no cut without need


def test_no_rows_make_no_micro_batches():
    assert micro_batches([], 10) == []
