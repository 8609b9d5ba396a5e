"""Pictures of memory and counts as inline SVG, in the manner of the report's charts: no script, no font, strokes and fills by CSS
class, so that a page's light or dark setting reaches them.

The page that holds them puts `STYLE` into its style sheet beside the report's own. Next: `memory_summary.py` (the figures).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

from kivnun.evaluate.charts import short_number, ticks_between
from kivnun.matrix.counts import Count
from kivnun.matrix.memory import PARTS, Form, Surface
from kivnun.matrix.memory_summary import figures_of, peaks
from kivnun.plan.techniques import TECHNIQUES

# Six hues that stay apart for colour-blind readers on light and on dark cards; lines differ by dash as well.
STYLE = """
:root { --part-weights: #8d867b; --part-adapter: #0f7a6c; --part-gradients: #b4530a; --part-moments: #7a4fb0;
  --part-activations: #2a6fb0; --part-workspace: #d3cdc3; --mark: #a4221b; }
@media (prefers-color-scheme: dark) { :root { --part-weights: #8f887c; --part-adapter: #35b8a4; --part-gradients: #ef9a4d;
  --part-moments: #b794f0; --part-activations: #6cb0ee; --part-workspace: #4a453d; --mark: #ffa69e; } }
svg .p-weights { fill: var(--part-weights); } svg .p-adapter { fill: var(--part-adapter); }
svg .p-gradients { fill: var(--part-gradients); } svg .p-moments { fill: var(--part-moments); }
svg .p-activations { fill: var(--part-activations); } svg .p-workspace { fill: var(--part-workspace); }
svg .l-full { stroke: var(--text); fill: var(--text); } svg .l-lora { stroke: var(--part-adapter); fill: var(--part-adapter); }
svg .l-qlora { stroke: var(--part-activations); fill: var(--part-activations); }
svg .l-dora { stroke: var(--part-gradients); fill: var(--part-gradients); }
svg .l-vera { stroke: var(--part-moments); fill: var(--part-moments); }
svg .line.l-full, svg .line.l-lora, svg .line.l-qlora, svg .line.l-dora, svg .line.l-vera { fill: none; }
svg .line.l-qlora { stroke-dasharray: 6 4; } svg .line.l-dora { stroke-dasharray: 2 4; }
svg .line.l-vera { stroke-dasharray: 9 3 2 3; }
svg .mark { fill: none; stroke: var(--mark); stroke-width: 2; } svg .name { fill: var(--text); }
svg .whisker { stroke: var(--text); stroke-width: 1.5; } svg .full-line { stroke: var(--text); stroke-dasharray: 4 3; }
"""
LINES = ("full", "lora", "qlora", "dora", "vera")
WIDTH, LEFT, RIGHT = 720, 104, 84
BAR, GAP, TOP = 20, 9, 34


def parts_chart(surface: Surface, form: Form) -> str:
    """Return stacked bars of each technique's peak by part at the reference point; a whisker spans the repeats."""
    figures = {name: its for name in TECHNIQUES if (its := figures_of(surface, name, form)) is not None}
    most = max(its.peak * max(1.0, its.interval[1] / its.ratio) for its in figures.values()) / 1e6
    bottom = TOP + len(figures) * (BAR + GAP)

    def x(megabytes: float) -> float:
        return LEFT + megabytes / most * (WIDTH - LEFT - RIGHT)

    body = _vertical_grid([(x(tick), f"{short_number(tick)}") for tick in ticks_between(0, most)], bottom, "peak, MB above rest")
    full = next(iter(figures.values())).full_peak / 1e6
    body.append(f'<line class="full-line" x1="{x(full):.1f}" x2="{x(full):.1f}" y1="{TOP - 4}" y2="{bottom}"/>')
    for number, (name, its) in enumerate(figures.items()):
        y, at = TOP + number * (BAR + GAP), 0.0
        body.append(_name(name, y))
        for part in PARTS:
            size = its.parts[part] / 1e6
            what = "float32 copies" if name == "full" and part == "adapter" else part
            title = f"{TECHNIQUES[name].label}: {what} {size:,.1f} of {its.peak / 1e6:,.1f} MB"
            if x(at + size) - x(at) > 0.05:
                body.append(_bar(f"p-{part}", x(at), x(at + size), y, title))
            at += size
        if its.repeats > 1:
            ends = [x(its.peak / 1e6 * end / its.ratio) for end in its.interval]
            body += _whisker(ends[0], ends[1], y + BAR / 2)
        place = max(x(at), x(its.peak / 1e6 * its.interval[1] / its.ratio) if its.repeats > 1 else 0.0)
        body.append(f'<text x="{place + 7:.1f}" y="{y + BAR - 5}">{at:,.0f}</text>')
    return _svg([*_legend(), *body], bottom + 40, f"Peak memory of {len(figures)} techniques by part")


def _legend() -> list[str]:
    step = (WIDTH - 8) / len(PARTS)
    return [
        f'<rect class="p-{part}" x="{4 + number * step:.0f}" y="4" width="11" height="11" rx="2"/>'
        f'<text x="{20 + number * step:.0f}" y="14">{part}</text>'
        for number, part in enumerate(PARTS)
    ]


def tokens_chart(surface: Surface, form: Form, techniques: Sequence[str] = LINES) -> str:
    """Return peak bytes over the tokens of a pass, both on logarithmic axes, with a ring where a line crosses full tuning's."""
    lines = {name: _line(surface, name, form) for name in techniques}
    lines = {name: line for name, line in lines.items() if len(line) > 1}
    every = [at for line in lines.values() for at in line]
    high, bottom, left = 340, 300, 56
    x = _log_scale([tokens for tokens, _ in every], left, WIDTH - 96)
    y = _log_scale([peak for _, peak in every], bottom, 16)
    body: list[str] = []
    for tick in _log_ticks([peak for _, peak in every]):
        body.append(f'<line class="grid" x1="{left}" x2="{WIDTH - 96}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        body.append(f'<text x="{left - 7}" y="{y(tick) + 4:.1f}" text-anchor="end">{short_number(tick)}</text>')
    for tokens in sorted({tokens for tokens, _ in every}):
        body.append(f'<text x="{x(tokens):.1f}" y="{bottom + 18}" text-anchor="middle">{short_number(tokens)}</text>')
    body.append(f'<line class="axis" x1="{left}" x2="{WIDTH - 96}" y1="{bottom}" y2="{bottom}"/>')
    body.append(f'<text x="{(left + WIDTH - 96) / 2}" y="{high - 4}" text-anchor="middle">tokens of a pass</text>')
    body.append(f'<text transform="translate(12 {bottom / 2}) rotate(-90)" text-anchor="middle">peak, MB above rest</text>')
    for name, line in lines.items():
        path = " ".join(f"{x(tokens):.1f},{y(peak):.1f}" for tokens, peak in line)
        body.append(f'<polyline class="line l-{name}" points="{path}"/>')
        for tokens, peak in line:
            title = f"{TECHNIQUES[name].label}: {peak:,.0f} MB at {tokens:,.0f} tokens"
            body.append(
                f'<circle class="dot l-{name}" cx="{x(tokens):.1f}" cy="{y(peak):.1f}" r="3.5"><title>{title}</title></circle>'
            )
    body += _end_names({name: (x(line[-1][0]), y(line[-1][1])) for name, line in lines.items()})
    for tokens, peak, title in _crossing_marks(lines):
        ring = f'<circle class="mark" cx="{x(tokens):.1f}" cy="{y(peak):.1f}" r="9"><title>{escape(title)}</title></circle>'
        body.append(ring)
        body.append(f'<text class="name" x="{x(tokens):.1f}" y="{y(peak) - 14:.1f}" text-anchor="middle">{tokens:,.0f}</text>')
    return _svg(body, high, "Peak memory over the tokens of a pass")


def _line(surface: Surface, technique: str, form: Form) -> list[tuple[float, float]]:
    """Return (tokens of a pass, MB) in order, the mean where several rows and lengths come to the same tokens."""
    found: dict[int, list[float]] = {}
    for (rows, tokens), peak in peaks(surface, technique, form).items():
        found.setdefault(rows * tokens, []).append(peak / 1e6)
    return [(float(tokens), sum(values) / len(values)) for tokens, values in sorted(found.items())]


def _crossing_marks(lines: Mapping[str, Sequence[tuple[float, float]]]) -> list[tuple[float, float, str]]:
    """Return (tokens, MB, words) where a drawn line crosses full tuning's: straight between points, as the crossings are found."""
    full = dict(lines.get("full", ()))
    marks: list[tuple[float, float, str]] = []
    for name, line in lines.items():
        both = [(tokens, peak - full[tokens], full[tokens]) for tokens, peak in line if tokens in full]
        for (low, before, below), (high, after, above) in pairwise(both):
            if (before > 0) != (after > 0):
                share = before / (before - after)
                at, peak = low + (high - low) * share, below + (above - below) * share
                what = "more" if after > 0 else "less"
                marks.append(
                    (at, peak, f"{TECHNIQUES[name].label} takes {what} than full tuning from {at:,.0f} tokens of a pass on")
                )
    return marks


def _end_names(ends: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return names beside the ends of lines, moved down where they would cover one another."""
    parts: list[str] = []
    taken: list[tuple[float, float]] = []
    for name, (x, y) in sorted(ends.items(), key=lambda item: item[1][1]):
        for other_x, other_y in taken:
            y = max(y, other_y + 16) if abs(x - other_x) < 90 else y
        taken.append((x, y))
        parts.append(f'<text class="name" x="{x + 10:.1f}" y="{y + 4:.1f}">{TECHNIQUES[name].label}</text>')
    return parts


def counts_chart(counts: Mapping[str, Count]) -> str:
    """Return bars of the numbers each technique trains, on a logarithmic axis, with their share of the base."""
    numbers = [its.trained for its in counts.values()]
    low, high = 10 ** math.floor(math.log10(min(numbers)) - 0.3), max(numbers)
    bottom, right = 8 + len(counts) * (BAR + GAP), WIDTH - 150

    def x(value: float) -> float:
        return LEFT + math.log(value / low) / math.log(high / low) * (right - LEFT)

    powers = range(round(math.log10(low)), math.floor(math.log10(high)) + 1)
    body = _vertical_grid([(x(10**power), _power(power)) for power in powers], bottom, "numbers trained", top=8, right=right)
    for number, (name, its) in enumerate(counts.items()):
        y = 8 + number * (BAR + GAP)
        title = f"{TECHNIQUES[name].label}: {its.trained:,} of {its.base_numbers:,}"
        body += [_name(name, y), _bar("p-adapter" if name != "full" else "p-weights", LEFT, x(its.trained), y, title)]
        body.append(f'<text x="{x(its.trained) + 7:.1f}" y="{y + BAR - 5}">{its.trained:,} · {_share(its.share)}</text>')
    return _svg(body, bottom + 40, "Numbers that each technique trains, on a logarithmic axis")


def law_chart(laws: Mapping[str, Mapping[int, float]]) -> str:
    """Return bars of a process's MiB for each way to divide a run, one below another for each number of processes."""
    counts = sorted({count for by_count in laws.values() for count in by_count})
    fills = dict(zip(counts, ("p-weights", "p-activations", "p-adapter", "p-moments"), strict=False))
    most = max(mib for by_count in laws.values() for mib in by_count.values())
    left, thin, group = 190, 13, len(counts) * 15 + GAP
    bottom = TOP + len(laws) * group

    def x(mib: float) -> float:
        return left + mib / most * (WIDTH - left - RIGHT)

    body = [
        f'<rect class="{fills[count]}" x="{left + number * 130}" y="4" width="11" height="11" rx="2"/>'
        f'<text x="{left + 16 + number * 130}" y="14">{count} process{"es" * (count > 1)}</text>'
        for number, count in enumerate(counts)
    ]
    body += _vertical_grid([(x(tick), f"{short_number(tick)}") for tick in ticks_between(0, most)], bottom, "MiB of a process")
    for number, (name, by_count) in enumerate(laws.items()):
        y = TOP + number * group
        body.append(f'<text class="name" x="{left - 8}" y="{y + group / 2}" text-anchor="end">{escape(name)}</text>')
        for place, (count, mib) in enumerate(sorted(by_count.items())):
            top, title = y + place * 15, f"{name}: {mib:,.0f} MiB, {count} processes"
            rect = f'<rect class="{fills[count]}" x="{left}" y="{top}" width="{x(mib) - left:.1f}" height="{thin}">'
            body.append(f"{rect}<title>{escape(title)}</title></rect>")
            body.append(f'<text x="{x(mib) + 6:.1f}" y="{top + thin - 2}">{mib:,.0f}</text>')
    return _svg(body, bottom + 40, "Memory of a process over the number of processes")


def _power(power: int) -> str:
    return {3: "1 k", 4: "10 k", 5: "100 k", 6: "1 M", 7: "10 M", 8: "100 M", 9: "1 G", 10: "10 G"}.get(power, f"1e{power}")


def _share(share: float) -> str:
    return f"{100 * share:.3g} %"


def _vertical_grid(
    ticks: Sequence[tuple[float, str]], bottom: float, label: str, top: float = TOP, right: float = WIDTH - RIGHT
) -> list[str]:
    lines = [
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{bottom}"/>'
        f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{text}</text>'
        for x, text in ticks
    ]
    return [*lines, f'<text x="{(LEFT + right) / 2}" y="{bottom + 35}" text-anchor="middle">{label}</text>']


def _name(technique: str, y: float) -> str:
    return f'<text class="name" x="{LEFT - 8}" y="{y + BAR - 5}" text-anchor="end">{TECHNIQUES[technique].label}</text>'


def _bar(style: str, start: float, end: float, y: float, title: str) -> str:
    box = f'x="{start:.1f}" y="{y}" width="{end - start:.1f}" height="{BAR}"'
    return f'<rect class="{style}" {box}><title>{escape(title)}</title></rect>'


def _whisker(start: float, end: float, y: float) -> list[str]:
    ends = [f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 4}" y2="{y + 4}"/>' for x in (start, end)]
    return [f'<line class="whisker" x1="{start:.1f}" x2="{end:.1f}" y1="{y}" y2="{y}"/>', *ends]


def _log_scale(values: Sequence[float], start: float, end: float):
    low, high = math.log(min(values)), math.log(max(values))
    return lambda value: start + (math.log(value) - low) / (high - low or 1.0) * (end - start)


def _log_ticks(values: Sequence[float]) -> list[float]:
    """Return the numbers 1, 2 and 5 times a power of ten between the least and the greatest."""
    powers = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    every = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    return [tick for tick in every if min(values) <= tick <= max(values)]


def _svg(body: Sequence[str], height: float, description: str) -> str:
    head = (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(description)}" xmlns="http://www.w3.org/2000/svg">'
    )
    return "\n".join([head, *body, "</svg>"])
