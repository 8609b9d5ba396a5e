"""The comparison of runs as one HTML file, in the style of a run's report. Next: `compare.py` (the values), `cards.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from kivnun.evaluate.cards import UNRELATED as UNRELATED_SHOWN
from kivnun.evaluate.cards import Bar, Chart, bars, css_of, smoothed
from kivnun.evaluate.charts import Line, line_chart
from kivnun.evaluate.compare import UNRELATED, ComparedRun, Comparison, Difference, in_a_sentence, short_hash
from kivnun.evaluate.compare_template import PAGE, STYLE
from kivnun.evaluate.facts import duration
from kivnun.evaluate.page_template import STYLE as REPORT_STYLE
from kivnun.evaluate.report import Curve
from kivnun.evaluate.wording import LOSS, MARKS, Ends, between, shown

# So many runs have a colour of their own; the next ones take the same colours, dashed.
COLOURS = 6


@dataclass(frozen=True, slots=True)
class Said:
    """What a difference to the reference says of one run: mark, verdict, its colour's class, and a sentence."""

    run: str
    mark: str
    verdict: str
    css: str
    words: str


@dataclass(frozen=True, slots=True)
class RunsCard:
    """One measure of all runs."""

    label: str
    meaning: str
    bars: list[Bar]
    said: list[Said]


def render(comparison: Comparison) -> str:
    """Return the page. A pure function of the comparison."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    others = [run.name for run in comparison.runs[1:]]
    sentences = [in_a_sentence(comparison, name) for name in others]
    page = environment.from_string(PAGE).render(
        c=comparison,
        style=Markup(REPORT_STYLE + STYLE),
        headline=sentences[0] if len(sentences) == 1 else f"{len(comparison.runs)} runs, against {comparison.reference}",
        sentences=sentences if len(sentences) > 1 else [],
        styles=[style_of(number) for number in range(len(comparison.runs))],
        cards=[_card(comparison, name) for name in comparison.measures],
        unrelated=_unrelated(comparison) if any(run.forgetting for run in comparison.runs) else [],
        charts=_charts(comparison.runs),
        facts=_facts(comparison.runs),
        short=short_hash,
    )
    return page + "\n"


def style_of(number: int) -> str:
    """Return the classes that colour a run's bar and line."""
    return f"r{number % COLOURS}" + (" dashed" if number >= COLOURS else "")


def _card(comparison: Comparison, name: str) -> RunsCard:
    told, values = shown(name), [run.scores.get(name) for run in comparison.runs]
    placed = [
        (style_of(at), score.tuned, score.interval) if score else (style_of(at), None, None) for at, score in enumerate(values)
    ]
    names = [run.name for run in comparison.runs]
    return RunsCard(told.label, told.meaning, bars(placed, told, names), _said(comparison, name))


def _unrelated(comparison: Comparison) -> list[RunsCard]:
    placed: list[tuple[str, float | None, Ends]] = []
    for at, run in enumerate(comparison.runs):
        ends = run.forgetting.get("interval")
        placed.append((style_of(at), run.forgetting.get("nll"), (ends[0], ends[1]) if ends else None))
    own = [_forgot(run) for run in comparison.runs if run.forgetting]
    names = [run.name for run in comparison.runs]
    cards = [RunsCard("Loss, each run against its own base", UNRELATED_SHOWN.meaning, bars(placed, UNRELATED_SHOWN, names), own)]
    between_runs = _said(comparison, UNRELATED)
    if between_runs:
        cards.append(RunsCard(f"The same text, against {comparison.reference}", "less forgotten is better", [], between_runs))
    return cards


def _forgot(run: ComparedRun) -> Said:
    """Return what a run's own base says of it."""
    found = run.forgetting
    verdict = found.get("verdict", "") if found["base_nll"] is not None else ""
    if not verdict:
        return Said(run.name, "", "not compared", "even", "with its base, which was not scored on this text.")
    change = found["nll"] - found["base_nll"]
    ends = found.get("difference")
    words = f"{'+' if change > 0 else ''}{LOSS(change)}{between((ends[0], ends[1]) if ends else None, LOSS)} against its own base."
    return Said(run.name, MARKS[verdict], verdict, css_of(verdict), words)


def _said(comparison: Comparison, name: str) -> list[Said]:
    return [_of_difference(one) for one in comparison.differences if one.measure == name]


def _of_difference(one: Difference) -> Said:
    if one.verdict is None:
        return Said(one.run, "", "not paired", "even", f"with {one.reference}: {one.unpaired}.")
    return Said(one.run, MARKS[one.verdict], one.verdict, css_of(one.verdict), one.words)


def _charts(runs: Sequence[ComparedRun]) -> list[Chart]:
    held_out = [
        Line(style_of(at), [(float(step), nll) for step, nll in run.held_out], dots=True, label=f"{run.name}:")
        for at, run in enumerate(runs)
        if run.held_out
    ]
    drawn = [
        ("Training loss, nats per token, running mean", _lines(runs, lambda curve: smoothed(curve.loss))),
        ("Held-out loss, nats per token", held_out),
        ("Gradient norm, running mean", _lines(runs, lambda curve: smoothed(curve.grad_norm))),
        ("Learning rate", _lines(runs, lambda curve: curve.learning_rate)),
    ]
    legend = [(style_of(at), run.name) for at, run in enumerate(runs)]
    return [
        Chart(heading, Markup(line_chart(lines, "step", "", f"{heading} of {len(lines)} runs")), legend)
        for heading, lines in drawn
        if lines
    ]


def _lines(runs: Sequence[ComparedRun], values: Callable[[Curve], Sequence[float]]) -> list[Line]:
    return [
        Line(style_of(at), list(zip(map(float, run.curve.step), values(run.curve), strict=True)))
        for at, run in enumerate(runs)
        if run.curve is not None
    ]


def _facts(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    return [
        ("base", [run.base_model for run in runs]),
        ("adapter", [run.adapter for run in runs]),
        ("trained parameters", [f"{run.trained_parameters:,}" for run in runs]),
        ("held-out rows", [f"{run.held_out_rows:,}" for run in runs]),
        ("steps", [f"{run.steps:,}" for run in runs]),
        ("trained tokens", [f"{run.trained_tokens:,}" for run in runs]),
        ("time of the whole run", [duration(run.seconds) for run in runs]),
        ("peak memory", [f"{run.peak_bytes / 2**20:,.0f} MiB" for run in runs]),
    ]
