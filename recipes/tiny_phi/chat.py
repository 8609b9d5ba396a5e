"""Tasks become documents: one task, several turns, or a few worked examples in the chat markers of Phi-4-mini.

A document's text holds the markers; the tokenizer reads them as special tokens. Next: `copying.py`, the first tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kivnun.data.scenarios.draws import Draws
from recipes.tiny_phi.stocks import stock

SYSTEM_LINES = stock("chat.system_lines")


class Task(NamedTuple):
    """One request and its reply."""

    user: str
    reply: str


Turn = tuple[str, str]
Maker = Callable[[Draws], Task]


def render_chat(turns: list[Turn]) -> str:
    """Return the document of (role, content) turns, as the chat template writes it."""
    return "".join(f"<|{role}|>{content}<|end|>" for role, content in turns)


def chat(draws: Draws, tasks: list[Task], system: str | None = None) -> str:
    """Return a conversation of these tasks in their order, with a system line now and then."""
    turns: list[Turn] = []
    if system is None and draws.chance(0.15):
        system = draws.pick(SYSTEM_LINES)
    if system:
        turns.append(("system", system))
    for task in tasks:
        turns += [("user", task.user), ("assistant", task.reply)]
    return render_chat(turns)


def conversation(draws: Draws, make: Maker, longest: int = 700) -> str:
    """Return one to four tasks from one maker in a conversation of about `longest` characters at most."""
    tasks = [make(draws)]
    wished = draws.pick((1, 1, 1, 2, 3, 4))
    while len(tasks) < wished:
        task = make(draws)
        if sum(len(t.user) + len(t.reply) for t in [*tasks, task]) > longest:
            break
        tasks.append(task)
    return chat(draws, tasks)
