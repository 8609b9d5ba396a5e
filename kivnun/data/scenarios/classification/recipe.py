"""Text classification: a line of names from CLDR, and the one of six languages that it is in.

A line holds names of countries, languages or currencies; their codes are split, so a held-out line is made of names that no
training line has in any language. A line is only taken when no other of the languages would write it the same.
Next: `../entities/recipe.py`.
"""

from __future__ import annotations

from kivnun.data.scenarios.cldr_names import KINDS, codes, names
from kivnun.data.scenarios.draws import Draws
from kivnun.data.scenarios.scenario import Example, Row, Topic, chat
from kivnun.errors import DataError

LANGUAGES = {
    "en": "English",
    "fr": "French",
    "de": "German",
    "es": "Spanish",
    "it": "Italian",
    "pt": "Portuguese",
}
INSTRUCTION = "Which language is this? {text}"
NAMES = 2


def examples(split: str, count: int, seed: int) -> list[Example]:
    """Return rows with the languages in turn, no line twice."""
    seen: set[str] = set()
    found: list[Example] = []
    locales = list(LANGUAGES)
    for number in range(count):
        draws = Draws(seed, "scenario.classification", split, number)
        locale = locales[number % len(locales)]
        topics = _topics(draws, split)
        while (text := _line(topics, locale)) in seen or any(_line(topics, other) == text for other in locales if other != locale):
            topics = _topics(draws, split)
        seen.add(text)
        found.append(Example(row(text, LANGUAGES[locale]), topics))
    return found


def row(text: str, label: str, instruction: str = INSTRUCTION) -> Row:
    """Return the row of a text and its label: the reply is the label alone."""
    return chat(instruction.format(text=text), label)


def convert(record: Row) -> Row:
    """Return the row of a record {"text", "label"}, for a pair of texts also "text2". Raises DataError."""
    text, label, second = record.get("text", record.get("text1")), record.get("label"), record.get("text2", "")
    if not isinstance(text, str) or not isinstance(label, str) or not isinstance(second, str):
        raise DataError("a record holds the strings 'text' and 'label'; of two texts the second under 'text2'")
    return row(f"{text}\n{second}" if second else text, label, "Which label? {text}")


def _topics(draws: Draws, split: str) -> tuple[Topic, ...]:
    kinds = [draws.pick(KINDS) for _ in range(NAMES)]
    return tuple((kind, draws.pick(codes(kind, split, *LANGUAGES))) for kind in kinds)


def _line(topics: tuple[Topic, ...], locale: str) -> str:
    return ", ".join(names(kind, locale)[code] for kind, code in topics)
