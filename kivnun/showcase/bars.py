"""Grouped bars as inline SVG: before and after, side by side, with intervals; colours from the page's style. Next: `page.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 340, 224
LEFT, RIGHT, TOP, BOTTOM = 30, 6, 20, 26
BAR = 36


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar in per cent, drawn in the CSS class `style`; `name` says whose it is to a reader who points at it."""

    name: str
    style: str
    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Bars of one measure."""

    label: str
    bars: Sequence[Bar]


def grouped_bars(groups: Sequence[Group], description: str) -> str:
    """Return an SVG element with one group of bars per measure on an axis from 0 to 100 %.

    `description` is what a screen reader says, before every value.
    """
    said = "; ".join(f"{group.label}: " + ", ".join(f"{bar.name} {bar.value:.1f}" for bar in group.bars) for group in groups)
    step = (WIDTH - LEFT - RIGHT) / len(groups)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{description}. {said}")}" '
        'xmlns="http://www.w3.org/2000/svg">'
    ]
    for tick in (0, 25, 50, 75, 100):
        line = "axis" if tick == 0 else "grid"
        parts.append(f'<line class="{line}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(tick):.1f}" y2="{_y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{_y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    for number, group in enumerate(groups):
        middle = LEFT + (number + 0.5) * step
        parts.append(f'<text class="name" x="{middle:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(group.label)}</text>')
        start = middle - len(group.bars) * (BAR + 4) / 2 + 2
        for place, bar in enumerate(group.bars):
            parts += _bar(bar, start + place * (BAR + 4), group.label)
    return "\n".join([*parts, "</svg>"])


def _bar(bar: Bar, x: float, label: str) -> list[str]:
    top, middle = _y(bar.value), x + BAR / 2
    title = escape(
        f"{label}, {bar.name}: {bar.value:.1f}" + (f" [{bar.interval[0]:.1f} to {bar.interval[1]:.1f}]" if bar.interval else "")
    )
    parts = [
        f'<rect class="{bar.style}" x="{x:.1f}" y="{top:.1f}" width="{BAR}" height="{max(_y(0) - top, 0.5):.1f}" rx="2">'
        f"<title>{title}</title></rect>"
    ]
    above = top
    if bar.interval is not None and bar.interval[0] < bar.interval[1]:
        low, high = _y(bar.interval[0]), _y(bar.interval[1])
        above = min(above, high)
        parts.append(f'<path class="span" d="M{middle - 4:.1f} {high:.1f}h8m-4 0V{low:.1f}m-4 0h8"/>')
    parts.append(f'<text class="value" x="{middle:.1f}" y="{above - 4:.1f}" text-anchor="middle">{bar.value:.1f}</text>')
    return parts


def _y(value: float) -> float:
    return HEIGHT - BOTTOM - value / 100 * (HEIGHT - TOP - BOTTOM)
