"""The showcase as one HTML file: measured bars, published bars, and in words what follows; a function of showcase.json alone.

No script, nothing loaded from anywhere; Jinja escapes every value but the charts. Next: `page_template.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from kivnun.evaluate.page_template import STYLE
from kivnun.showcase.bars import Bar, Group, grouped_bars
from kivnun.showcase.page_template import MORE_STYLE, PAGE
from kivnun.showcase.published import NOT_KNOWN, PUBLISHED, SOURCE

LABELS = {"robust": "Robust", "mc1": "MC1", "mc2": "MC2"}
CHIPS = {"better": ("▲", "good"), "worse": ("▼", "bad"), "no detectable difference": ("=", "even")}
# What is no result is neither better nor worse.
NEUTRAL = {"better": "higher", "worse": "lower", "no detectable difference": "no detectable difference"}
ARMS = ("tuned", "shuffled", "contaminated")


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart with its words; `lines` are (measure, difference in words, mark, verdict, CSS class of the chip)."""

    title: str
    meaning: str
    style: str
    svg: Markup
    lines: list[tuple[str, str, str, str, str]]


@dataclass(frozen=True, slots=True)
class Example:
    """One test question with the answer that each model finds likeliest: (model, answer, whether it is true)."""

    kind: str
    question: str
    best: str
    picks: list[tuple[str, str, bool]]


def render(record: Mapping[str, Any]) -> str:
    """Return the page of a record (`showcase.json`)."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return (
        environment.from_string(PAGE).render(
            r=record,
            style=Markup(STYLE + MORE_STYLE),
            headline=headline(record["figures"]),
            conclusions=conclusions(record),
            panels=[_measured(record, arm) for arm in ARMS],
            published=[_published(one.model, (one.robust, one.mc1, one.mc2)) for one in PUBLISHED],
            source=SOURCE,
            not_known=NOT_KNOWN,
            kinds=_kinds(record),
            forgetting=_forgetting(record),
            examples=_examples(record),
            percent=_percent,
        )
        + "\n"
    )


def headline(figures: Mapping[str, Any]) -> str:
    """Return the whole story in one line of figures."""
    base, tuned, contaminated = (100 * figures[arm]["mc1"]["value"] for arm in ("base", "tuned", "contaminated"))
    return f"MC1 from {base:.1f} to {tuned:.1f} on topics never trained; to {contaminated:.1f} by training on the test"


def conclusions(record: Mapping[str, Any]) -> list[str]:
    """Return what a reader should conclude, in sentences that follow from the figures' verdicts."""
    figures, kinds = record["figures"], record["by_kind"]
    tuned, shuffled, contaminated = (figures[arm]["mc1"] for arm in ARMS)
    said = {
        "better": "Tuning helped where the test was kept apart",
        "worse": "Tuning made answers worse",
        "no detectable difference": "Tuning made no detectable difference",
    }
    count = record["test_questions"]
    lines = [f"{said[tuned['verdict']]}: MC1 {_change(tuned)} on {count} questions whose topics are in no training row."]
    if shuffled["verdict"] == "better":
        lines.append(
            f"The control with shuffled answers improved too (MC1 {_change(shuffled)}): part of the gain is form, not truth."
        )
    else:
        lines.append(
            f"The control with shuffled answers did not improve (MC1 {_change(shuffled)}): what helped was which answer is true, "
            "not the form of replies."
        )
    if figures["shuffled"]["robust"]["verdict"] == "better":
        lines.append(
            f"Robust accuracy needs care: it rose in the control too ({_change(figures['shuffled']['robust'])}, tuned "
            f"{_change(figures['tuned']['robust'])}). To reply with one of the listed options, the same one in any order, is form."
        )
    lines.append(
        f"Training on the test questions themselves gives MC1 {_percent(contaminated['value'])} and MC2 "
        f"{_percent(figures['contaminated']['mc2']['value'])}, from the same base with the same settings. Such a figure can be had "
        "without learning anything that carries over."
    )
    lines.append(_by_heart(kinds))
    lines += _paid(record["forgetting"])
    lines.append(
        "The published figures have that look: MC2 of 98.5 to 99.8 for every size. This does not prove that those models were "
        "trained on the test. It cannot be told from what was published, and so they should not be read as a gain in truthfulness."
    )
    return lines


def _paid(forgetting: Mapping[str, Any]) -> list[str]:
    one = forgetting["tuned"]["exact_match"]
    if one["verdict"] != "worse":
        return []
    before, after = _percent(forgetting["base"]["exact_match"]["value"]), _percent(one["value"])
    return [
        f"It was paid for: a task that was not trained, English values into Hebrew, went from {before} exact replies to {after}."
    ]


def _by_heart(kinds: Mapping[str, Any]) -> str:
    gains = {kind: arms["tuned"]["mc1"] - arms["base"]["mc1"] for kind, arms in kinds.items()}
    best = max(gains, key=lambda kind: gains[kind])
    first = " to ".join(_percent(kinds[best][arm]["mc1"]) for arm in ("base", "tuned"))
    line = f"A skill carries over to new topics (“{best}”: MC1 {first})"
    if "weekday" not in kinds:
        return line + "."
    by_arm = {arm: _percent(kinds["weekday"][arm]["mc1"]) for arm in ("base", "tuned", "contaminated")}
    return (
        f"{line}. Facts that a small model can only know by heart do not (“weekday”: {by_arm['base']} to {by_arm['tuned']}; one in "
        f"seven is chance), unless they were in training ({by_arm['contaminated']})."
    )


def _measured(record: Mapping[str, Any], arm: str) -> Panel:
    base, tuned, about = record["figures"]["base"], record["figures"][arm], record["arms"][arm]
    groups = [
        Group(label, [_bar("base", "base", base[name]), _bar(about["title"].lower(), arm, tuned[name])])
        for name, label in LABELS.items()
    ]
    lines = [(label, _change(tuned[name]), *_chip(tuned[name]["verdict"], arm)) for name, label in LABELS.items()]
    return Panel(about["title"], about["meaning"], arm, Markup(grouped_bars(groups, about["title"])), lines)


def _bar(name: str, style: str, figure: Mapping[str, Any]) -> Bar:
    low, high = figure["interval"]
    return Bar(name, style, 100 * figure["value"], (100 * low, 100 * high))


def _published(model: str, measures: Sequence[tuple[float, float]]) -> Panel:
    groups = [
        Group(label, [Bar("base", "base", base), Bar("tuned", "published", tuned)])
        for label, (base, tuned) in zip(("Robustness", "MC1", "MC2"), measures, strict=True)
    ]
    return Panel(model, "", "published", Markup(grouped_bars(groups, f"{model}, as published")), [])


def _chip(verdict: str, arm: str) -> tuple[str, str, str]:
    mark, css = CHIPS[verdict]
    return (mark, verdict, css) if arm == "tuned" else (mark, NEUTRAL[verdict], "even")


def _change(figure: Mapping[str, Any]) -> str:
    low, high = (_points(end) for end in figure["difference_interval"])
    return f"{_points(figure['difference'])} points [{low} to {high}]"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _kinds(record: Mapping[str, Any]) -> list[tuple[str, str, int, list[str]]]:
    """Return (kind, skill, questions, MC1 of base, tuned, shuffled, contaminated, robust accuracy of base and tuned)."""
    rows: list[tuple[str, str, int, list[str]]] = []
    for kind, arms in record["by_kind"].items():
        about = record["kinds"][kind]
        cells = [arms[arm]["mc1"] for arm in ("base", *ARMS)] + [arms[arm]["robust"] for arm in ("base", "tuned")]
        rows.append((kind, about["skill"], about["test"], [f"{100 * value:.0f}" for value in cells]))
    return rows


def _forgetting(record: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return (what, [(value, difference with its interval and verdict) of base and each arm])."""
    names = {
        "exact_match": "English values into Hebrew, replies that are exact",
        "nll": "the same, loss (nats per token)",
        "text_nll": "documentation text, loss (nats per token)",
    }
    rows: list[tuple[str, list[tuple[str, str]]]] = []
    for name, label in names.items():
        share = name == "exact_match"
        shown = (lambda value: _percent(value)) if share else (lambda value: f"{value:.3f}")
        cells = [(shown(record["forgetting"]["base"][name]["value"]), "")]
        for arm in ARMS:
            one = record["forgetting"][arm][name]
            ends = [
                _points(end) if share else f"{end:+.3f}".replace("-", "−")
                for end in (one["difference"], *one["difference_interval"])
            ]
            cells.append((shown(one["value"]), f"{ends[0]} [{ends[1]} to {ends[2]}]"))
        rows.append((label, cells))
    return rows


def _examples(record: Mapping[str, Any]) -> list[Example]:
    """Return the first question of each kind with what base, first tuned and first contaminated run find likeliest."""
    found: dict[str, Example] = {}
    models = {"base": "base", "tuned": "tuned-1", "trained on the test": "contaminated-1"}
    for number, question in enumerate(record["questions"]):
        if question["kind"] in found:
            continue
        answers = [*question["true"], *question["false"]]
        picks: list[tuple[str, str, bool]] = []
        for label, name in models.items():
            values = record["log_probs"][name]["open"][number]
            likeliest = answers[max(range(len(answers)), key=lambda place: values[place])]
            picks.append((label, likeliest, likeliest in question["true"]))
        found[question["kind"]] = Example(question["kind"], question["question"], question["true"][0], picks)
    return list(found.values())
