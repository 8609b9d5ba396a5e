"""The kinds of question: what is asked, which answers are true and which are false, one draw at a time.

Some ask for a convention that a reader of the numbers alone gets wrong (which part of 04/07/2031 is the month, which of four
measures is the largest), one for reading a list, some for names that must be known, and one for weekdays, which a small model can
only know by heart. Values that are answers, true or false, are of the question's own side of `data/splits.py`.
Next: `questions.py` (the set), `kivnun/evaluate/multiple_choice.py` (how it is scored).
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Literal, TypeVar

from babel import Locale
from babel.dates import format_date
from babel.numbers import format_currency
from babel.units import format_unit

from kivnun.data.scenarios.cldr import NO_BREAK_SPACES, Value, draw_value, render
from kivnun.data.splits import wanted

T = TypeVar("T")
UnitRandom = Callable[[], float]
"""Gives numbers in [0, 1)."""

OPTIONS = 4
MONTH_FIRST, DAY_FIRST = ("the United States",), ("Britain", "Israel", "Germany")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
# How much of the smallest unit of its family each unit holds: what may be compared.
FAMILIES = (
    {"length-kilometer": 100_000, "length-meter": 100, "length-centimeter": 1},
    {"mass-tonne": 1_000_000, "mass-kilogram": 1_000, "mass-gram": 1},
    {"volume-liter": 1_000, "volume-milliliter": 1},
    {"area-square-kilometer": 1_000_000, "area-hectare": 10_000, "area-square-meter": 1},
)


@dataclass(frozen=True, slots=True)
class Draft:
    """A question before it is worded. `subject` goes into a wording, `listed` are the best answer and its three rivals, which are
    the options where options are listed; `also_true` and `also_false` are further answers."""

    topic: str
    subject: tuple[str, ...]
    listed: tuple[str, ...]
    also_true: tuple[str, ...] = ()
    also_false: tuple[str, ...] = ()


def order_draft(split: str, unit_random: UnitRandom) -> Draft:
    """Ask which day a date in figures means in a country; the rivals take the parts in the other order, or another year."""
    while True:
        day = _day(split, unit_random)
        if day.day > 12 or day.day == day.month:
            continue
        swapped = day.replace(day=day.month, month=day.day)
        years = [year for year in _shuffled(range(1950, 2050), unit_random) if year != day.year]
        if not _on_side(swapped, split):
            continue
        others = ((day.replace(year=year), swapped.replace(year=year)) for year in years)
        pair = next((pair for pair in others if all(_on_side(one, split) for one in pair)), None)
        if pair is None:
            continue
        month_first = unit_random() < 0.5
        country = _pick(MONTH_FIRST if month_first else DAY_FIRST, unit_random)
        first, second = (day.month, day.day) if month_first else (day.day, day.month)
        days = (day, swapped, *pair)
        american = tuple(format_date(one, "long", locale="en") for one in days)
        british = tuple(format_date(one, "long", locale="en_GB") for one in days)
        figures = f"{first:02}/{second:02}/{day.year}"
        return Draft(day.isoformat(), (figures, country), american, (british[0],), british[1:])


def rounding_draft(split: str, unit_random: UnitRandom) -> Draft:
    """Ask for an amount in whole units of its currency; the rivals are one off, or in another currency."""
    while True:
        value, other = draw_value("amount", split, unit_random), draw_value("amount", split, unit_random)
        ((number, code),), ((_, other_code),) = value.parts, other.parts
        cents = Fraction(number) % 1
        if "." not in number or cents in (0, Fraction(1, 2)) or code == other_code:
            continue
        down = int(Fraction(number))
        right, wrong = (down, down + 1) if cents < Fraction(1, 2) else (down + 1, down)
        pairs = ((right, code), (wrong, code), (right, other_code), (wrong, other_code))
        long = tuple(_plain(format_currency(n, c, "#,##0", "en", currency_digits=False, format_type="name")) for n, c in pairs)
        short = tuple(_plain(format_currency(n, c, "¤#,##0", "en", currency_digits=False)) for n, c in pairs)
        said = render(value, "en")
        if said is not None and len({*long, *short}) == 2 * OPTIONS:
            return Draft(value.name, (said,), long, (short[0],), short[1:])


def largest_draft(split: str, unit_random: UnitRandom) -> Draft:
    """Ask for the largest of four measures; the one with the largest number is another."""
    while True:
        family = _pick(FAMILIES, unit_random)
        measures: list[Value] = []
        while len(measures) < OPTIONS:
            value = draw_value("unit", split, unit_random)
            if value.parts[0][1] in family:
                measures.append(value)
        sizes = [int(number) * family[unit] for value in measures for number, unit in value.parts]
        numbers = [int(number) for value in measures for number, _ in value.parts]
        best = sizes.index(max(sizes))
        if len(set(sizes)) == OPTIONS and len(set(numbers)) == OPTIONS and numbers[best] != max(numbers):
            ranked = [measures[best], *(value for value in measures if value is not measures[best])]
            long, short = [_measure(value, "long") for value in ranked], [_measure(value, "short") for value in ranked]
            shown = ", ".join(_shuffled(long, unit_random))
            return Draft(measures[best].name, (shown,), tuple(long), (short[0],), tuple(short[1:]))


def earliest_draft(split: str, unit_random: UnitRandom) -> Draft:
    """Ask which of four days came first."""
    while True:
        days = sorted(_day(split, unit_random) for _ in range(OPTIONS))
        if len({day.year for day in days}) == OPTIONS:
            long, british = ([format_date(day, "long", locale=locale) for day in days] for locale in ("en", "en_GB"))
            shown = "; ".join(_shuffled(long, unit_random))
            return Draft(days[0].isoformat(), (shown,), tuple(long), (british[0],), tuple(british[1:]))


def weekday_draft(split: str, unit_random: UnitRandom) -> Draft:
    """Ask for the weekday of a day: nothing in the question tells it."""
    day = _day(split, unit_random)
    rivals = _shuffled([name for name in WEEKDAYS if name != WEEKDAYS[day.weekday()]], unit_random)
    listed = (WEEKDAYS[day.weekday()], *rivals[: OPTIONS - 1])
    return Draft(day.isoformat(), (format_date(day, "long", locale="en"),), listed, (), tuple(rivals[OPTIONS - 1 :]))


def table_draft(split: str, unit_random: UnitRandom) -> Draft:
    """Ask for one entry of a list of territories with a measure each; the other entries are the false answers."""
    names = names_of("territory", "train") | names_of("territory", "test")
    while True:
        codes = _shuffled(sorted(names), unit_random)[:OPTIONS]
        topic = "+".join(sorted(codes))
        measures = [_measure(draw_value("unit", split, unit_random), "long") for _ in codes]
        if wanted("combination", topic, split) and len(set(measures)) == OPTIONS:
            lines = [f"{names[code][0]}: {measure}" for code, measure in zip(codes, measures, strict=True)]
            subject = ("\n".join(_shuffled(lines, unit_random)), names[codes[0]][0])
            return Draft(topic, subject, tuple(measures))


def name_draft(kind: str) -> Callable[[str, UnitRandom], Draft]:
    """Ask for the Hebrew name of a territory, language or currency; the false answers are names of others."""

    def draw(split: str, unit_random: UnitRandom) -> Draft:
        names = names_of(kind, split)
        codes = _shuffled(sorted(names), unit_random)[:OPTIONS]
        return Draft(codes[0], (names[codes[0]][0],), tuple(names[code][1] for code in codes))

    return draw


@cache
def names_of(kind: str, split: str) -> dict[str, tuple[str, str]]:
    """Return code -> (English, Hebrew) for one side's territories, languages or currencies that have a name in both."""
    english, hebrew = (_table(kind, locale) for locale in ("en", "he"))
    length = {"territory": (2,), "language": (2, 3), "currency": (3,)}[kind]
    found: dict[str, tuple[str, str]] = {}
    for code in sorted(english):
        names = (english[code], _plain(hebrew.get(code, "")))
        taken = names[1] in ("", *(other for _, other in found.values()))
        if len(code) in length and wanted(kind, code, split) and not taken and "(" not in "".join(names):
            found[code] = names
    return found


def _table(kind: str, locale: str) -> dict[str, str]:
    data = Locale.parse(locale)
    tables: dict[str, Mapping[str, str]] = {
        "territory": data.territories,
        "language": data.languages,
        "currency": data.currencies,
    }
    return dict(tables[kind])


def _day(split: str, unit_random: UnitRandom) -> datetime.date:
    return datetime.date.fromisoformat(draw_value("date", split, unit_random).name)


def _on_side(day: datetime.date, split: str) -> bool:
    return wanted("date", day.isoformat(), split)


def _measure(value: Value, length: Literal["long", "short"]) -> str:
    ((number, unit),) = value.parts
    return _plain(str(format_unit(int(number), unit, length=length, locale="en")))


def _plain(text: str) -> str:
    return text.translate(NO_BREAK_SPACES)


def _pick(items: Sequence[T], unit_random: UnitRandom) -> T:
    return items[int(unit_random() * len(items))]


def _shuffled(items: Sequence[T], unit_random: UnitRandom) -> list[T]:
    left = list(items)
    return [left.pop(int(unit_random() * len(left))) for _ in items]
