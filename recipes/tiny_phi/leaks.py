"""Finds held-out values in a text: the proof that the base never saw what the demo is tested on.

Works on what is written, not on how it was made, so it judges the documentation's text and the generators alike: days in ISO,
English and Hebrew, numbers with a currency or a unit, and pairs of times. Errs on the safe side (in "12 kilometer-per-hour" it
reads 12 kilometer too). Next: `corpus.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from babel import Locale

from kivnun.data.scenarios.cldr import CURRENCIES, LARGEST, UNITS, Value, render
from kivnun.data.splits import held_out

NUMBER = r"(?<![\d.,])(\d[\d,]*(?:\.\d+)?)"
ISO_DAY = re.compile(r"(?<!\d)(\d{4}-\d\d-\d\d)(?!\d)")
ISO_AMOUNT = re.compile(rf"\b({'|'.join(CURRENCIES)}) (\d+(?:\.\d+)?)(?![\d,])")
PLURAL_SAMPLES = ("1", "2", "3", "10", "11", "20", "100", "1000")


def find_held_out(text: str) -> list[tuple[str, str]]:
    """Return (kind, topic) of every held-out day, amount, measure and duration that is written in `text`."""
    found = [("date", day) for day in ISO_DAY.findall(text)]
    found += [("amount", f"{number} {code}") for code, number in ISO_AMOUNT.findall(text)]
    for locale in ("en", "he"):
        found += _days(text, locale)
        pattern, codes = _measures(locale)
        for number, words in pattern.findall(text):
            kind, code = codes[words]
            found.append((kind, f"{number.replace(',', '')} {code}"))
        found += _durations(text, locale)
    return [(kind, topic) for kind, topic in dict.fromkeys(found) if held_out(kind, topic)]


def _days(text: str, locale: str) -> list[tuple[str, str]]:
    pattern, months = _day_pattern(locale)
    days = []
    for match in pattern.finditer(text):
        day, year = int(match["day"]), match["year"]
        days.append(("date", f"{year}-{months[match['month']]:02d}-{day:02d}"))
    return days


def _durations(text: str, locale: str) -> list[tuple[str, str]]:
    pattern, times = _time_pattern(locale)
    return [("duration", f"{times[one]} {times[other]}") for one, other in pattern.findall(text)]


@cache
def _day_pattern(locale: str) -> tuple[re.Pattern[str], dict[str, int]]:
    months = {name: number for number, name in Locale.parse(locale).months["format"]["wide"].items()}
    names = "|".join(months)
    form = rf"(?P<month>{names}) (?P<day>\d\d?), (?P<year>\d{{4}})(?!\d)"
    if locale == "he":
        form = rf"(?<!\d)(?P<day>\d\d?) ב(?P<month>{names}) (?P<year>\d{{4}})(?!\d)"
    return re.compile(form), months


@cache
def _measures(locale: str) -> tuple[re.Pattern[str], dict[str, tuple[str, str]]]:
    """Return a pattern for a number with a currency or unit, and what its words mean."""
    codes: dict[str, tuple[str, str]] = {}
    for kind, stock in (("amount", CURRENCIES), ("unit", UNITS)):
        for code in stock:
            for number in PLURAL_SAMPLES:
                said = render(Value(kind, f"{number} {code}", ((number, code),)), locale)
                if said is not None and said[0].isdigit():
                    codes[said.split(" ", 1)[1]] = (kind, code)
    return re.compile(rf"{NUMBER} ({_alternatives(codes)})(?!\w)"), codes


@cache
def _time_pattern(locale: str) -> tuple[re.Pattern[str], dict[str, str]]:
    """Return a pattern for two times, and what each time's words mean: all are listed, since some hold no digit (שעתיים)."""
    times: dict[str, str] = {}
    for unit, largest in LARGEST.items():
        for number in range(1, largest + 1):
            said = render(Value("duration", f"{number} {unit}", ((str(number), f"duration-{unit}"),)), locale)
            if said is not None:
                times[said] = f"{number} {unit}"
    names = _alternatives(times)
    joint = " and " if locale == "en" else " ו"
    return re.compile(rf"(?<![\d.,\w])({names}){joint}({names})(?!\w)"), times


def _alternatives(names: Iterable[str]) -> str:
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
