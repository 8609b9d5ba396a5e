"""Chat over several turns: a persona, made of what the system line says, that keeps to the format it is given.

Personas and names are split. The greeting, the farewell and the mark before each line are drawn anew for each conversation, so
that they can only be read off the system line. A held-out row is scored on its last reply, after none, one or two turns.
Next: `../melodies/recipe.py`.
"""

from __future__ import annotations

from typing import Any, cast

from kivnun.data.format_rules import EACH, FIRST, LAST
from kivnun.data.scenarios.draws import Draws
from kivnun.data.scenarios.names import invented, person, town
from kivnun.data.scenarios.scenario import Example, Row, chat
from kivnun.data.splits import wanted
from kivnun.errors import DataError

MANNERS = ("old", "young", "patient", "cheerful", "strict", "shy", "proud", "sleepy", "curious", "polite")
TRADES = (
    *("lighthouse keeper", "ship captain", "librarian", "gardener", "baker", "clockmaker", "tailor", "astronomer", "beekeeper"),
    *("painter", "shepherd", "carpenter", "teacher", "detective", "robot", "doctor", "postman", "miller", "pilot", "poet"),
    *("museum guide", "blacksmith", "archivist", "night guard", "judge", "merchant", "cartographer", "glassblower", "potter"),
)
GREETINGS = (
    "Good day, {}!",
    "Ahoy, {}!",
    "{} greets you.",
    "Listen, {}.",
    "Hear, hear, {}!",
    "By the {},",
    "Welcome to {}.",
    "Oh {}!",
)
FAREWELLS = ("Yours, {}.", "{} thanks you.", "So it is, {}.", "Mind the {}.", "Fair winds, {}!", "That is all, {}.", "{} and out.")
MARKS = ("* ", "- ", "> ", "+ ", "~ ", "= ", ">> ", "# ", "o ", "-> ")
SIZES = ("small", "large", "broken", "shiny", "wooden", "heavy", "round", "empty", "painted", "rusty")
THINGS = (
    "lamp",
    "rope",
    "map",
    "clock",
    "kettle",
    "ladder",
    "basket",
    "violin",
    "telescope",
    "drum",
    "chair",
    "bell",
    "key",
    "boat",
)
SYSTEM = "You are {name}, {article} {persona} in {place}. You have {one} and {two}. {rules}"


def examples(split: str, count: int, seed: int) -> list[Example]:
    """Return conversations of one to three turns; on the test side only the last reply is scored."""
    found: list[Example] = []
    for number in range(count):
        draws = Draws(seed, "scenario.chat", split, number)
        persona, name = draws.pick(PERSONAS[split]), person(draws, split)
        row = _conversation(draws, persona, name, 1 + number % 3, split)
        found.append(Example(row, (("persona", persona), ("person", name))))
    return found


def convert(record: Row) -> Row:
    """Return the row of a record {"messages": [...]}: of several replies only the last is scored. Raises DataError."""
    messages: Any = record.get("messages")
    if not isinstance(messages, list):
        raise DataError("a record holds a conversation under the key 'messages'")
    given = cast(list[Row], messages)
    earlier = [{**message, "weight": 0} if message.get("role") == "assistant" else message for message in given[:-1]]
    return {"messages": [*earlier, *given[-1:]]}


def _personas(split: str) -> tuple[str, ...]:
    found = (f"{manner} {trade}" for manner in MANNERS for trade in TRADES)
    return tuple(name for name in found if wanted("persona", name, split))


PERSONAS = {split: _personas(split) for split in ("train", "test")}


def _conversation(draws: Draws, persona: str, name: str, turns: int, split: str) -> Row:
    place, one, two = town(draws), _thing(draws), _thing(draws)
    first = draws.pick(GREETINGS).format(invented(draws).capitalize())
    last = draws.pick(FAREWELLS).format(invented(draws).capitalize())
    mark = draws.pick(MARKS)
    article = "an" if persona[0] in "aeiou" else "a"
    rules = " ".join((FIRST.format(first), LAST.format(last), EACH.format(mark)))
    system = SYSTEM.format(name=name, article=article, persona=persona, place=place, one=one, two=two, rules=rules)
    answers = (
        ("Who are you?", (f"I am {name}.", f"I am {article} {persona}.")),
        ("What do you do?", (f"I am {article} {persona}.",)),
        ("Where do you live?", (f"I live in {place}.",)),
        ("What do you have?", (f"I have {one}.", f"I have {two}.")),
        ("What is your name?", (f"My name is {name}.",)),
        ("Who are you, and where?", (f"I am {name}.", f"I live in {place}.")),
        ("What can I buy from you?", (f"You can buy {one}.", f"You can buy {two}.")),
    )
    contents: list[str] = []
    for question, points in draws.sample(answers, turns):
        contents += [question, "\n".join([first, *(f"{mark}{point}" for point in points), last])]
    return chat(*contents, system=system, weigh_last_only=split == "test")


def _thing(draws: Draws) -> str:
    size = draws.pick(SIZES)
    return f"{'an' if size[0] in 'aeiou' else 'a'} {size} {draws.pick(THINGS)}"
