"""Measures in words: how each is called, how its values are written, and a sentence on what a paired difference says.

The report of a run, the comparison of several, and the command line say it alike. Next: `report.py`, `compare.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from kivnun.evaluate.metrics import higher_is_better

Ends = tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Shown:
    """How a metric is told to people. `top` is where its bar ends; None: at the largest value there is.

    `text` writes a value, `change` a difference with its unit left off, which is `unit`.
    """

    label: str
    meaning: str
    text: Callable[[float], str]
    change: Callable[[float], str]
    unit: str
    top: float | None


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %".replace("-", "−")


def _points(value: float) -> str:
    return f"{100 * value:.1f}".replace("-", "−")


def _decimals(places: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{places}f}".replace("-", "−")


LOSS, SHARE = _decimals(3), (_percent, _points, " points", 1.0)
SHOWN = {
    "nll": Shown("Held-out loss", "nats per trained token; lower is better", LOSS, LOSS, "", None),
    "preference_accuracy": Shown("Preference accuracy", "pairs whose chosen reply is likelier; higher is better", *SHARE),
    "exact_match": Shown("Exact match", "replies that equal the reference; higher is better", *SHARE),
    "chrf": Shown(
        "chrF", "overlap of characters with the reference, 0 to 100; higher is better", _decimals(1), _decimals(1), "", 100.0
    ),
    "macro_f1": Shown("Macro F1", "the mean of the classes' F1; higher is better", *SHARE),
    "entity_f1": Shown("Entity F1", "entities with the right characters and the right label; higher is better", *SHARE),
    "qa_f1": Shown("Answer F1", "words that the answer shares with the reference; higher is better", *SHARE),
    "format_compliance": Shown("Format kept", "replies that keep every rule of their prompt; higher is better", *SHARE),
    "ended_turn": Shown("Turn ended", "replies that end by themselves; higher is better", *SHARE),
    "tune_validity": Shown("Valid tunes", "replies that are a tune as asked for; higher is better", *SHARE),
    "perplexity": Shown("Perplexity", "e to the held-out loss; lower is better", _decimals(2), _decimals(2), "", None),
}
MARKS = {
    "better": "▲",
    "worse": "▼",
    "no detectable difference": "=",
    "too few rows": "?",
    "forgot": "▼",
    "better there too": "▲",
    "no detectable forgetting": "=",
}
CSS = {"better": "good", "better there too": "good", "worse": "bad", "forgot": "bad"}


def shown(name: str) -> Shown:
    """Return how a measure is told; one that nobody described is told by its name."""
    return SHOWN.get(name, Shown(name, "", LOSS, LOSS, "", None))


def between(ends: Ends, text: Callable[[float], str]) -> str:
    """Return an interval in brackets, "" where there is none."""
    return "" if ends is None else f" [{text(ends[0])} to {text(ends[1])}]"


def in_words(name: str, before: float, after: float, ends: Ends, what: str = "base") -> str:
    """Return one sentence on the change from `before` (of `what`) to `after` and how sure it is; `ends` is the interval of the
    paired difference."""
    told, change = shown(name), after - before
    size = told.change(abs(change))
    moved = "as before" if change == 0 else f"{'up' if change > 0 else 'down'} by {size}{told.unit}"
    if what != "base":
        moved = f"the same as {what}" if change == 0 else f"{size}{told.unit} {'above' if change > 0 else 'below'} {what}"
    if ends is None:
        return f"{moved}; fewer than ten rows cannot say how sure that is."
    interval = f"{told.change(ends[0])} to {told.change(ends[1])}"
    if change == 0:
        return f"{moved}; the 95 % interval of the difference, {interval}, holds zero."
    if ends[0] <= 0.0 <= ends[1]:
        return f"{moved}, which these rows cannot tell from no change: the 95 % interval of the difference, {interval}, holds zero."
    side = "above" if ends[0] > 0 else "below"
    good = (ends[0] > 0) == higher_is_better(name)
    return f"{moved}; the 95 % interval of the difference, {interval}, is {side} zero, the {'good' if good else 'bad'} side."


def forgetting_in_words(before: float, after: float, ends: Ends) -> str:
    """Return one sentence on unrelated text: its loss before and after, and what that is worth."""
    change = after - before
    moved = f"{LOSS(before)} to {LOSS(after)} nats per token, {'+' if change > 0 else ''}{LOSS(change)}{between(ends, LOSS)}"
    factor = math.exp(min(abs(change), 700.0)) - 1
    size = f"perplexity {'up' if change > 0 else 'down'} {100 * (factor if change > 0 else factor / (1 + factor)):.1f} %"
    if ends is None:
        return f"Fewer than ten rows cannot say whether anything was forgotten: {moved}."
    if ends[0] <= 0.0 <= ends[1]:
        return f"Text that has nothing to do with the task is as likely as before, as far as these rows tell: {moved}."
    if ends[0] > 0:
        return f"Text that has nothing to do with the task became less likely: {moved}, {size}."
    return f"Text that has nothing to do with the task became likelier too: {moved}, {size}."
