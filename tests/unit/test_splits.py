"""The rule of held-out topics: a tenth of each kind, for ever the same, with nothing in between."""

from __future__ import annotations

import pytest

from kivnun.data.splits import KINDS, held_out, wanted


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_tenth_of_each_kind_is_held_out(kind: str) -> None:
    topics = [f"{kind} topic {number}" for number in range(5000)]
    share = sum(held_out(kind, topic) for topic in topics) / len(topics)
    assert 0.085 < share < 0.115


def test_topics_stay_on_their_side_for_ever() -> None:
    """Written down once: moving one of these would put a test topic into a base that has been published."""
    dates = [f"2024-01-{day:02d}" for day in range(1, 32)]
    assert [day for day in dates if held_out("date", day)] == ["2024-01-04", "2024-01-12"]
    modules = ("json", "re", "os", "csv", "math", "logging", "random", "typing", "dataclasses", "copy")
    assert [name for name in modules if held_out("module", name)] == ["logging", "dataclasses", "copy"]


def test_kinds_are_split_independently() -> None:
    topics = [str(number) for number in range(3000)]
    both = sum(held_out("person", topic) and held_out("title", topic) for topic in topics)
    assert both < 70  # 1 % of 3000 is 30; the same topics would give 300


def test_every_topic_is_wanted_on_exactly_one_side() -> None:
    for number in range(300):
        assert wanted("title", str(number), "train") != wanted("title", str(number), "test")


def test_a_kind_that_nobody_defined_is_refused() -> None:
    with pytest.raises(AssertionError, match="unknown kind"):
        held_out("dates", "2024-01-01")
