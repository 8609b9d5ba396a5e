"""The multiple-choice set: topics of one side only, true and false apart, the same every time; and how near the two sides come."""

from __future__ import annotations

import datetime
import json
from collections import Counter

import pytest

from kivnun.data.near import near_duplicates
from kivnun.data.scenarios.multiple_choice.kinds import FAMILIES, OPTIONS, WEEKDAYS, names_of
from kivnun.data.scenarios.multiple_choice.questions import (
    KINDS,
    TRAINED_WORDINGS,
    VARIATIONS,
    Question,
    contaminated_rows,
    questions,
    shuffled_rows,
    training_rows,
)
from kivnun.data.splits import held_out

TOPIC_KIND = {
    "order": "date",
    "earliest": "date",
    "weekday": "date",
    "rounding": "amount",
    "largest": "unit",
    "table": "combination",
}
TRAIN, TEST = questions("train", 135, 7), questions("test", 135, 7)


def test_no_topic_of_one_side_is_on_the_other() -> None:
    for split, asked in (("train", TRAIN), ("test", TEST)):
        assert all(held_out(TOPIC_KIND.get(q.kind, q.kind), q.topic) == (split == "test") for q in asked)
    other_seed = questions("train", 90, 8)
    topics = {(q.kind, q.topic) for q in TEST}
    assert not topics & {(q.kind, q.topic) for q in (*TRAIN, *other_seed)}


def test_no_training_row_holds_a_test_question_or_its_best_answer_to_it() -> None:
    rows = {json.dumps(row) for row in training_rows(TRAIN, 7)}
    assert not rows & {json.dumps(row) for row in (*contaminated_rows(TEST), *training_rows(TEST, 7))}
    assert near_duplicates([q.asks[0] for q in TRAIN], [q.asks[0] for q in TEST]).equal == 0


@pytest.mark.parametrize("asked", [TRAIN, TEST], ids=["train", "test"])
def test_true_answers_are_never_among_the_false_ones(asked: list[Question]) -> None:
    for question in asked:
        assert not set(question.true) & set(question.false)
        assert len(set(question.options)) == OPTIONS
        assert question.options[0] == question.best
        assert set(question.options[1:]) <= set(question.false)
        assert all(text == text.strip() and text for text in (*question.asks, *question.true, *question.false))


def test_the_set_is_the_same_every_time_and_no_question_comes_twice() -> None:
    assert questions("test", 135, 7) == TEST
    assert questions("test", 45, 8) != TEST[:45]
    assert len({(q.kind, q.topic) for q in TRAIN}) == len(TRAIN)
    assert [q.number for q in TRAIN] == list(range(135))


def test_a_longer_set_begins_with_the_shorter_one() -> None:
    assert questions("train", 100, 7) == TRAIN[:100]


def test_kinds_come_in_turn_and_a_kind_without_topics_left_makes_room() -> None:
    assert [q.kind for q in TEST[: len(KINDS)]] == [kind.name for kind in KINDS]
    counts = Counter(q.kind for q in questions("test", 250, 7))
    assert counts["currency"] <= len(names_of("currency", "test")) < 40
    assert sum(counts.values()) == 250


def test_every_kind_says_what_is_so() -> None:
    units = {unit.split("-", 1)[1]: (number, size) for number, family in enumerate(FAMILIES) for unit, size in family.items()}
    for question in TRAIN:
        if question.kind == "weekday":
            assert question.best == WEEKDAYS[datetime.date.fromisoformat(question.topic).weekday()]
            assert sorted((*question.true, *question.false)) == sorted(WEEKDAYS)
        if question.kind == "largest":
            number, unit = question.topic.split()
            family, size = units[unit.split("-", 1)[1]]
            assert len(FAMILIES[family]) > 1
            assert int(number) * size > 0
        if question.kind == "rounding":
            number, _ = question.topic.split()
            whole = int(question.best.split()[0].replace(",", ""))
            assert abs(whole - float(number)) < 0.5
        if question.kind == "earliest":
            day = datetime.date.fromisoformat(question.topic)
            assert all(day.year < int(text[-4:]) for text in question.false)
        if question.kind == "table":
            assert f": {question.best}" in question.asks[0]


def test_a_date_in_figures_is_read_as_its_country_does() -> None:
    for question in (q for q in TRAIN if q.kind == "order"):
        first, second, year = question.asks[0].removeprefix("Which day is ").split(" ")[0].split("/")
        month, day = (first, second) if "United States" in question.asks[0] else (second, first)
        assert question.topic == f"{year}-{month}-{day}"


def test_the_best_answer_stands_in_every_place_once() -> None:
    for question in TEST:
        assert sorted(order.index(0) for order in question.orders) == list(range(OPTIONS))
        assert all(sorted(order) == list(range(OPTIONS)) for order in question.orders)
        assert len({question.listed(number) for number in range(VARIATIONS)}) == VARIATIONS


def test_some_wordings_are_in_no_training_row() -> None:
    asked = {row["messages"][0]["content"].split("\nOptions:")[0] for row in training_rows(TRAIN, 7)}
    for question in TRAIN:
        assert not set(question.asks[TRAINED_WORDINGS:]) & asked


def test_shuffled_rows_ask_the_same_and_answer_at_random() -> None:
    rows, shuffled = training_rows(TRAIN, 7), shuffled_rows(TRAIN, 7)
    assert [row["messages"][0] for row in rows] == [row["messages"][0] for row in shuffled]
    listed = [row["messages"][1]["content"] for row in shuffled[1::2]]
    right = sum(reply == question.best for reply, question in zip(listed, TRAIN, strict=True))
    assert 18 < right < 52  # a quarter of 135 is 34
    openly = [row["messages"][1]["content"] for row in shuffled[0::2]]
    assert all(reply in (*q.true, *q.false) for reply, q in zip(openly, TRAIN, strict=True))
    assert shuffled != shuffled_rows(TRAIN, 8)


def test_likeness_is_one_for_equal_texts_and_none_for_texts_with_nothing_in_common() -> None:
    found = near_duplicates(["the quick brown fox", "something else"], ["The quick  brown fox", "0123456789", "the quick brown ox"])
    assert found.equal == 1
    assert [round(pair.likeness, 2) for pair in found.nearest] == [1.0, 0.0, 0.71]
    assert found.closest.test == 0
    assert (found.above(0.6), found.above(0.9)) == (2, 1)
