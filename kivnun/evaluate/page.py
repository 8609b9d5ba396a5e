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
from kivnun.evaluate.report import Curve, Ends, Figure, Report


@dataclass(frozen=True, slots=True)
class Shown:
    """How a metric is told to people. `top` is where its bar ends; None: at the largest value there is."""

    label: str
    meaning: str
    text: Callable[[float], str]
    top: float | None


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %".replace("-", "−")


def _decimals(places: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{places}f}".replace("-", "−")


SHOWN = {
    "nll": Shown("Held-out loss", "nats per trained token; lower is better", _decimals(3), None),
    "preference_accuracy": Shown(
        "Preference accuracy", "pairs whose chosen reply is the likelier; higher is better", _percent, 1.0
    ),
    "exact_match": Shown("Exact match", "replies that equal the reference; higher is better", _percent, 1.0),
    "chrf": Shown("chrF", "overlap of characters with the reference, 0 to 100; higher is better", _decimals(1), 100.0),
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
    return environment.from_string(PAGE).render(r=report, style=Markup(STYLE), charts=charts, cards=cards) + "\n"


def _card(figure: Figure) -> Card:
    shown = SHOWN.get(figure.name, Shown(figure.name, "", _decimals(3), None))
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
        difference = f"difference {'+' if change > 0 else ''}{shown.text(change)}{_range(figure.difference_interval, shown)}"
    verdict = figure.verdict or ""
    css = {"better": "good", "worse": "bad"}.get(verdict, "even")
    return Card(shown.label, shown.meaning, bars, MARKS.get(verdict, ""), verdict, css, difference)


def _bar(which: str, value: float, ends: Ends, shown: Shown, top: float) -> Bar:
    def place(at: float) -> float:
        return round(100 * min(max(at / top, 0.0), 1.0), 2)

    low, high = (place(ends[0]), place(ends[1])) if ends is not None else (None, None)
    return Bar(which, shown.text(value), _range(ends, shown), place(value), low, high)


def _range(ends: Ends, shown: Shown) -> str:
    return "" if ends is None else f" [{shown.text(ends[0])} to {shown.text(ends[1])}]"


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
    described = f"Training loss from {loss[0][1]:.3f} to {loss[-1][1]:.3f} over {curve.step[-1]} steps"
    return [
        Chart("Loss", Markup(line_chart(lines, "step", "nats per token", described)), legend),
        Chart(
            "Learning rate",
            Markup(
                line_chart([Line("rate", rate)], "step", "learning rate", f"Learning rate, at most {max(curve.learning_rate):g}")
            ),
            [("rate", "learning rate")],
        ),
    ]


def _smoothed(values: list[float]) -> list[float]:
    """Return the mean of each value and its neighbours on both sides, over about a twentieth of the curve."""
    reach = len(values) // 40
    windows = (values[max(0, place - reach) : place + reach + 1] for place in range(len(values)))
    return [sum(window) / len(window) for window in windows]


STYLE = """
:root { color-scheme: light dark; --page: #f7f6f3; --card: #fff; --text: #1d1b18; --soft: #5d5850; --rule: #e3dfd8;
  --base: #8d867b; --tuned: #0f7a6c; --held: #b4530a; --good: #0b6b41; --good-bg: #ddf3e6; --bad: #a4221b; --bad-bg: #fbe3e0;
  --even-bg: #ebe8e2; --code: #f1efea; }
@media (prefers-color-scheme: dark) { :root { --page: #161513; --card: #201e1b; --text: #ece8e1; --soft: #aaa397; --rule: #38342e;
  --base: #8f887c; --tuned: #35b8a4; --held: #ef9a4d; --good: #7fdcae; --good-bg: #14372a; --bad: #ffa69e; --bad-bg: #471f1b;
  --even-bg: #34302a; --code: #191815; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Noto Sans",
  "Noto Sans Hebrew", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 1.05rem; font-weight: 600; margin: 0; color: var(--soft); overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 36px 0 12px; }
h3 { font-size: 1rem; margin: 0 0 2px; }
p { margin: 0; }
.soft { color: var(--soft); font-size: .875rem; }
.headline { font-size: clamp(1.7rem, 5vw, 2.5rem); line-height: 1.15; font-weight: 700; letter-spacing: -.02em; margin: 6px 0 8px; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 16px 18px; min-width: 0; }
.chip { display: inline-block; border-radius: 99px; padding: 1px 11px; font-size: .875rem; font-weight: 600; background: var(--even-bg); }
.chip.good { background: var(--good-bg); color: var(--good); } .chip.bad { background: var(--bad-bg); color: var(--bad); }
.bar { margin-top: 12px; } .bar .line1 { display: flex; justify-content: space-between; gap: 10px; flex-wrap: wrap; }
.bar b { font-variant-numeric: tabular-nums; } .bar .soft { font-variant-numeric: tabular-nums; }
.track { position: relative; height: 14px; border-radius: 4px; background: var(--even-bg); margin-top: 3px; }
.fill { position: absolute; inset: 0 auto 0 0; border-radius: 4px; background: var(--base); } .fill.tuned { background: var(--tuned); }
.span { position: absolute; top: 50%; height: 2px; margin-top: -1px; background: var(--text); min-width: 2px; }
.span::before, .span::after { content: ""; position: absolute; top: -4px; height: 10px; width: 2px; background: var(--text); }
.span::after { right: 0; }
.foot { margin-top: 12px; display: flex; flex-wrap: wrap; gap: 6px 10px; align-items: baseline; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 12.5px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--soft); }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; } svg .dot { stroke: var(--card); stroke-width: 1.5; }
svg .train { stroke: var(--tuned); } svg circle.train { fill: var(--tuned); }
svg .faint { stroke: var(--tuned); opacity: .3; stroke-width: 1; }
svg .rate { stroke: var(--tuned); } svg circle.rate { fill: var(--tuned); }
svg .line.held { stroke: var(--held); stroke-dasharray: 5 4; } svg circle.held { fill: var(--held); }
.key { display: inline-block; width: 16px; height: 3px; border-radius: 2px; background: var(--tuned); margin: 0 6px 4px 0; }
.key.held { background: var(--held); } .legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin-top: 6px; }
.said { display: grid; grid-template-columns: 5.5rem minmax(0, 1fr); gap: 7px 10px; margin: 0; }
.said dt { color: var(--soft); font-size: .875rem; padding-top: 1px; } .said dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.said dd.tuned { font-weight: 600; } .said .ok { color: var(--good); font-weight: 600; }
.samples > .card + .card { margin-top: 12px; }
.facts { width: 100%; border-collapse: collapse; font-size: .9rem; } .facts td { padding: 4px 0; vertical-align: top; }
.facts tr + tr td { border-top: 1px solid var(--rule); } .facts td:first-child { color: var(--soft); padding-right: 14px; width: 42%; }
.facts td { overflow-wrap: anywhere; }
details { margin-top: 12px; } summary { cursor: pointer; font-weight: 600; padding: 4px 0; }
pre { background: var(--code); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px; overflow-x: auto; margin: 8px 0 0;
  font: .82rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.hashes td:last-child { font: .8rem/1.6 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
ul { margin: 0; padding-left: 20px; } li { overflow-wrap: anywhere; white-space: pre-wrap; }
@media (max-width: 520px) { main { padding: 20px 14px 40px; } .said { grid-template-columns: minmax(0, 1fr); gap: 2px; }
  .said dd { margin-bottom: 8px; } }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ r.headline }} · {{ r.run }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<h1>Kivnun · run {{ r.run }} · {{ r.status }}</h1>
<p class="headline">{{ r.headline }}</p>
<p>{{ r.detail }}</p>
</header>

{% if cards %}
<h2>Base and tuned on held-out rows</h2>
<div class="grid">
{% for card in cards %}
<section class="card">
<h3>{{ card.label }}</h3>
<p class="soft">{{ card.meaning }}</p>
{% for bar in card.bars %}
<div class="bar">
<div class="line1"><span>{{ bar.which }}</span><span><b>{{ bar.text }}</b><span class="soft">{{ bar.interval }}</span></span></div>
<div class="track"><div class="fill {{ bar.which }}" style="width:{{ bar.end }}%"></div>
{% if bar.low is not none %}
<div class="span" style="left:{{ bar.low }}%;width:{{ (bar.high - bar.low) | round(2) }}%"></div>
{% endif %}
</div>
</div>
{% endfor %}
<p class="foot">
{% if card.verdict %}<span class="chip {{ card.css }}">{{ card.mark }} {{ card.verdict }}</span>{% endif %}
<span class="soft">{{ card.difference }}</span></p>
</section>
{% endfor %}
</div>
<p class="soft" style="margin-top:10px">In brackets: 95 % intervals from resampling the held-out rows. “Better” and “worse” are said only
where the interval of the difference, on the same rows, excludes zero.</p>
{% endif %}

{% if charts %}
<h2>Training</h2>
<div class="grid wide">
{% for chart in charts %}
<section class="card">
<h3>{{ chart.heading }}</h3>
{{ chart.svg }}
<div class="legend soft">{% for css, words in chart.legend %}<span><span class="key {{ css }}"></span>{{ words }}</span>{% endfor %}</div>
</section>
{% endfor %}
</div>
{% endif %}

{% if r.samples %}
<h2>The same prompts, before and after</h2>
<div class="samples">
{% for sample in r.samples %}
<section class="card"><dl class="said">
<dt>prompt</dt><dd dir="auto">{{ sample.prompt }}</dd>
<dt>reference</dt><dd dir="auto">{{ sample.reference }}</dd>
{% for which, reply in (("base", sample.base), ("tuned", sample.tuned)) %}
{% if reply is not none %}
<dt>{{ which }}{% if reply.strip() == sample.reference.strip() %} <span class="ok" title="equals the reference">✓</span>{% endif %}</dt>
<dd dir="auto" class="{{ which }}">{% if reply.strip() %}{{ reply }}{% else %}<span class="soft">(nothing)</span>{% endif %}</dd>
{% endif %}
{% endfor %}
</dl></section>
{% endfor %}
</div>
{% endif %}

{% if r.notes %}
<h2>Notes</h2>
<section class="card"><ul>{% for note in r.notes %}<li>{{ note }}</li>{% endfor %}</ul></section>
{% endif %}

<h2>What was run</h2>
<div class="grid">
{% for heading, entries in r.facts.items() if heading in ("Data", "Model", "Training") %}
<section class="card"><h3>{{ heading }}</h3><table class="facts">
{% for name, value in entries.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}
</table></section>
{% endfor %}
</div>
{% for heading, entries in r.facts.items() if heading not in ("Data", "Model", "Training") %}
<details><summary>{{ heading }}</summary><div class="card"><table class="facts hashes">
{% for name, value in entries.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}
</table></div></details>
{% endfor %}
{% if r.spec %}
<details><summary>The spec, with every default and its reason</summary><pre>{{ r.spec }}</pre></details>
{% endif %}
</main>
</body>
</html>"""
