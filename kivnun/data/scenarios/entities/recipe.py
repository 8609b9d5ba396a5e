"""Named entities: people, countries, languages, money and dates in a sentence, given and scored as character spans.

The names and values come from CLDR and are split, as are the people; a name may come twice in a sentence, and one sentence in
eight has no entity. `entity_spans.py` writes spans as the lines that a model is taught, and reads them back from its reply.
Next: `../translation/recipe.py`.
"""

from __future__ import annotations

import re

from kivnun.data.entity_spans import Span, as_answer, checked_spans
from kivnun.data.scenarios.cldr import draw_value, render
from kivnun.data.scenarios.cldr_names import codes, names
from kivnun.data.scenarios.draws import Draws
from kivnun.data.scenarios.names import person
from kivnun.data.scenarios.scenario import Example, Row, Topic, chat
from kivnun.data.splits import wanted
from kivnun.errors import DataError

LABELS = ("person", "country", "language", "money", "date")
INSTRUCTION = "Mark each {labels}.\nText: {text}"
SENTENCES = (
    "On {date}, {person} paid {money} to a bank in {country}.",
    "{person} owes {person} {money} since {date}.",
    "The price rose to {money} in {country}.",
    "{person} speaks {language} and lives in {country}.",
    "From {date} on, letters to {country} are written in {language}.",
    "{person} translated the contract from {language} to {language}.",
    "{country} and {country} agreed on {date}.",
    "Our office in {country} closes on {date}.",
    "The fee of {money} is due on {date}, said {person}.",
    "Does {person} still teach {language} in {country}?",
    "{money} were sent from {country} to {country}.",
    "Nobody but {person} knew of {date}.",
    "{language} is taught by {person}.",
    "{person} was born on {date} in {country}.",
    "A ticket to {country} costs {money}.",
    "{person} and {person} met in {country}, where {person:0} learned {language}.",
    "In {country}, as {person} wrote on {date}, {country:0} comes first.",
    "{person} gave {money}, and {person} gave {money}.",
)
EMPTY = (
    "The {thing} was moved to another room.",
    "Nobody knew where the {thing} was.",
    "Please send back the {thing} before noon.",
    "The price of the {thing} has not changed since then.",
    "They paid for the {thing} in cash and left.",
    "The {thing} is long, and the bus was late.",
)
SIZES = ("small", "large", "broken", "shiny", "wooden", "heavy", "round", "empty", "painted", "rusty", "plain", "soft")
THINGS = ("lamp", "rope", "map", "clock", "kettle", "ladder", "basket", "violin", "drum", "chair", "bell", "key", "boat", "form")
SLOT = re.compile(r"\{(\w+)(?::(\d))?\}")


def examples(split: str, count: int, seed: int) -> list[Example]:
    """Return rows of one or two sentences."""
    found: list[Example] = []
    for number in range(count):
        draws = Draws(seed, "scenario.entities", split, number)
        topics: list[Topic] = []
        text, spans = _text(draws, split, topics)
        found.append(Example(row(text, spans), tuple(dict.fromkeys(topics))))
    return found


def row(text: str, spans: list[Span], labels: tuple[str, ...] = LABELS) -> Row:
    """Return the row of a text and its entities. Raises DataError where the spans cannot be written."""
    return chat(INSTRUCTION.format(labels=", ".join(labels), text=text), as_answer(text, spans))


def convert(record: Row) -> Row:
    """Return the row of a record {"text", "entities": [{"start", "end", "label"}]}, "labels" too if it likes. Raises DataError."""
    text, labels = record.get("text"), record.get("labels")
    if not isinstance(text, str):
        raise DataError("a record holds the string 'text' and under 'entities' a list of {start, end, label}")
    spans = checked_spans(text, record.get("entities"))
    wanted = tuple(map(str, labels)) if isinstance(labels, list) else LABELS  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    return row(text, spans, wanted)


def _text(draws: Draws, split: str, topics: list[Topic]) -> tuple[str, list[Span]]:
    """Return the text and its spans; the topics that it names are appended to `topics`."""
    text, spans = "", list[Span]()
    for _ in range(draws.pick((1, 1, 1, 2))):
        text += " " if text else ""
        if draws.chance(1 / 8):
            text += draws.pick(EMPTY).format(thing=_thing(draws, split, topics))
            continue
        template = draws.pick(SENTENCES)
        said: dict[str, list[str]] = {}
        end = 0
        for slot in SLOT.finditer(template):
            text += template[end : slot.start()]
            kind, again = slot.group(1), slot.group(2)
            name = said[kind][int(again)] if again else _name(draws, kind, split, topics)
            said.setdefault(kind, []).append(name)
            spans.append(Span(len(text), len(text) + len(name), kind))
            text += name
            end = slot.end()
        text += template[end:]
    return text, spans


def _thing(draws: Draws, split: str, topics: list[Topic]) -> str:
    """Return something that is no entity."""
    while True:
        size, thing = draws.pick(SIZES), draws.pick(THINGS)
        if wanted("combination", f"{size}+{thing}", split):
            topics.append(("combination", f"{size}+{thing}"))
            return f"{size} {thing}"


def _name(draws: Draws, kind: str, split: str, topics: list[Topic]) -> str:
    if kind == "person":
        name = person(draws, split)
        topics.append(("person", name))
        return name
    if kind in ("money", "date"):
        value = draw_value("amount" if kind == "money" else "date", split, draws.unit)
        topics.append((value.topic, value.name))
        return str(render(value, "en"))
    source = "territory" if kind == "country" else "language"
    code = draws.pick(codes(source, split, "en"))
    topics.append((source, code))
    return names(source, "en")[code]
