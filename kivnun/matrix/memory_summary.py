"""What is read off a memory surface: a law per technique, where one begins to take more than full tuning, the table's cells.

A technique is always held against full tuning of the same model at the same point, in the precision it computes in. Of repeats the
median counts. Next: `charts.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import linear_regression, median

from kivnun.matrix.memory import PARTS, REFERENCE, Form, Measured, Surface
from kivnun.plan.techniques import COLUMNS, TECHNIQUES


@dataclass(frozen=True, slots=True)
class Law:
    """peak = fixed + per_token * tokens of the pass, in bytes; `error` is the largest relative distance to what was measured."""

    fixed: float
    per_token: float
    error: float

    def at(self, tokens: float) -> float:
        return self.fixed + self.per_token * tokens


@dataclass(frozen=True, slots=True)
class Crossing:
    """Where the sign of (technique - full) changes between two neighbouring points of the grid; full tuning is in `full_form`.

    `along` is "rows" or "tokens", the other stays `fixed`; `at` is the place between `low` and `high` by a straight line.
    `more_above`: beyond it the technique takes more than full tuning.
    """

    technique: str
    form: Form
    full_form: Form
    along: str
    fixed: int
    low: int
    high: int
    at: float
    more_above: bool

    @property
    def pass_tokens(self) -> float:
        return self.at * self.fixed


@dataclass(frozen=True, slots=True)
class Outlook:
    """A technique against full tuning over a whole grid, and the tokens a pass at which their laws meet (None: never)."""

    technique: str
    form: Form
    full_form: Form
    least: tuple[float, tuple[int, int]]  # the ratio of peaks, and at how many rows and tokens
    most: tuple[float, tuple[int, int]]
    law: Law | None
    full_law: Law | None
    meets_at: float | None


@dataclass(frozen=True, slots=True)
class TechniqueFigures:
    """A technique at the reference point: the median of its repeats over full tuning's, with the least and the most that any two
    repeats come to; and its ratios over the grid."""

    technique: str
    peak: float
    parts: dict[str, int]  # of the repeat in the middle: they add up to its peak
    full_peak: float
    full_parts: dict[str, int]
    ratio: float
    interval: tuple[float, float]
    repeats: int
    over_grid: tuple[float, float]
    wall_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class MemoryCell:
    """One column of row 7. `ratio` is the median technique's; `span` the least and the most of all its techniques."""

    column: str
    form: Form
    rows: int
    tokens: int
    ratio: float
    span: tuple[float, float]
    figures: dict[str, TechniqueFigures]

    @property
    def text(self) -> str:
        """Return the cell in words."""
        where = f"{self.rows} x {self.tokens} tokens"
        if len(self.figures) > 1:
            low, high = (min(self.figures.values(), key=lambda f: f.ratio), max(self.figures.values(), key=lambda f: f.ratio))
            names = f"{TECHNIQUES[low.technique].label} {low.ratio:.2f} to {TECHNIQUES[high.technique].label} {high.ratio:.2f}"
            return f"{names} of full tuning's peak bytes at {where}"
        (only,) = self.figures.values()
        mega = f"{only.peak / 1e6:,.0f} of {only.full_peak / 1e6:,.0f} MB"
        spread = f"{only.interval[0]:.2f} to {only.interval[1]:.2f} in {only.repeats} repeats"
        return f"{self.ratio:.2f} of full tuning's peak bytes ({mega}) at {where}; {spread}"


def pairs(surface: Surface) -> list[tuple[Form, Form]]:
    """Return the forms that techniques are compared in, each with full tuning's: its own, or without packed weights (full tuning
    has none); and techniques as they are with full tuning that computes its layers again."""
    full = {point.form for point in surface.points if point.technique == "full"}
    own = dict.fromkeys(point.form for point in surface.points if point.technique != "full")
    same = [(form, replace(form, packed=False)) for form in own]
    again = [(form, replace(form, recompute=True)) for form in own if not form.recompute and not form.packed]
    return [(form, baseline) for form, baseline in (*same, *again) if baseline in full]


def main_form(surface: Surface) -> Form:
    """Return the form of the reference that most techniques were measured in."""
    here = [point for point in surface.points if (point.rows, point.tokens) == REFERENCE]
    counts = {form: len({p.technique for p in here if p.form == form}) for form in dict.fromkeys(p.form for p in here)}
    return max(counts, key=lambda form: counts[form])


def peaks(surface: Surface, technique: str, form: Form) -> dict[tuple[int, int], float]:
    """Return a technique's peak bytes by (rows, tokens), the median of repeats."""
    found = surface.of(technique, form)
    places = dict.fromkeys((p.rows, p.tokens) for p in found)
    return {at: median(m.peak for p, m in found.items() if (p.rows, p.tokens) == at) for at in places}


def law_of(surface: Surface, technique: str, form: Form) -> Law | None:
    """Return the straight line through a technique's peaks over the tokens of a pass; None for fewer than two numbers of them."""
    known = [(rows * tokens, peak) for (rows, tokens), peak in peaks(surface, technique, form).items()]
    xs, ys = [x for x, _ in known], [y for _, y in known]
    if len(set(xs)) < 2:
        return None
    slope, fixed = linear_regression(xs, ys)
    return Law(fixed, slope, max(abs(fixed + slope * x - y) / y for x, y in known))


def ratios(surface: Surface, technique: str, form: Form, full_form: Form) -> dict[tuple[int, int], float]:
    """Return a technique's peak over full tuning's by (rows, tokens), where both were measured."""
    full = peaks(surface, "full", full_form)
    return {at: peak / full[at] for at, peak in peaks(surface, technique, form).items() if at in full}


def crossings(surface: Surface) -> list[Crossing]:
    """Return every change of sign of (technique - full) between neighbours of the grid, along rows and along tokens."""
    return [
        crossing
        for form, full_form in pairs(surface)
        for technique in TECHNIQUES
        if technique != "full"
        for along in ("tokens", "rows")
        for crossing in _crossings_along(surface, technique, form, full_form, along)
    ]


def _crossings_along(surface: Surface, technique: str, form: Form, full_form: Form, along: str) -> Iterator[Crossing]:
    full, own = peaks(surface, "full", full_form), peaks(surface, technique, form)
    above = {at: own[at] - full[at] for at in own if at in full}
    place: Callable[[tuple[int, int]], tuple[int, int]] = (lambda at: at) if along == "tokens" else (lambda at: (at[1], at[0]))
    lines: dict[int, list[tuple[int, float]]] = {}
    for at, difference in above.items():
        fixed, moving = place(at)
        lines.setdefault(fixed, []).append((moving, difference))
    for fixed, line in sorted(lines.items()):
        for (low, before), (high, after) in pairwise(sorted(line)):
            if (before > 0) != (after > 0):
                at = low + (high - low) * before / (before - after)
                yield Crossing(technique, form, full_form, along, fixed, low, high, at, after > 0)


def outlooks(surface: Surface) -> list[Outlook]:
    """Return each technique against full tuning, form by form: the least and the greatest ratio, and where the laws meet."""
    return [
        outlook
        for form, full_form in pairs(surface)
        for technique in TECHNIQUES
        if technique != "full" and (outlook := _outlook(surface, technique, form, full_form)) is not None
    ]


def _outlook(surface: Surface, technique: str, form: Form, full_form: Form) -> Outlook | None:
    found = ratios(surface, technique, form, full_form)
    if not found:
        return None
    low, high = min(found, key=lambda at: found[at]), max(found, key=lambda at: found[at])
    own, full = law_of(surface, technique, form), law_of(surface, "full", full_form)
    meets = None if own is None or full is None else _meeting(own, full)
    return Outlook(technique, form, full_form, (found[low], low), (found[high], high), own, full, meets)


def _meeting(own: Law, full: Law) -> float | None:
    """Return the tokens from which on the technique takes more than full tuning: 0 for always, None for never."""
    if own.per_token <= full.per_token:
        return None
    return max(0.0, (full.fixed - own.fixed) / (own.per_token - full.per_token))


def memory_cells(surface: Surface, form: Form | None = None) -> dict[str, MemoryCell]:
    """Return row 7's cells by column, for the techniques that adapt weights; sharding is measured over processes."""
    form = main_form(surface) if form is None else form
    cells: dict[str, MemoryCell] = {}
    for column, techniques in COLUMNS.items():
        figures = {name: its for name in techniques if (its := figures_of(surface, name, form)) is not None}
        if figures:
            span = (min(f.interval[0] for f in figures.values()), max(f.interval[1] for f in figures.values()))
            cells[column] = MemoryCell(column, form, *REFERENCE, median(f.ratio for f in figures.values()), span, figures)
    return cells


def figures_of(surface: Surface, technique: str, form: Form) -> TechniqueFigures | None:
    """Return a technique's figures at the reference point; None where it was not measured there."""
    own, full = _repeats(surface, technique, form), _repeats(surface, "full", replace(form, packed=False))
    if not own or not full:
        return None
    found = ratios(surface, technique, form, replace(form, packed=False))
    mine, theirs = [m.peak for m in own], [m.peak for m in full]
    interval = (min(mine) / max(theirs), max(mine) / min(theirs))
    middle, full_middle = _middle(own), _middle(full)
    return TechniqueFigures(
        technique, middle.peak, middle.parts, full_middle.peak, full_middle.parts, found[REFERENCE], interval, len(own),
        (min(found.values()), max(found.values())), median(m.wall_s for m in own), median(m.cpu_s for m in own),
    )  # fmt: skip


def _repeats(surface: Surface, technique: str, form: Form) -> list[Measured]:
    return [m for p, m in surface.of(technique, form).items() if (p.rows, p.tokens) == REFERENCE]


def _middle(repeats: Sequence[Measured]) -> Measured:
    """Return the repeat of median peak, the lower one of two."""
    ordered = sorted(repeats, key=lambda m: m.peak)
    middle = ordered[(len(ordered) - 1) // 2]
    assert sum(middle.parts[part] for part in PARTS) == middle.peak
    return middle
