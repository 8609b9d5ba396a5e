"""What `kivnun data check` found, as one HTML file: no script, nothing loaded from anywhere, for phone and desk, light and dark.

Jinja escapes every value. Text of rows is shown with `dir="auto"`, so that Hebrew and Arabic stand to the right. The page is the
user's own: beside counts and places it shows the first rows and, where there are labels, the labels.
Next: `data_template.py`, `data/checks.py` (where the values come from).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from kivnun.data.checks import Check, FileReport
from kivnun.data.problems import KEPT
from kivnun.data.repeats import SHOWN, Pair
from kivnun.data.rows import ChatRecord, PreferenceRecord, PromptRecord, Record, TextRecord
from kivnun.data.signatures import NEAR
from kivnun.evaluate.data_template import PAGE, STYLE
from kivnun.evaluate.page_template import STYLE as REPORT_STYLE

MAX_TEXT = 2_000  # characters of a row's part that are shown
KINDS = {
    "duplicates": ("Exact duplicates", "Rows that equal an earlier row: they count twice in training."),
    "near_duplicates": ("Near duplicates", f"Rows that share at least {NEAR:.0%} of their runs of characters with an earlier one."),
    "overlap": ("Held-out rows also trained on", "The held-out score is too good by these: remove them from one side."),
    "near_overlap": ("Held-out rows nearly trained on", f"They share at least {NEAR:.0%} of their runs with a training row."),
}


@dataclass(frozen=True, slots=True)
class Tile:
    """One number at the top. `css` marks what should be looked at."""

    name: str
    value: str
    css: str = ""


@dataclass(frozen=True, slots=True)
class Bar:
    """A step of a histogram: widths in percent of the longest bar."""

    name: str
    train: float
    held: float
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    heading: str
    text: str
    bars: list[Bar]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of rows that repeat, with the first pairs."""

    heading: str
    text: str
    pairs: Sequence[Pair]


@dataclass(frozen=True, slots=True)
class Sample:
    """A row as it is: (role, text) of its parts."""

    where: str
    parts: list[tuple[str, str]]


def render(check: Check) -> str:
    """Return the page. A pure function of the check."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    bad, counted = check.bad_rows, _rows(check.train.rows)
    held = f", {check.held_out.rows:,} held out" if check.held_out else ""
    headline = f"{bad:,} of {_rows(check.all_rows)} cannot be used" if bad else f"{counted} to train on{held}"
    kept = len(check.problems)
    return (
        environment.from_string(PAGE).render(
            c=check,
            style=Markup(REPORT_STYLE + STYLE),  # ours
            headline=headline,
            detail=_detail(check),
            tiles=list(_tiles(check)),
            reasons=_reasons(check),
            left_out=f"The first {KEPT:,} of each side are listed; all are counted above." if kept >= KEPT else "",
            charts=list(_charts(check)),
            facts=_facts(check.train, check.held_out),
            repeats=list(_repeats(check)),
            samples=[Sample(str(record.where), _parts(record)) for record in check.samples],
        )
        + "\n"
    )


def _detail(check: Check) -> str:
    found = check.found
    if check.bad_rows:
        return "A run refuses the file until the rows are mended, or left out knowingly with data.bad_rows: skip."
    if found.overlap:
        return f"{_rows(found.overlap)} held out are also trained on: the held-out score would be too good."
    said = [f"{count:,} {words}" for count, words in ((found.duplicates, "exact"), (found.near_duplicates, "near")) if count]
    return f"Every row can be used. Duplicates: {' and '.join(said) or 'none'}."


def _tiles(check: Check) -> Iterator[Tile]:
    train, held, found = check.train, check.held_out, check.found
    yield Tile("format", train.format)
    yield Tile("training rows", f"{train.rows:,}")
    if held:
        yield Tile("held-out rows", f"{held.rows:,}")
    yield Tile("rows with problems", f"{check.bad_rows:,}", "wrong" if check.bad_rows else "")
    yield Tile("exact duplicates", f"{found.duplicates:,}", "look" if found.duplicates else "")
    yield Tile("near duplicates", f"{found.near_duplicates:,}", "look" if found.near_duplicates else "")
    if held:
        yield Tile("held out and trained", f"{found.overlap:,}", "wrong" if found.overlap else "")
        yield Tile("held out, nearly trained", f"{found.near_overlap:,}", "look" if found.near_overlap else "")
    yield Tile("longest row", f"{check.longest:,} {check.unit}")
    if check.unit == "tokens":
        yield Tile("tokens in all", f"{check.total:,}")
    if check.over_long:
        yield Tile("longer than the base takes", f"{check.over_long:,}", "wrong")


def _reasons(check: Check) -> list[tuple[str, int]]:
    reasons = dict(check.train.reasons)
    for reason, count in check.held_out.reasons.items() if check.held_out else ():
        reasons[reason] = reasons.get(reason, 0) + count
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))


def _charts(check: Check) -> Iterator[Chart]:
    if check.lengths:
        steps = [(f"to {most:,}", train, held) for most, train, held in check.lengths]
        text = f"Rows by their length in {check.unit}; the steps grow with the length."
        yield Chart("Lengths", text, _bars(steps, bool(check.held_out)))
    if check.labels:
        steps = [(label or "(nothing)", train, held) for label, (train, held) in check.labels.items()]
        yield Chart("Labels", "The replies, which are few and come again and again.", _bars(steps, bool(check.held_out)))


def _bars(steps: Sequence[tuple[str, int, int]], both: bool) -> list[Bar]:
    """Return bars of each side, scaled to that side's longest: a held-out file is often ten times smaller."""
    top, top_held = max(train for _, train, _ in steps), max(held for _, _, held in steps)
    return [
        Bar(name, _width(train, top), _width(held, top_held), f"{train:,} + {held:,}" if both else f"{train:,}")
        for name, train, held in steps
    ]


def _width(count: int, top: int) -> float:
    return max(round(100 * count / top, 1), 0.6) if count else 0.0


def _facts(train: FileReport, held_out: FileReport | None) -> list[tuple[str, list[str]]]:
    """Return (name, the training files' count and the held-out file's), those left out that are nothing on both sides."""
    sides = [train, *([held_out] if held_out else [])]
    roles = dict.fromkeys(role for side in sides for role in side.roles)
    counts = [("characters", [side.characters for side in sides])]
    counts += [(f"messages of {role}", [side.roles.get(role, 0) for side in sides]) for role in roles]
    counts += [
        ("replies trained", [side.trained_replies for side in sides]),
        ("replies that are context only", [side.context_replies for side in sides]),
        ("empty replies: their end marker alone is trained", [side.empty_replies for side in sides]),
    ]
    return [(name, [f"{count:,}" for count in values]) for name, values in counts if any(values)]


def _repeats(check: Check) -> Iterator[Kind]:
    counts = {name: getattr(check.found, name) for name in KINDS}
    for name, (heading, text) in KINDS.items():
        pairs = check.found.pairs[name]
        if pairs:
            more = f" The first {SHOWN} are shown." if counts[name] > len(pairs) else ""
            yield Kind(f"{heading}: {counts[name]:,}", text + more, pairs)


def _parts(record: Record) -> list[tuple[str, str]]:
    match record:
        case ChatRecord():
            parts = [(message["role"], _said(message)) for message in record.messages]
        case PromptRecord():
            parts = [("prompt", record.prompt), ("completion", record.completion)]
        case TextRecord():
            parts = [("text", record.text)]
        case PreferenceRecord():
            prompt = [("prompt", record.prompt)] if isinstance(record.prompt, str) else _parts(record.prompt)
            parts = [*prompt, ("chosen", record.chosen), ("rejected", record.rejected)]
    return [(role, _shortened(text)) for role, text in parts]


def _said(message: dict[str, Any]) -> str:
    calls = json.dumps(message["tool_calls"], ensure_ascii=False) if "tool_calls" in message else ""
    return "\n".join(part for part in (message.get("content") or "", calls) if part)


def _shortened(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:MAX_TEXT]}… ({len(text) - MAX_TEXT:,} more characters)"


def _rows(count: int) -> str:
    return f"{count:,} {'row' if count == 1 else 'rows'}"
