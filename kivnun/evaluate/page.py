"""The report as one HTML file: no script, nothing loaded from anywhere, for phone and desk, light and dark, screen and paper.

Jinja escapes every value (autoescape); only the charts, which hold numbers and our own labels, are put in as they are. Text of
rows is shown with `dir="auto"`, so that Hebrew and Arabic stand to the right. Next: `report.py` (where the values come from).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from kivnun.evaluate.charts import Line, line_chart
from kivnun.evaluate.metrics import exact_match
from kivnun.evaluate.page_template import PAGE, STYLE
from kivnun.evaluate.report import Curve, Ends, Figure, Report


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
MARKS = {"better": "▲", "worse": "▼", "no detectable difference": "=", "too few rows": "?"}


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar in percent of its track: the value's end and the interval's ends."""

    which: str
    text: str
    interval: str
    end: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Card:
    """One metric: its bars and what the paired difference says."""

    label: str
    meaning: str
    bars: list[Bar]
    mark: str
    verdict: str
    css: str
    difference: str


def render(report: Report) -> str:
    """Return the page. A pure function of the report."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    charts = [] if report.curve is None else _charts(report.curve, report.held_out)
    cards = [_card(figure) for figure in report.figures if figure.base is not None or figure.tuned is not None]
    return environment.from_string(PAGE).render(r=report, style=Markup(STYLE), charts=charts, cards=cards, same=exact_match) + "\n"


def _card(figure: Figure) -> Card:
    shown = SHOWN.get(figure.name, Shown(figure.name, "", LOSS, LOSS, "", None))
    values = [figure.base, figure.tuned, *(figure.base_interval or ()), *(figure.tuned_interval or ())]
    top = shown.top or max((value for value in values if value is not None), default=0.0) * 1.02 or 1.0
    bars = [
        _bar(which, value, ends, shown, top)
        for which, value, ends in (("base", figure.base, figure.base_interval), ("tuned", figure.tuned, figure.tuned_interval))
        if value is not None
    ]
    difference = ""
    if figure.base is not None and figure.tuned is not None:
        change = figure.tuned - figure.base
        difference = f"difference {'+' if change > 0 else ''}{shown.change(change)}{shown.unit}"
        difference += _range(figure.difference_interval, shown.change)
    verdict = figure.verdict or ""
    css = {"better": "good", "worse": "bad"}.get(verdict, "even")
    return Card(shown.label, shown.meaning, bars, MARKS.get(verdict, ""), verdict, css, difference)


def _bar(which: str, value: float, ends: Ends, shown: Shown, top: float) -> Bar:
    def place(at: float) -> float:
        return round(100 * min(max(at / top, 0.0), 1.0), 2)

    low, high = (place(ends[0]), place(ends[1])) if ends is not None else (None, None)
    return Bar(which, shown.text(value), _range(ends, shown.text), place(value), low, high)


def _range(ends: Ends, text: Callable[[float], str]) -> str:
    return "" if ends is None else f" [{text(ends[0])} to {text(ends[1])}]"


@dataclass(frozen=True, slots=True)
class Chart:
    """One picture with its heading and legend: (CSS class, words)."""

    heading: str
    svg: Markup
    legend: list[tuple[str, str]]


def _charts(curve: Curve, held_out: list[tuple[int, float]]) -> list[Chart]:
    loss = list(zip(curve.step, curve.loss, strict=True))
    rate = list(zip(curve.step, curve.learning_rate, strict=True))
    per_point = "each step" if curve.steps_per_point == 1 else f"mean of {curve.steps_per_point} steps"
    smooth = _smoothed(curve.loss)
    lines = [Line("faint", loss), Line("train", list(zip(curve.step, smooth, strict=True)))]
    legend = [("train", f"training, running mean (faint: {per_point})")]
    if held_out:
        lines.append(Line("held", [(float(step), nll) for step, nll in held_out], dots=True, label="held-out loss"))
        legend.append(("held", "held-out"))
    rate_chart = line_chart([Line("rate", rate)], "step", "", f"Learning rate, at most {max(curve.learning_rate):g}")
    described = f"Training loss from {loss[0][1]:.3f} to {loss[-1][1]:.3f} over {curve.step[-1]} steps"
    return [
        Chart("Loss", Markup(line_chart(lines, "step", "nats per token", described)), legend),
        Chart("Learning rate", Markup(rate_chart), [("rate", "learning rate")]),
    ]


def _smoothed(values: list[float]) -> list[float]:
    """Return the mean of each value and its neighbours on both sides, over about a twentieth of the curve."""
    reach = len(values) // 40
    windows = (values[max(0, place - reach) : place + reach + 1] for place in range(len(values)))
    return [sum(window) / len(window) for window in windows]
