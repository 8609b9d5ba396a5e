"""Simple running text in English and Hebrew, lists, counting, sorting and sums with small numbers. Next: `docs.py`."""

from __future__ import annotations

from kivnun.data.scenarios.draws import Draws
from recipes.tiny_phi.chat import Task, chat
from recipes.tiny_phi.stocks import stock
from recipes.tiny_phi.words import (
    ADJECTIVES,
    COLOURS,
    FIRST_NAMES,
    HEBREW_ADJECTIVES,
    HEBREW_NAMES,
    HEBREW_NOUNS,
    NOUNS,
    VERBS,
    Words,
)

ENGLISH = stock("prose.english")
HEBREW = stock("prose.hebrew")
UNITS_OF_COUNT = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
SORT_ASK = stock("prose.sort_ask")
NUMBER_ASK = stock("prose.number_ask")
COUNT_ASK = stock("prose.count_ask")
SUM_FORMS = ("{a} + {b} = {sum}", "{sum} - {a} = {b}", "{a} plus {b} is {sum}", "{sum} minus {b} is {a}")
SUM_ASK = stock("prose.sum_ask")


def paragraph(draws: Draws, words: Words) -> str:
    """Return two to eight sentences about a few people and things that come back."""
    hebrew = draws.chance(0.45)
    names = draws.sample(HEBREW_NAMES if hebrew else FIRST_NAMES, 2)
    nouns = draws.sample(HEBREW_NOUNS if hebrew else NOUNS, 4)
    sentences = []
    for _ in range(draws.between(2, 8)):
        name, name2 = draws.shuffled(names)
        noun, noun2 = draws.sample(nouns, 2)
        adj, adj2 = draws.sample(HEBREW_ADJECTIVES if hebrew else ADJECTIVES, 2)
        colour, colour2 = draws.sample(COLOURS, 2)
        sentences.append(
            draws.pick(HEBREW if hebrew else ENGLISH).format(
                name=name,
                name2=name2,
                noun=noun,
                noun2=noun2,
                adj=adj,
                adj2=adj2,
                verb=draws.pick(VERBS),
                number=draws.pick(UNITS_OF_COUNT),
                colour=colour,
                colour2=colour2,
            )
        )
    return " ".join(sentences)


def listing(draws: Draws, words: Words) -> str:
    """Return a list under a heading, or numbers in a row."""
    kind = draws.below(3)
    if kind == 0:
        first, step = draws.between(0, 60), draws.pick((1, 1, 2, 3, 5, 10))
        return draws.pick((", ", " ", "\n")).join(str(first + step * place) for place in range(draws.between(5, 15)))
    items = words.words(draws, draws.between(3, 8), draws.pick(("noun", "noun", "hebrew", "word")))
    bullet = draws.pick(("- {1}", "* {1}", "{0}. {1}", "{0}) {1}"))
    head = draws.pick(("To buy:", "Things to pack:", "List:", "Found today:", "רשימה:", "Items:"))
    return "\n".join([head, *(bullet.format(place + 1, item) for place, item in enumerate(items))])


def task(draws: Draws, words: Words) -> Task:
    """Return a request to sort, count or calculate."""
    kind = draws.below(4)
    if kind == 0:
        items = words.words(draws, draws.between(2, 5), "noun")
        return Task(draws.pick(SORT_ASK).format(" ".join(items)), " ".join(sorted(items)))
    if kind == 1:
        numbers = [draws.between(1, 99) for _ in range(draws.between(2, 6))]
        return Task(draws.pick(NUMBER_ASK).format(" ".join(map(str, numbers))), " ".join(map(str, sorted(numbers))))
    if kind == 2:
        items = words.words(draws, draws.between(1, 8))
        return Task(draws.pick(COUNT_ASK).format(" ".join(items)), str(len(items)))
    a, b = draws.between(0, 20), draws.between(0, 20)
    text, reply = draws.pick(((f"{a} + {b}", a + b), (f"{a + b} - {b}", a), (f"{a} plus {b}", a + b)))
    return Task(draws.pick(SUM_ASK).format(text), str(reply))


def sums(draws: Draws, words: Words) -> str:
    lines = []
    for _ in range(draws.between(3, 8)):
        a, b = draws.between(0, 20), draws.between(0, 20)
        lines.append(draws.pick(SUM_FORMS).format(a=a, b=b, sum=a + b))
    return "\n".join(lines)


def document(draws: Draws, words: Words) -> str:
    kind = draws.unit()
    if kind < 0.55:
        return paragraph(draws, words)
    if kind < 0.7:
        return listing(draws, words)
    if kind < 0.75:
        return sums(draws, words)
    return chat(draws, [task(draws, words) for _ in range(draws.between(1, 5))])
