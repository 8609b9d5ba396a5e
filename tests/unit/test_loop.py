"""The training loop prepares a step while the one before it computes, and tells what goes wrong there in its place."""

from __future__ import annotations

import threading

import pytest

from kivnun.train.loop import StepWork, one_ahead
from kivnun.train.passes import StepPacks


def work(step: int) -> StepWork:
    return StepWork([], StepPacks([], 0, 1), float(step), 0, False)


def test_the_next_step_is_prepared_while_one_computes_and_none_beyond_it() -> None:
    made = {step: threading.Event() for step in range(3, 8)}

    def prepare(step: int) -> StepWork:
        made[step].set()
        return work(step)

    for step, given in one_ahead(range(3, 7), prepare):
        assert given.total_weight == step
        assert made[step + 1].wait(10) if step < 6 else not made[7].is_set()
        assert not any(made[later].is_set() for later in range(step + 2, 8))
    assert list(one_ahead(range(3, 3), prepare)) == []


def test_what_goes_wrong_in_preparing_is_told_at_its_step() -> None:
    def prepare(step: int) -> StepWork:
        if step == 2:
            raise ValueError("row 7 is not there")
        return work(step)

    steps = one_ahead(range(1, 4), prepare)
    assert next(steps)[0] == 1
    with pytest.raises(ValueError, match="row 7"):
        next(steps)


def test_only_one_thread_asks_for_steps() -> None:
    threads: set[int] = set()

    def prepare(step: int) -> StepWork:
        threads.add(threading.get_ident())
        return work(step)

    assert len(list(one_ahead(range(1, 30), prepare))) == 29
    assert len(threads) == 1
    assert threading.get_ident() not in threads
