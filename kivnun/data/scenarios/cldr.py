"""Dates, amounts, measures and durations as CLDR (Babel) writes them in any language, and the demo's rows from English to Hebrew.

The words are a closed list: 12 months, 25 currencies, 18 units, 5 units of time. What is new in a test row is the combination:
a day, a number with its currency or unit, a pair of times. Combinations are split by `kivnun/data/splits.py`, and the built-in
base's pretraining draws its values here too, always from the training side.

    python -m kivnun.data.scenarios.cldr OUT        writes OUT/train.jsonl and OUT/validation.jsonl
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babel.dates import format_date
from babel.lists import format_list
from babel.numbers import format_currency
from babel.units import format_unit

from kivnun.data.splits import wanted
from kivnun.randomness import generator

CURRENCIES = (
    *("USD", "EUR", "ILS", "GBP", "JPY", "CHF", "RUB", "CNY", "INR", "TRY", "SEK", "NOK", "DKK"),
    *("PLN", "CZK", "HUF", "CAD", "AUD", "MXN", "BRL", "ZAR", "EGP", "JOD", "KRW", "THB"),
)
UNITS = (
    "length-kilometer",
    "length-meter",
    "length-centimeter",
    "mass-kilogram",
    "mass-gram",
    "mass-tonne",
    "volume-liter",
    "volume-milliliter",
    "temperature-celsius",
    "area-square-meter",
    "area-square-kilometer",
    "area-hectare",
    "speed-kilometer-per-hour",
    "digital-megabyte",
    "energy-kilowatt-hour",
    "power-watt",
    "electric-volt",
    "concentr-percent",
)
TIME_PAIRS = (("month", "day"), ("day", "hour"), ("hour", "minute"), ("minute", "second"))
LARGEST = {"month": 11, "day": 30, "hour": 23, "minute": 59, "second": 59}
FIRST_DAY = datetime.date(1950, 1, 1).toordinal()
LAST_DAY = datetime.date(2049, 12, 31).toordinal()
TOPICS = ("date", "amount", "unit", "duration")
INSTRUCTION = "Write in Hebrew: "
NO_BREAK_SPACES = str.maketrans({"\u00a0": " ", "\u202f": " ", "\u200f": None, "\u200e": None, "\u061c": None})


@dataclass(frozen=True, slots=True)
class Value:
    """One thing that can be said in any language: its kind, its name for `held_out`, and its numbers with their units."""

    topic: str
    name: str
    parts: tuple[tuple[str, str], ...]


def render(value: Value, locale: str) -> str | None:
    """Return the value in words as CLDR writes it there, or None where Babel has no word for it.

    No-break spaces become spaces and direction marks go: they are typography, and an exact match should not hang on them.
    """
    if value.topic == "date":
        return _plain(format_date(datetime.date.fromisoformat(value.name), "long", locale=locale))
    if value.topic == "amount":
        ((number, code),) = value.parts
        return _plain(format_currency(number, code, locale=locale, format_type="name"))
    pieces: list[str] = []
    for number, unit in value.parts:
        words = str(format_unit(int(number), unit, locale=locale))
        # Where CLDR has no name Babel writes the identifier instead ("2 duration-day"): no text of any language.
        if unit in words or "-" + unit.split("-", 1)[1] in words:
            return None
        pieces.append(words)
    return _plain(pieces[0] if len(pieces) == 1 else str(format_list(pieces, locale=locale)))


def iso(value: Value) -> str:
    """Return the value in a neutral notation: 2024-08-03, USD 1234.50, 12 kilometer, 3 hour 12 minute."""
    if value.topic == "amount":
        ((number, code),) = value.parts
        return f"{code} {number}"
    if value.topic == "date":
        return value.name
    return " ".join(f"{number} {unit.split('-', 1)[1]}" for number, unit in value.parts)


def draw_value(topic: str, split: str, unit_random: Callable[[], float]) -> Value:
    """Return a value of `topic` on the wanted side of the split. `unit_random` gives numbers in [0, 1)."""
    draw = {"date": _date, "amount": _amount, "unit": _unit, "duration": _duration}[topic]
    while True:
        value = draw(unit_random)
        if wanted(topic, value.name, split):
            return value


def rows(split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Return `count` rows in the `messages` format: those of `values`."""
    return [row(value) for value in values(split, count, seed)]


def values(split: str, count: int, seed: int) -> list[Value]:
    """Return `count` values that Hebrew has words for, the four topics in turn, no value twice.

    `split` is "train" or "test": no value of one side ever appears on the other, whatever the counts and seeds.
    """
    seen: set[str] = set()
    result: list[Value] = []
    for number in range(count):
        topic = TOPICS[number % len(TOPICS)]
        rng = generator(seed, "scenario.cldr", split, number)
        value = draw_value(topic, split, rng.random)
        while value.name in seen or render(value, "he") is None:
            value = draw_value(topic, split, rng.random)
        seen.add(value.name)
        result.append(value)
    return result


def write(folder: Path, train: int = 2_250, validation: int = 200, seed: int = 7) -> tuple[Path, Path]:
    """Write train.jsonl and validation.jsonl (the test side) into `folder` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "validation.jsonl"
    for path, split, count in zip(paths, ("train", "test"), (train, validation), strict=True):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows(split, count, seed)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def row(value: Value) -> dict[str, Any]:
    """Return the conversation that asks for a value in Hebrew and gives it."""
    user = {"role": "user", "content": f"{INSTRUCTION}{render(value, 'en')}"}
    return {"messages": [user, {"role": "assistant", "content": render(value, "he")}]}


def _plain(text: str) -> str:
    return text.translate(NO_BREAK_SPACES)


def _below(unit_random: Callable[[], float], count: int) -> int:
    return int(unit_random() * count)


def _number(unit_random: Callable[[], float]) -> int:
    """Numbers of one to four digits, each length as likely as the next."""
    digits = 1 + _below(unit_random, 4)
    return 10 ** (digits - 1) + _below(unit_random, 9 * 10 ** (digits - 1))


def _date(unit_random: Callable[[], float]) -> Value:
    day = datetime.date.fromordinal(FIRST_DAY + _below(unit_random, LAST_DAY - FIRST_DAY + 1))
    return Value("date", day.isoformat(), ())


def _amount(unit_random: Callable[[], float]) -> Value:
    code = CURRENCIES[_below(unit_random, len(CURRENCIES))]
    number = str(_number(unit_random))
    if code not in ("JPY", "KRW", "JOD"):  # currencies that have no cents, or thousandths
        number += f".{_below(unit_random, 100):02d}"
    return Value("amount", f"{number} {code}", ((number, code),))


def _unit(unit_random: Callable[[], float]) -> Value:
    unit = UNITS[_below(unit_random, len(UNITS))]
    number = str(_number(unit_random))
    return Value("unit", f"{number} {unit}", ((number, unit),))


def _duration(unit_random: Callable[[], float]) -> Value:
    pair = TIME_PAIRS[_below(unit_random, len(TIME_PAIRS))]
    numbers = [1 + _below(unit_random, LARGEST[unit]) for unit in pair]
    name = " ".join(f"{number} {unit}" for number, unit in zip(numbers, pair, strict=True))
    return Value("duration", name, tuple((str(n), f"duration-{u}") for n, u in zip(numbers, pair, strict=True)))


if __name__ == "__main__":
    for written in write(Path(sys.argv[1] if len(sys.argv) > 1 else ".")):
        print(written)
