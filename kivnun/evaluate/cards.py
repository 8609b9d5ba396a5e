"""The pieces of which the report and the comparison of runs are made: cards with bars and intervals, and charts with legends.

Next: `page.py`, `compare_page.py`, which place them; `charts.py`, which draws lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from kivnun.evaluate.charts import Line, line_chart, short_number, ticks_between
from kivnun.evaluate.report import Curve, Figure, Unrelated
from kivnun.evaluate.wording import CSS, LOSS, MARKS, Ends, Shown, between, shown

UNRELATED = Shown("Unrelated text", "nats per token; lower is better", LOSS, LOSS, "", None)


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar in percent of its track: the value's end and the interval's ends. `which` is its CSS class."""

    which: str
    text: str
    interval: str
    end: float
    low: float | None
    high: float | None
    name: str


@dataclass(frozen=True, slots=True)
class Card:
    """One metric: its bars and what the paired difference says, as a mark, a word and a sentence."""

    label: str
    meaning: str
    bars: list[Bar]
    mark: str
    verdict: str
    css: str
    words: str


@dataclass(frozen=True, slots=True)
class Chart:
    """One picture with its heading and legend: (CSS class, words)."""

    heading: str
    svg: Markup
    legend: list[tuple[str, str]]


def figure_card(figure: Figure) -> Card:
    """Return the card of one measure, base above tuned."""
    told = shown(figure.name)
    pairs = (("base", figure.base, figure.base_interval), ("tuned", figure.tuned, figure.tuned_interval))
    verdict = figure.verdict or ""
    return Card(told.label, told.meaning, bars(pairs, told), MARKS.get(verdict, ""), verdict, css_of(verdict), figure.words)


def forgetting_card(found: Unrelated) -> Card:
    """Return the card of unrelated text."""
    pairs = (("base", found.base, found.base_interval), ("tuned", found.tuned, found.tuned_interval))
    verdict = found.verdict or ""
    return Card("Loss", UNRELATED.meaning, bars(pairs, UNRELATED), MARKS.get(verdict, ""), verdict, css_of(verdict), found.words)


def css_of(verdict: str) -> str:
    """Return the class that colours a verdict."""
    return CSS.get(verdict, "even")


def bars(values: Sequence[tuple[str, float | None, Ends]], told: Shown, names: Sequence[str] = ()) -> list[Bar]:
    """Return a bar for each (CSS class, value, interval) that has a value, over one common track."""
    ends = [end for _, _, interval in values for end in interval or ()]
    known = [value for _, value, _ in values if value is not None]
    top = told.top or max([*known, *ends], default=0.0) * 1.02 or 1.0
    called = names or [which for which, _, _ in values]
    return [
        _bar(which, value, interval, told, top, name)
        for (which, value, interval), name in zip(values, called, strict=True)
        if value is not None
    ]


def _bar(which: str, value: float, ends: Ends, told: Shown, top: float, name: str) -> Bar:
    def place(at: float) -> float:
        return round(100 * min(max(at / top, 0.0), 1.0), 2)

    low, high = (place(ends[0]), place(ends[1])) if ends is not None else (None, None)
    return Bar(which, told.text(value), between(ends, told.text), place(value), low, high, name)


def run_charts(curve: Curve, held_out: Sequence[tuple[int, float]]) -> list[Chart]:
    """Return the pictures of one training: loss with the held-out loss, gradient norm, learning rate, speed."""
    per_point = "each step" if curve.steps_per_point == 1 else f"mean of {curve.steps_per_point} steps"
    lines, legend = _smooth_and_raw(curve.step, curve.loss), [("train", f"training, running mean (faint: {per_point})")]
    if held_out:
        lines.append(Line("held", [(float(step), nll) for step, nll in held_out], dots=True, label="held-out loss"))
        legend.append(("held", "held-out"))
    said = f"Training loss from {curve.loss[0]:.3f} to {curve.loss[-1]:.3f} over {curve.step[-1]} steps"
    mean = [("train", f"running mean (faint: {per_point})")]
    norms, speeds = (_smooth_and_raw(curve.step, values) for values in (curve.grad_norm, curve.tokens_per_s))
    return [
        _chart("Loss, nats per token", lines, said, legend),
        _chart("Gradient norm, before clipping", norms, f"Gradient norm, at most {max(curve.grad_norm):g}", mean),
        _chart(
            "Learning rate",
            [Line("rate", _points(curve.step, curve.learning_rate))],
            f"Learning rate, at most {max(curve.learning_rate):g}",
            [("rate", "the rate of each step")],
        ),
        _chart("Speed, tokens per second", speeds, f"Tokens per second, at most {max(curve.tokens_per_s):,.0f}", mean),
    ]


def _chart(heading: str, lines: Sequence[Line], said: str, legend: list[tuple[str, str]]) -> Chart:
    return Chart(heading, Markup(line_chart(lines, "step", "", said)), legend)


def _smooth_and_raw(steps: Sequence[int], values: Sequence[float]) -> list[Line]:
    return [Line("faint", _points(steps, values)), Line("train", _points(steps, smoothed(values)))]


def _points(steps: Sequence[int], values: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(map(float, steps), values, strict=True))


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and its neighbours on both sides, over about a twentieth of the curve."""
    reach = len(values) // 40
    windows = (values[max(0, place - reach) : place + reach + 1] for place in range(len(values)))
    return [sum(window) / len(window) for window in windows]


# --- lengths of rows ---------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 480, 220, 52, 12, 40


def lengths_chart(lengths: Sequence[tuple[int, int, int]]) -> Chart:
    """Return the histogram of rows by length: side by side the share of training rows and of held-out rows up to so many tokens."""
    sums = [max(sum(row[side] for row in lengths), 1) for side in (1, 2)]
    shares = [(most, train / sums[0], held_out / sums[1]) for most, train, held_out in lengths]
    has_held_out = any(row[2] for row in lengths)
    top = max(max(train, held_out) for _, train, held_out in shares) or 1.0
    legend = [("train", "training rows"), *([("held", "held-out rows")] if has_held_out else [])]
    said = f"Lengths of rows: from at most {lengths[0][0]:,} to at most {lengths[-1][0]:,} tokens"
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(said)}" xmlns="http://www.w3.org/2000/svg">']
    bottom = HEIGHT - BOTTOM
    for tick in ticks_between(0.0, top, 4):
        y = bottom - tick / top * (bottom - TOP)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 6}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{100 * tick:.0f} %</text>')
    slot = (WIDTH - 6 - LEFT) / len(shares)
    every = max(1, -(-len(shares) // 7))  # room for about seven numbers
    for number, ((most, *values), (_, train, held_out)) in enumerate(zip(shares, lengths, strict=True)):
        left = LEFT + number * slot
        width = slot * 0.8 / (2 if has_held_out else 1)
        told = f"up to {most:,} tokens: {train:,} training rows, {held_out:,} held out"
        for side, (css, value) in enumerate(zip(("train", "held"), values if has_held_out else values[:1], strict=False)):
            height = value / top * (bottom - TOP)
            x = left + slot * 0.1 + side * width
            parts.append(
                f'<rect class="column {css}" x="{x:.1f}" y="{bottom - height:.1f}" width="{width:.1f}" height="{height:.1f}">'
                f"<title>{escape(told)}</title></rect>"
            )
        if number % every == 0:
            parts.append(f'<text x="{left + slot / 2:.1f}" y="{bottom + 17}" text-anchor="middle">{short_number(most)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - 6}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">tokens of a row, at most</text></svg>')
    return Chart("Lengths of rows", Markup("\n".join(parts)), legend)
