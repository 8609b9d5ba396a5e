"""The report as one HTML file: no script, nothing loaded from anywhere, for phone and desk, light and dark, screen and paper.

Jinja escapes every value (autoescape); only the charts, which hold numbers and our own labels, are put in as they are. Text of
rows is shown with `dir="auto"`, so that Hebrew and Arabic stand to the right. Next: `report.py` (where the values come from),
`cards.py` (bars and charts, which the comparison of runs shares).
"""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from kivnun.evaluate.cards import Card, Chart, figure_card, forgetting_card, lengths_chart, run_charts
from kivnun.evaluate.facts import Plan, duration
from kivnun.evaluate.metrics import exact_match
from kivnun.evaluate.page_template import PAGE, STYLE
from kivnun.evaluate.report import Report
from kivnun.evaluate.wording import LOSS

# Colours of the memory's parts, in the order that the plan tells them.
PART_COLOURS = 7


@dataclass(frozen=True, slots=True)
class Segment:
    """One part of a stacked bar: its width in per cent of the track, its colour's number and its size in words."""

    name: str
    text: str
    width: float
    colour: int


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan as bars: memory by part over what was held, and the time beside what was taken."""

    memory: str
    parts: list[Segment]
    planned_bytes: str
    actual_bytes: str
    actual_width: float | None
    time: str
    planned_time: str
    actual_time: str
    planned_time_width: float
    actual_time_width: float | None
    steps: str


def render(report: Report) -> str:
    """Return the page. A pure function of the report."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    cards = [figure_card(figure) for figure in report.figures if figure.base is not None or figure.tuned is not None]
    charts: list[Chart] = [] if report.curve is None else run_charts(report.curve, report.held_out)
    forgetting: Card | None = None if report.forgetting is None else forgetting_card(report.forgetting)
    lengths = report.findings.lengths if report.findings is not None else []
    page = environment.from_string(PAGE).render(
        r=report,
        style=Markup(STYLE),
        charts=charts,
        cards=cards,
        forgetting=forgetting,
        lengths=lengths_chart(lengths) if lengths else None,
        plan=None if report.plan is None else _planned(report.plan),
        same=exact_match,
        loss=lambda value: "" if value is None else LOSS(value),
    )
    return page + "\n"


def _planned(plan: Plan) -> Planned:
    """Return the plan's bars; the longest of plan and actual fills its track."""
    most_bytes = max(plan.peak_bytes, plan.actual_peak_bytes or 0, sum(plan.parts.values()), 1)
    most_seconds = max(plan.seconds or 0.0, plan.actual_seconds or 0.0) or 1.0
    parts = [
        Segment(name, _size(size), round(100 * size / most_bytes, 2), number % PART_COLOURS)
        for number, (name, size) in enumerate(plan.parts.items())
        if size > 0
    ]
    return Planned(
        memory=_ratio(plan.actual_peak_bytes, plan.peak_bytes),
        parts=parts,
        planned_bytes=_size(plan.peak_bytes),
        actual_bytes="not known" if plan.actual_peak_bytes is None else _size(plan.actual_peak_bytes),
        actual_width=_width(plan.actual_peak_bytes, most_bytes),
        time=_ratio(plan.actual_seconds, plan.seconds),
        planned_time="not known" if plan.seconds is None else duration(plan.seconds),
        actual_time="not known" if plan.actual_seconds is None else duration(plan.actual_seconds),
        planned_time_width=_width(plan.seconds, most_seconds) or 0.0,
        actual_time_width=_width(plan.actual_seconds, most_seconds),
        steps=f"{plan.actual_steps:,} of {plan.steps:,}" if plan.actual_steps is not None else f"{plan.steps:,} planned",
    )


def _ratio(actual: float | None, planned: float | None) -> str:
    if not actual or not planned:
        return ""
    return f"{actual / planned:.2f} × the plan"


def _width(value: float | None, most: float) -> float | None:
    return None if value is None else round(100 * value / most, 2)


def _size(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB" if count < 10 * 2**30 else f"{count / 2**30:,.1f} GiB"
