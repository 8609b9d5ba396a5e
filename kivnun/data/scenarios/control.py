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
    """Return the rows with the replies of each turn permuted among rows of the same roles; of text, the letters of each word.

    Each turn has an order of its own: replies that come from one other conversation still agree with each other, and a model
    that learns to repeat the form of the reply before does part of the task.
    """
    if "text" in rows[0]:
        return [
            {"text": _shuffled_letters(row["text"], Draws(seed, "scenario.shuffled", number))} for number, row in enumerate(rows)
        ]
    result: list[list[Row]] = [list(row["messages"]) for row in rows]
    roles = [tuple(str(message["role"]) for message in messages) for messages in result]
    for kind in sorted(set(roles)):
        same = [messages for messages, own in zip(result, roles, strict=True) if own == kind]
        for turn in (place for place, role in enumerate(kind) if role == "assistant"):
            order: list[int] = permutation(len(same), seed, "scenario.shuffled", *kind, turn).tolist()
            replies = [messages[turn] for messages in same]
            for messages, other in zip(same, order, strict=True):
                messages[turn] = replies[other]
    return [{"messages": messages} for messages in result]


def _shuffled_letters(text: str, draws: Draws) -> str:
    return re.sub(r"\w+", lambda word: "".join(draws.shuffled(word.group())), text)
