"""Training rows that teach nothing of the task: the control that a scenario's gain is measured against.

The same replies, prompts, lengths and number of steps; what is gone is which reply belongs to which prompt. Running text has no
replies: there the letters of each word change places, which keeps letters, lengths and layout. To let the words change
places is not enough: the words of a domain are a part of what there is to learn, and the loss on real text still fell.
"""

from __future__ import annotations

import re

from kivnun.data.scenarios.draws import Draws
from kivnun.data.scenarios.scenario import Row
from kivnun.randomness import permutation


def shuffled(rows: list[Row], seed: int) -> list[Row]:
    """Return the rows with the trained replies permuted among rows of as many turns; of text, the letters of each word."""
    if "text" in rows[0]:
        return [
            {"text": _shuffled_letters(row["text"], Draws(seed, "scenario.shuffled", number))} for number, row in enumerate(rows)
        ]
    given: list[list[Row]] = [row["messages"] for row in rows]
    result = list(given)
    for length in sorted({len(messages) for messages in given}):
        places = [place for place, messages in enumerate(given) if len(messages) == length]
        order: list[int] = permutation(len(places), seed, "scenario.shuffled", length).tolist()
        for number, place in enumerate(places):
            result[place] = _with_replies(given[place], given[places[order[number]]])
    return [{"messages": messages} for messages in result]


def _with_replies(messages: list[Row], other: list[Row]) -> list[Row]:
    """Return the messages with the other conversation's replies in their places."""
    return [theirs if own["role"] == "assistant" else own for own, theirs in zip(messages, other, strict=True)]


def _shuffled_letters(text: str, draws: Draws) -> str:
    return re.sub(r"\w+", lambda word: "".join(draws.shuffled(word.group())), text)
