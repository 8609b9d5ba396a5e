"""Rules for the shape of a reply, stated in a prompt and checked by a program: how it begins, ends, and how its lines look.

One set of sentences for both sides: a scenario writes its system line with them, the metric reads them out of the prompt again.
The idea of instructions that a program can verify: Zhou et al. 2023, "Instruction-Following Evaluation for Large Language Models".
Next: `scenarios/chat/recipe.py`, `evaluate/metrics.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

FIRST = 'First line "{}".'
LAST = 'Last line "{}".'
EACH = 'Every line between begins with "{}".'
MOST = "At most {} lines."


def _first(lines: list[str], value: str) -> bool:
    return lines[0] == value


def _last(lines: list[str], value: str) -> bool:
    return lines[-1] == value


def _each(lines: list[str], value: str) -> bool:
    return len(lines) > 2 and all(line.startswith(value) and line != value for line in lines[1:-1])


def _most(lines: list[str], value: str) -> bool:
    return len(lines) <= int(value)


_CHECKS: tuple[tuple[re.Pattern[str], Callable[[list[str], str], bool]], ...] = tuple(
    (re.compile(re.escape(rule).replace(r"\{\}", pattern), re.ASCII), check)
    for rule, pattern, check in (
        (FIRST, r"([^\"\n]+)", _first),
        (LAST, r"([^\"\n]+)", _last),
        (EACH, r"([^\"\n]+)", _each),
        (MOST, r"(\d{1,6})", _most),
    )
)


def states_rules(prompt: str) -> bool:
    """Return whether the prompt states a rule that can be checked."""
    return any(pattern.search(prompt) for pattern, _ in _CHECKS)


def keeps_rules(prompt: str, reply: str) -> bool:
    """Return whether the reply keeps every rule that the prompt states; of a rule stated twice the last counts."""
    lines = reply.strip().split("\n")
    for pattern, check in _CHECKS:
        stated = pattern.findall(prompt)
        if stated and not check(lines, stated[-1]):
            return False
    return True
