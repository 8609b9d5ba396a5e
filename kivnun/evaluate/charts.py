"""Line charts as inline SVG: no script, no font, colours from the page's style, so that one file is the whole report.

Plotting libraries write SVG of 20 to 50 kB with fixed colours; a page that follows the reader's light or dark setting needs
strokes that name CSS variables. Next: `page.py`, which places them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 12, 40


@dataclass(frozen=True, slots=True)
class Line:
    """One series: points (x, y) in x order, drawn in the CSS class `style`; with `dots` each point is marked and named."""

    style: str
    points: Sequence[tuple[float, float]]
    dots: bool = False
    label: str = ""


@dataclass(slots=True)
class _Scale:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[float] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, description: str) -> str:
    """Return an SVG element with the lines over common axes; y begins at zero when the values come near it.

    `description` is what a screen reader says. Values must be finite, and there must be a point.
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_scale = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_low = 0.0 if min(ys) >= 0 and min(ys) < 0.5 * max(ys) else min(ys)
    y_scale = _scale(y_low, max(ys), HEIGHT - BOTTOM, TOP, rounded=True)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}" xmlns="http://www.w3.org/2000/svg">',
        *_axes(x_scale, y_scale, x_label, y_label),
        *(part for line in lines for part in _series(line, x_scale, y_scale)),
        "</svg>",
    ]
    return "\n".join(parts)


def ticks_between(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return about `wanted` round numbers (1, 2 or 5 times a power of ten) from at or above `low` to at or below `high`."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda size: abs(size - raw))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [count * step for count in range(first, last + 1)]


def short_number(value: float) -> str:
    """Return a tick's text: no trailing zeros, thousands apart, small and large ones with an exponent."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e7:
        digits, power = f"{value:.2e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:,.4f}".rstrip("0").rstrip(".")


def _scale(low: float, high: float, start: float, end: float, rounded: bool = False) -> _Scale:
    if high <= low:  # one point, or a constant: room on both sides
        margin = abs(low) * 0.5 or 0.5
        low, high = low - margin, high + margin
    ticks = ticks_between(low, high)
    if rounded and len(ticks) > 1:
        step = ticks[1] - ticks[0]
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        ticks = ticks_between(low, high)
    return _Scale(low, high, start, end, ticks)


def _axes(x_scale: _Scale, y_scale: _Scale, x_label: str, y_label: str) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts: list[str] = []
    for tick in y_scale.ticks:
        y = y_scale(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{short_number(tick)}</text>')
    whole = [tick for tick in x_scale.ticks if tick == round(tick)]
    for tick in whole:
        parts.append(f'<text x="{x_scale(tick):.1f}" y="{bottom + 17}" text-anchor="middle">{short_number(tick)}</text>')
    middle = (TOP + bottom) / 2
    return [
        *parts,
        f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>',
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
    ]


def _series(line: Line, x_scale: _Scale, y_scale: _Scale) -> list[str]:
    places = [(x_scale(x), y_scale(y)) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline class="line {line.style}" points="{path}"/>'] if len(places) > 1 else []
    if line.dots or len(places) == 1:
        for (x, y), (step, value) in zip(places, line.points, strict=True):
            title = escape(f"{line.label} {short_number(value)} at step {short_number(step)}".strip())
            parts.append(f'<circle class="dot {line.style}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{title}</title></circle>')
    return parts
