"""Named entities: sentences with people, places and organisations, answered in one of several fixed formats.

Names are drawn anew for each sentence (training side of the split), so the answer has to be copied. Next: `classify.py`.
"""

from __future__ import annotations

import json
import re

from kivnun.data.scenarios.draws import Draws
from recipes.tiny_phi.chat import Task, chat
from recipes.tiny_phi.stocks import stock, stock_of_triples
from recipes.tiny_phi.words import ADJECTIVES, NOUNS, Words

SENTENCES = stock("entities.sentences")
EMPTY = stock("entities.empty")
HEBREW = stock("entities.hebrew")
ASKS = stock("entities.asks")
LABELS = stock_of_triples("entities.labels")
SLOT = re.compile(r"\{(person|place|org|adj|noun)\}")
Entity = tuple[str, str]
"""(type, text): type is person, place or org."""


def sentence(draws: Draws, words: Words) -> tuple[str, list[Entity]]:
    """Return a sentence and its entities (type, text) in their order; every eighth has none, some are Hebrew."""
    kind = draws.unit()
    template = draws.pick(EMPTY if kind < 0.12 else HEBREW if kind < 0.2 else SENTENCES)
    found: list[Entity] = []
    hebrew = template in HEBREW

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        if name in ("adj", "noun"):
            return draws.pick(ADJECTIVES if name == "adj" else NOUNS)
        text = _name(draws, words, name, hebrew)
        found.append((name, text))
        return text

    return SLOT.sub(fill, template), found


def answer(entities: list[Entity], form: int, labels: tuple[str, str, str]) -> str:
    """Return the entities in one of the formats: typed lines, one line, types with lists, JSON."""
    named: dict[str, str] = dict(zip(("person", "place", "org"), labels, strict=True))
    if form == 3:
        return json.dumps([{"text": text, "label": named[kind]} for kind, text in entities], ensure_ascii=False)
    if not entities:
        return "none"
    if form == 0:
        return "\n".join(f"{named[kind]}: {text}" for kind, text in entities)
    if form == 1:
        return " | ".join(f"{named[kind]}: {text}" for kind, text in entities)
    groups = {kind: [text for k, text in entities if k == kind] for kind in named}
    return "\n".join(f"{named[kind]}: {', '.join(texts) or '-'}" for kind, texts in groups.items())


def task(draws: Draws, words: Words, form: int, labels: tuple[str, str, str], ask: str) -> Task:
    """Return one sentence, or two, with its entities in the format."""
    parts = [sentence(draws, words) for _ in range(draws.pick((1, 1, 1, 2)))]
    text = " ".join(part for part, _ in parts)
    entities = list(dict.fromkeys(entity for _, found in parts for entity in found))
    return Task(f"{ask}\n{text}" if ask else text, answer(entities, form, labels))


def document(draws: Draws, words: Words) -> str:
    """Return a conversation in one format: the format is asked for, or shown by the turns before."""
    form, labels = draws.below(4), draws.pick(LABELS)
    kind = draws.unit()
    if kind < 0.35:
        return _questions(draws, words)
    named = ", ".join(labels)
    styles = (
        f"One per line: {named}.",
        f"Types: {named}.",
        f"For each of {named}: a list.",
        f"As JSON with text and label ({named}).",
    )
    ask = f"{draws.pick(ASKS)} {styles[form]}"
    if kind < 0.6:
        return chat(draws, [task(draws, words, form, labels, "") for _ in range(draws.between(2, 4))], system=ask)
    first = task(draws, words, form, labels, ask)
    return chat(draws, [first, *(task(draws, words, form, labels, "") for _ in range(draws.pick((0, 1, 2))))])


def _questions(draws: Draws, words: Words) -> str:
    """Return questions for one type at a time, the easy form of the skill."""
    text, entities = sentence(draws, words)
    tasks: list[Task] = []
    for kind in draws.shuffled(("person", "place", "org")):
        ask = {
            "person": ("Who is named?", "Which person is named?", "Name the people.", "Person?", "Who?"),
            "place": ("Which place is named?", "Name the places.", "Place?", "Where?", "Which town or country?"),
            "org": ("Which organisation is named?", "Name the organisations.", "Organisation?", "Which company or institute?"),
        }[kind]
        texts = [t for k, t in entities if k == kind]
        tasks.append(Task(draws.pick(ask), ", ".join(texts) or "none"))
    tasks[0] = Task(f"{text}\n{tasks[0].user}", tasks[0].reply)
    return chat(draws, tasks[: draws.between(1, 3)])


def _name(draws: Draws, words: Words, kind: str, hebrew: bool) -> str:
    if kind == "org":
        return words.organisation(draws)
    if hebrew:
        return words.hebrew_pseudo(draws) if kind == "person" or draws.chance(0.5) else draws.pick(words.territories["he"])[1]
    return words.person(draws) if kind == "person" else words.place(draws)
