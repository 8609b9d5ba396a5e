"""The matrix as one HTML file: the table, what to choose, and behind each row the figures it rests on.

No script, nothing loaded from anywhere; light and dark, phone and desk.
Next: `page_template.py`, `matrix.py` (where values come from).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from kivnun.evaluate.page_template import STYLE as REPORT_STYLE
from kivnun.matrix.memory_charts import STYLE as CHART_STYLE
from kivnun.matrix.page_template import PAGE, STYLE
from kivnun.matrix.table import ROWS, RULE, TECHNIQUES, Cell
from kivnun.plan.measured import score_of, told_apart
from kivnun.plan.techniques import TECHNIQUES as METHOD_LABELS

WORDS = {
    "supported": "supported",
    "contradicted": "contradicted",
    "no_detectable_effect": "no detectable effect",
    "not_applicable": "not applicable",
}
LIMITS = (
    "The base is small and was trained on synthetic text; a technique's rank on it need not be its rank on a large base.",
    "Everything ran on CPU cores of one machine. Processes stand for devices: bytes per process and equality of losses carry over, "
    "seconds of several processes on few cores do not.",
    "Each method has its usual size (rank 16, 20 virtual tokens, ...): a sweep over sizes is not part of this table.",
    "Intervals cover the choice of rows and seeds, not the choice of tasks.",
)


@dataclass(frozen=True, slots=True)
class Table:
    heading: str
    names: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Chart:
    heading: str
    svg: str


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page below the table."""

    title: str
    text: str
    charts: Sequence[Chart] = field(default_factory=tuple)
    tables: Sequence[Table] = field(default_factory=tuple)


def render(
    facts: Mapping[str, Any], cells: Sequence[Cell], scores: Sequence[Mapping[str, Any]], sections: Sequence[Section]
) -> str:
    """Return the page. `facts` say what was run where, `scores` hold for each task what every method got."""
    shown = {(cell.row, cell.technique): _shown(cell) for cell in cells}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(PAGE).render(
        m=facts,
        style=Markup(REPORT_STYLE + CHART_STYLE + STYLE),  # ours
        techniques=TECHNIQUES,
        rows=ROWS,
        rule=RULE,
        cells=shown,
        counts={verdict: Counter(cell.verdict for cell in cells)[verdict] for verdict in WORDS},
        tasks=[_task(task) for task in scores],
        sections=[_marked(section) for section in sections],
        advice=advice(cells, scores),
        limits=LIMITS,
    )


def _marked(section: Section) -> Section:
    charts = [Chart(chart.heading, Markup(chart.svg)) for chart in section.charts]  # ours: numbers and our own labels
    return Section(section.title, section.text, charts, section.tables)


def _shown(cell: Cell) -> dict[str, str]:
    what, more = _in_words(cell)
    return {
        "css": cell.verdict,
        "what": what,
        "more": more,
        "word": WORDS[cell.verdict],
        "document": cell.document,
        "upstream": cell.upstream,
    }


def _in_words(cell: Cell) -> tuple[str, str]:
    """Return what a cell measured, short, and a second line."""
    measured = cell.measured
    if "largest_relative_difference_of_a_loss" in measured:
        apart = measured["largest_relative_difference_of_a_loss"]
        stages = ", ".join(map(str, measured["stages"]))
        return f"losses {apart:.0e} apart", f"stage {stages}; from one process, in {measured['steps']} steps"
    if cell.row <= 5:
        best = measured.get("best", measured)
        tasks = {name: it for name, it in best.items() if isinstance(it, Mapping)}
        what = "; ".join(f"{number(it['base'], it['metric'])} → {number(it['score'], it['metric'])}" for it in tasks.values())
        metrics = ", ".join(dict.fromkeys(str(it["metric"]).replace("_", " ") for it in tasks.values()))
        if "best" in measured:
            return what, f"{metrics}; {_best_and_worst(measured)}"
        return what, metrics
    return cell_in_words(cell)


def cell_in_words(cell: Cell) -> tuple[str, str]:
    """Return what a cell of rows 6 to 9 measured, short, and a second line."""
    said = cell.measured.get("said")
    if said is not None:
        return str(said[0]), str(said[1])
    best = cell.measured.get("best", cell.measured)
    if "ratio_to_full" in best:
        ratio = best["ratio_to_full"]
        second = f"CPU time to a loss of {cell.measured['target_nll']:.3f}"
        second += f"; {_best_and_worst(cell.measured)}" if "best" in cell.measured else ""
        if ratio is None:
            reached = best["seeds_that_reached"]
            return (f"{reached} of its runs get there" if reached else "does not get there"), second
        return f"{ratio:.2f} of full tuning", second
    stages = [(name, it["ratio_to_one_process"]) for name, it in cell.measured.items() if isinstance(it, Mapping)]
    name, ratio = min(stages, key=lambda stage: stage[1])
    return f"{ratio:.2f} of one process", f"core-seconds of a step; {name}"


def _best_and_worst(measured: Mapping[str, Any]) -> str:
    return f"best {_label(measured['best']['method'])}, worst {_label(measured['worst']['method'])}"


def _label(method: str) -> str:
    """Return a method as people call it."""
    return METHOD_LABELS[method].label if method in METHOD_LABELS else method


def number(value: float, metric: str) -> str:
    """Return a figure as people read it: shares in percent, others with the digits that count."""
    if metric in ("perplexity", "nll"):
        return f"{value:.2f}"
    return f"{value:.1f}" if metric == "chrf" else f"{100 * value:.1f} %"


def _task(task: Mapping[str, Any]) -> dict[str, Any]:
    metric = task["metric"]
    ranked = _ranked(task)
    lines = [{"method": "base", "score": number(task["base"], metric), "gain": "", "trained": "", "first": False}]
    lines += [
        {
            "method": _label(method),
            "score": number(it["score"], metric),
            "gain": _gain(it, metric),
            "trained": f"{it['trainable']:,}",
            "first": method == ranked[0][0],
        }
        for method, it in ranked
    ]
    direction = "higher is better" if task["higher_is_better"] else "lower is better"
    return {"title": task["title"], "metric": str(metric).replace("_", " "), "direction": direction, "lines": lines}


def _gain(it: Mapping[str, Any], metric: str) -> str:
    sign = 1 if it["higher_is_better"] else -1
    scale = 1.0 if metric in ("perplexity", "nll", "chrf") else 100.0
    low, high = sorted(sign * scale * end for end in it["gain_interval"])
    return f"{sign * scale * it['gain']:+.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "−")


def advice(cells: Sequence[Cell], scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the figures say to someone who has to choose."""
    found = {(cell.row, cell.technique): cell for cell in cells}
    lines: list[str] = []
    for task in scores:
        ranked = _ranked(task)
        (first, best), metric = ranked[0], task["metric"]
        near = [_label(name) for name, it in ranked[1:] if not told_apart(score_of(it), score_of(best))]
        also = f"; not told apart from it: {', '.join(near)}" if near else ""
        lines.append(
            f"{task['title']}: {_label(first)} did best ({str(metric).replace('_', ' ')} {number(best['score'], metric)}, base "
            f"{number(task['base'], metric)}){also}."
        )
    for row, of in ((6, "cost"), (7, "memory"), (8, "trained numbers")):
        said = [
            f"{technique}: {cell_in_words(found[(row, technique)])[0]}" for technique in TECHNIQUES if (row, technique) in found
        ]
        if said:
            lines.append(f"For {of} — " + "; ".join(said) + ".")
    return lines


def _ranked(task: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the methods by score, best first. Not by gain: a quantised base may begin lower."""
    return sorted(task["methods"].items(), key=lambda item: item[1]["score"], reverse=bool(task["higher_is_better"]))
