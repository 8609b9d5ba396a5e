"""Entities as character spans of a text, and as the lines in which a model writes them; each from the other.

A line is `label: text`, one entity a line in the order of the text; a text without entities is answered `none`. Reading a line
back takes the next place where its text stands as a whole word, from the end of the entity before. Where that would be another
place than the span's, the line says which occurrence it is: `person: May #2`. So spans are written and read back without loss,
repeated, nested and adjacent ones too. Next: `scenarios/entities/recipe.py`, which trains on them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from kivnun.errors import DataError

NONE = "none"
MARKER = "Text: "
"""Stands before the text in a prompt."""
_OCCURRENCE = re.compile(r" #([1-9][0-9]*)$")


class Span(NamedTuple):
    """Characters [start, end) of a text, with their label."""

    start: int
    end: int
    label: str


@dataclass(frozen=True, slots=True)
class Found:
    """What an answer names: spans of the text in the answer's order, and the number of lines that name none."""

    spans: tuple[Span, ...]
    lost: int


def as_answer(text: str, spans: list[Span]) -> str:
    """Return the spans as lines, sorted by their place. Raises DataError for a span that cannot be written on a line."""
    lines: list[str] = []
    cursor = 0
    for span in sorted(spans):
        _check(text, span)
        surface = text[span.start : span.end]
        plain = _OCCURRENCE.search(surface) is None and _next(text, surface, cursor) == span.start
        lines.append(f"{span.label}: {surface}" + ("" if plain else f" #{_starts(text, surface).index(span.start) + 1}"))
        cursor = span.end
    return "\n".join(lines) or NONE


def from_answer(text: str, answer: str) -> Found:
    """Return the spans that an answer names in a text. A line that is no entity, or whose text does not stand there, is lost."""
    spans: list[Span] = []
    lost = cursor = 0
    lines = [line.strip() for line in answer.strip().split("\n")]
    for line in [] if lines in ([NONE], [""]) else lines:
        label, colon, surface = line.partition(": ")
        surface, number = _numbered(surface)
        start = _place(text, surface, number, cursor) if colon and label and surface else None
        if start is None:
            lost += 1
            continue
        spans.append(Span(start, start + len(surface), label))
        cursor = spans[-1].end
    return Found(tuple(spans), lost)


def checked_spans(text: str, entities: Any) -> list[Span]:
    """Return the spans of a record's `entities`, a list of {start, end, label}. Raises DataError."""
    spans: list[Span] = []
    for entity in cast(list[Any], entities) if isinstance(entities, list) else [None]:
        fields = cast(dict[str, Any], entity) if isinstance(entity, dict) else {}
        start, end, label = (fields.get(key) for key in ("start", "end", "label"))
        if type(start) is not int or type(end) is not int or not isinstance(label, str):
            raise DataError("entities must be a list of objects with start, end (whole numbers) and label (text)")
        span = Span(start, end, label)
        _check(text, span)
        spans.append(span)
    return spans


def text_of_prompt(prompt: str) -> str:
    """Return the text that a prompt asks about: what follows the first marker, or all of a prompt without one."""
    return prompt.partition(MARKER)[2] if MARKER in prompt else prompt


def _check(text: str, span: Span) -> None:
    if not 0 <= span.start < span.end <= len(text):
        raise DataError(f"an entity has the span {span.start} to {span.end}, the text has {len(text)} characters")
    surface = text[span.start : span.end]
    if "\n" in surface or surface != surface.strip():
        raise DataError(
            f"the entity at {span.start} has a line break in it, or a space at an end: it cannot be written on one line"
        )
    if not span.label or ": " in span.label or "\n" in span.label or span.label != span.label.strip() or span.label[-1] == ":":
        raise DataError(
            "a label must be text without line break, without outer space and without a colon before a space or at its end"
        )


def _numbered(surface: str) -> tuple[str, int | None]:
    """Return the text of a line without its occurrence, and the occurrence."""
    named = _OCCURRENCE.search(surface)
    if named is None:
        return surface, None
    digits = named.group(1)
    return surface[: named.start()], int(digits) if len(digits) < 10 else 10**10  # no text has so many


def _place(text: str, surface: str, number: int | None, cursor: int) -> int | None:
    """Return where the text of one line begins: the occurrence that it names, else the next one, else the first."""
    if number is None:
        return _next(text, surface, cursor)
    starts = _starts(text, surface)
    return starts[number - 1] if number <= len(starts) else None


def _next(text: str, surface: str, cursor: int) -> int | None:
    starts = _starts(text, surface)
    whole = [start for start in starts if _is_whole(text, start, start + len(surface))] or starts
    return next((start for start in whole if start >= cursor), whole[0] if whole else None)


def _starts(text: str, surface: str) -> list[int]:
    """Return every place where `surface` stands, overlapping ones too."""
    found: list[int] = []
    start = text.find(surface)
    while start >= 0:
        found.append(start)
        start = text.find(surface, start + 1)
    return found


def _is_whole(text: str, start: int, end: int) -> bool:
    before = start > 0 and text[start - 1].isalnum() and text[start].isalnum()
    after = end < len(text) and text[end].isalnum() and text[end - 1].isalnum()
    return not before and not after
