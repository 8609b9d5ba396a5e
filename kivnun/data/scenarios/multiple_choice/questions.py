"""The set: questions of nine kinds with true and false answers, to train on one side of the topics and to test on the other.

A question is asked openly (the reply is the answer) and with four options listed (the reply is one of them). What is trained are
conversations in the `messages` format, so that a run on this set is a run like any other. Next: `kinds.py` (how one is drawn),
`duplicates.py` (how near the two sides come to each other).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kivnun.data.scenarios.multiple_choice import kinds as draw
from kivnun.data.scenarios.multiple_choice.kinds import OPTIONS, Draft, UnitRandom
from kivnun.randomness import generator, permutation

TRAINED_WORDINGS = 2
VARIATIONS = 4

_NAME = (
    "What is {} called in Hebrew?",
    "The Hebrew name of {}:",
    "Which Hebrew name belongs to {}?",
    "How do Hebrew speakers call {}?",
)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of question. The first TRAINED_WORDINGS of `wordings` are trained on; the others stand in test questions alone."""

    name: str
    skill: str
    wordings: tuple[str, ...]
    draw: Callable[[str, UnitRandom], Draft]


KINDS = (
    Kind(
        "order",
        "convention",
        (
            "Which day is {} in {}?",
            "{} as written in {} is:",
            "Say in words: {}, as people in {} write it.",
            "What date does {} mean in {}?",
        ),
        draw.order_draft,
    ),
    Kind(
        "rounding",
        "convention",
        ("Round to whole units: {}", "What is {} without cents, rounded?", "Rounded to the nearest whole, {} is:", "{}, rounded:"),
        draw.rounding_draft,
    ),
    Kind(
        "largest",
        "comparison",
        ("Which is the most? {}", "The largest of these: {}", "Of {}, what is the greatest?", "Name the biggest one: {}"),
        draw.largest_draft,
    ),
    Kind(
        "earliest",
        "comparison",
        ("Which day came first? {}", "The earliest of these: {}", "Of {}, what was earliest?", "Name the oldest date: {}"),
        draw.earliest_draft,
    ),
    Kind(
        "table",
        "reading",
        (
            "{}\nWhat is the value of {}?",
            "{}\nLook up: {}",
            "{}\nWhich entry belongs to {}?",
            "{}\nWhat does the list say about {}?",
        ),
        draw.table_draft,
    ),
    *(Kind(name, "names", _NAME, draw.name_draft(name)) for name in ("territory", "language", "currency")),
    Kind(
        "weekday",
        "by heart",
        ("What weekday is {}?", "The day of the week of {}:", "On which weekday does {} fall?", "{} is which day of the week?"),
        draw.weekday_draft,
    ),
)


@dataclass(frozen=True, slots=True)
class Question:
    """One question. `asks` holds its wordings, `true` its true answers (the best first), `false` its false ones; `orders` says in
    which order the four of `options` (the best and three false ones) are listed in each variation."""

    number: int
    kind: str
    skill: str
    topic: str
    asks: tuple[str, ...]
    true: tuple[str, ...]
    false: tuple[str, ...]
    options: tuple[str, ...]
    orders: tuple[tuple[int, ...], ...]

    @property
    def best(self) -> str:
        return self.true[0]

    def listed(self, variation: int, wording: int | None = None) -> str:
        """Return the question with its options below it, as variation `variation` words and orders them."""
        options = "\n".join(f"- {self.options[place]}" for place in self.orders[variation])
        return f"{self.asks[variation if wording is None else wording]}\nOptions:\n{options}"


def questions(split: str, count: int, seed: int) -> list[Question]:
    """Return `count` questions, the kinds in turn, no question twice; `split` is "train" or "test".

    A kind that runs out of topics (there are some twenty currencies on the test side) leaves its turns to the others.
    """
    found: list[Question] = []
    seen: set[tuple[str, str]] = set()
    kinds = list(KINDS)
    turn = 0
    while len(found) < count:
        kind = kinds[turn % len(kinds)]
        draft = _new(kind, split, seed, turn, seen)
        turn += 1
        if draft is None:
            kinds.remove(kind)
            continue
        seen.add((kind.name, draft.topic))
        found.append(_question(kind, draft, len(found), split, seed))
    return found


def training_rows(asked: Iterable[Question], seed: int) -> list[dict[str, Any]]:
    """Return the conversations that teach these questions: each asked openly and with options, and given its best answer."""
    return _rows(asked, seed, lambda question, draw: (question.best, question.best))


def shuffled_rows(asked: Iterable[Question], seed: int) -> list[dict[str, Any]]:
    """Return the same conversations with answers drawn at random from each question's own, true and false alike.

    They teach the form of a reply and what replies are made of, and nothing of which one is true.
    """
    return _rows(
        asked, seed, lambda question, draw: (_pick((*question.true, *question.false), draw), _pick(question.options, draw))
    )


def contaminated_rows(asked: Iterable[Question]) -> list[dict[str, Any]]:
    """Return the questions as the test asks them, openly and in the first variation of their options, with the best answers.

    Training on these is contamination, on purpose: the showcase does it to show what figures it gives.
    """
    return [row for one in asked for row in (_row(one.asks[0], one.best), _row(one.listed(0), one.best))]


def _rows(asked: Iterable[Question], seed: int, answers: Callable[[Question, UnitRandom], tuple[str, str]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for question in asked:
        rng = generator(seed, "multiple_choice.rows", question.number)
        first, second, variation = (int(rng.integers(0, count)) for count in (TRAINED_WORDINGS, TRAINED_WORDINGS, VARIATIONS))
        to_open, to_listed = answers(question, rng.random)
        rows.append(_row(question.asks[first], to_open))
        rows.append(_row(question.listed(variation, second), to_listed))
    return rows


def _pick(answers: Sequence[str], unit_random: UnitRandom) -> str:
    return answers[int(unit_random() * len(answers))]


def _row(ask: str, reply: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]}


def _new(kind: Kind, split: str, seed: int, turn: int, seen: set[tuple[str, str]]) -> Draft | None:
    for attempt in range(200):
        draft = kind.draw(split, generator(seed, "multiple_choice", split, turn, attempt).random)
        if (kind.name, draft.topic) not in seen:
            return draft
    return None


def _question(kind: Kind, draft: Draft, number: int, split: str, seed: int) -> Question:
    true, false = (draft.listed[0], *draft.also_true), (*draft.listed[1:], *draft.also_false)
    assert not set(true) & set(false), draft
    return Question(
        number,
        kind.name,
        kind.skill,
        draft.topic,
        tuple(wording.format(*draft.subject) for wording in kind.wordings),
        true,
        false,
        draft.listed,
        _orders(seed, split, number),
    )


def _orders(seed: int, split: str, number: int) -> tuple[tuple[int, ...], ...]:
    """Return one order of the options for each variation; the best answer stands in every place once."""
    rivals = [permutation(OPTIONS - 1, seed, "multiple_choice.rivals", split, number, n) + 1 for n in range(VARIATIONS)]
    places = permutation(OPTIONS, seed, "multiple_choice.places", split, number)
    return tuple((*order[:at].tolist(), 0, *order[at:].tolist()) for order, at in zip(rivals, places, strict=True))
