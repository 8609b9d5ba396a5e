"""The learning rate at marked steps of a run, as a pure function of the step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kivnun.train.schedule import Schedule


def make_schedule(
    steps: int = 100,
    warmup_share: float = 0.1,
    decay: str = "linear",
    decay_start_share: float = 0.0,
    final_share: float = 0.0,
) -> Schedule:
    return Schedule(steps, 2.0, warmup_share, decay, decay_start_share, final_share)  # type: ignore[arg-type]


def test_warm_up_rises_evenly_from_above_zero():
    schedule = make_schedule()
    assert [schedule.learning_rate(step) for step in (1, 2, 10)] == pytest.approx([2 / 11, 4 / 11, 20 / 11])
    assert schedule.learning_rate(11) == 2.0


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [2.0, 2.0, 2.0]),
        ("linear", [2.0, 2.0 * (1 - 45 / 90), 2.0 * (1 - 89 / 90)]),
        ("cosine", [2.0, 1.0, 1 + math.cos(math.pi * 89 / 90)]),
    ],
)
def test_decay_falls_over_the_steps_after_warm_up(decay: str, expected: list[float]):
    schedule = make_schedule(decay=decay)
    assert [schedule.learning_rate(step) for step in (11, 56, 100)] == pytest.approx(expected)


def test_a_plateau_holds_until_the_decay_begins():
    schedule = make_schedule(decay_start_share=0.6, final_share=0.5)
    assert {schedule.learning_rate(step) for step in range(11, 62)} == {2.0}
    assert schedule.learning_rate(81) == pytest.approx(2.0 * (1 - 0.5 * 20 / 40))
    assert schedule.learning_rate(100) == pytest.approx(2.0 * (1 - 0.5 * 39 / 40))


def test_a_decay_that_begins_at_the_end_never_begins():
    assert make_schedule(decay_start_share=1.0).learning_rate(100) == 2.0


def test_without_warm_up_the_first_step_has_the_whole_rate():
    assert make_schedule(warmup_share=0.0).learning_rate(1) == 2.0


@given(
    steps=st.integers(1, 300),
    warmup_share=st.floats(0, 1),
    decay=st.sampled_from(["linear", "cosine", "constant"]),
    decay_start_share=st.floats(0, 1),
    final_share=st.floats(0, 1),
)
def test_no_step_has_no_rate_and_none_exceeds_the_peak(
    steps: int, warmup_share: float, decay: str, decay_start_share: float, final_share: float
):
    schedule = make_schedule(steps, warmup_share, decay, decay_start_share, final_share)
    rates = [schedule.learning_rate(step) for step in range(1, steps + 1)]
    assert all(0 < rate <= 2.0 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates == [schedule.learning_rate(step) for step in range(1, steps + 1)]
