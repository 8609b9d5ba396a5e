"""The demo's rows: right Hebrew, values of one side only, the same for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kivnun.data.formats import read_records
from kivnun.data.scenarios.cldr import INSTRUCTION, TOPICS, Value, draw_value, iso, render, rows, write
from kivnun.data.splits import held_out
from kivnun.randomness import generator

DAY = Value("date", "2024-08-03", ())
PRICE = Value("amount", "1234.50 USD", (("1234.50", "USD"),))
LENGTH = Value("unit", "12 length-kilometer", (("12", "length-kilometer"),))
TIME = Value("duration", "3 hour 12 minute", (("3", "duration-hour"), ("12", "duration-minute")))


def test_values_are_written_as_cldr_writes_them() -> None:
    assert [render(value, "en") for value in (DAY, PRICE, LENGTH, TIME)] == [
        "August 3, 2024",
        "1,234.50 US dollars",
        "12 kilometers",
        "3 hours and 12 minutes",
    ]
    assert [render(value, "he") for value in (DAY, PRICE, LENGTH, TIME)] == [
        "3 באוגוסט 2024",
        "1,234.50 דולר אמריקאי",
        "12 קילומטרים",
        "3 שעות ו12 דקות",
    ]
    assert [iso(value) for value in (DAY, PRICE, LENGTH, TIME)] == ["2024-08-03", "USD 1234.50", "12 kilometer", "3 hour 12 minute"]


def test_a_unit_without_a_name_in_a_language_is_no_text() -> None:
    assert render(Value("unit", "2 length-mile", (("2", "length-mile"),)), "he") is None


def test_no_break_spaces_and_direction_marks_are_gone() -> None:
    said = [
        str(render(value, locale))
        for value in (DAY, PRICE, LENGTH, TIME)
        for locale in ("fr", "ar", "he", "ru")
        if render(value, locale)
    ]
    assert not any(mark in text for text in said for mark in "\u00a0\u202f\u200e\u200f\u061c")


def test_no_value_is_on_both_sides_whatever_the_seed() -> None:
    train = {content(row, 0) for seed in (0, 7) for row in rows("train", 400, seed)}
    test = {content(row, 0) for seed in (0, 7, 8) for row in rows("test", 200, seed)}
    assert len(train) > 700
    assert not train & test


@pytest.mark.parametrize("topic", TOPICS)
def test_each_side_draws_its_own_values(topic: str) -> None:
    draws = generator(3, "test", topic).random
    for split in ("train", "test"):
        assert {held_out(topic, draw_value(topic, split, draws).name) for _ in range(200)} == {split == "test"}


def test_rows_are_a_function_of_split_count_and_seed() -> None:
    assert rows("train", 50, 7) == rows("train", 50, 7)
    assert rows("train", 80, 7)[:50] == rows("train", 50, 7)
    assert rows("train", 50, 8) != rows("train", 50, 7)


def test_the_four_topics_come_in_turn_and_no_value_twice() -> None:
    made = rows("test", 200, 7)
    assert len({content(row, 0) for row in made}) == 200
    assert all(content(row, 0).startswith(INSTRUCTION) for row in made)


def test_written_files_are_read_back_as_conversations(tmp_path: Path) -> None:
    train, validation = write(tmp_path, train=20, validation=8)
    name, records, problems = read_records(train)
    assert (name, len(records), problems) == ("messages", 20, [])
    assert [json.loads(line) for line in validation.read_text(encoding="utf-8").splitlines()] == rows("test", 8, 7)


def content(row: dict, message: int) -> str:
    return row["messages"][message]["content"]
