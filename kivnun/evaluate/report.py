"""The report of a run: what was asked, what happened, and whether the tuned model is better, from the run folder alone.

`report.json` is read from `events.jsonl`, the specs and `manifest.json`; `report.html` is made from the values of
`report.json` and nothing else. Works for runs that failed or were interrupted too: what is not known is left out.
Next: `facts.py` (what a run tells of itself), `page.py` (the HTML).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from kivnun.artifacts import atomic_write
from kivnun.errors import InterruptedRun
from kivnun.evaluate.facts import Findings, Plan, all_of, event_facts, findings_of, last_of, manifest_facts, plan_of
from kivnun.evaluate.intervals import Verdict, verdict_of
from kivnun.evaluate.metrics import DIFFERENCE, higher_is_better
from kivnun.evaluate.wording import LOSS, Ends, between, forgetting_in_words, in_words
from kivnun.events import (
    Evaluated,
    Event,
    Resumed,
    RunFailed,
    RunFinished,
    RunInterrupted,
    RunStarted,
    StepDone,
    Warned,
    read_events,
)

# A curve holds at most this many points: more cannot be seen, and a long run would make a page of megabytes.
CURVE_POINTS = 400
UNCOMPARED = {
    "succeeded": "there are no held-out rows",
    "failed": "the run failed",
    "interrupted": "the run was interrupted",
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One measure of base and tuned with 95 % intervals (None: fewer than ten rows), what their paired difference says, and that
    in a sentence."""

    name: str
    base: float | None
    tuned: float | None
    base_interval: Ends
    tuned_interval: Ends
    difference_interval: Ends
    verdict: Verdict | None
    words: str


@dataclass(frozen=True, slots=True)
class Unrelated:
    """What base and tuned give to text that has nothing to do with the task. `by_kind` is (kind of text, base, tuned)."""

    source: str
    rows: int
    truncated: int
    base: float | None
    tuned: float | None
    base_interval: Ends
    tuned_interval: Ends
    difference_interval: Ends
    verdict: str | None
    words: str
    by_kind: list[tuple[str, float | None, float | None]]


@dataclass(frozen=True, slots=True)
class Curve:
    """The course of training. Each point is the mean over `steps_per_point` steps and stands at the last of them."""

    steps_per_point: int
    step: list[int]
    loss: list[float]
    learning_rate: list[float]
    grad_norm: list[float]
    tokens_per_s: list[float]


@dataclass(frozen=True, slots=True)
class SamplePair:
    """One held-out row with both replies; None where a model was not asked."""

    prompt: str
    reference: str
    base: str | None
    tuned: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """All that the page shows. `facts` maps a heading to labelled texts; `given` is the spec as its user wrote it, `spec` with
    every default; `stopped` says why a run has no result."""

    version: int
    run: str
    status: str
    headline: str
    detail: str
    stopped: str
    figures: list[Figure]
    forgetting: Unrelated | None
    held_out: list[tuple[int, float]]
    curve: Curve | None
    samples: list[SamplePair]
    findings: Findings | None
    plan: Plan | None
    facts: dict[str, dict[str, str]]
    notes: list[str]
    given: str
    spec: str


def write_report(run_dir: Path) -> Path:
    """Write `report.json` and `report.html` into the run folder; return the page's path.

    Raises RunFolderError when there is no run, IntegrityError when its record is damaged, StorageError.
    """
    from kivnun.evaluate.page import render

    report = read_report(run_dir)
    atomic_write(run_dir / "report.json", json.dumps(asdict(report), ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    atomic_write(run_dir / "report.html", render(report))
    return run_dir / "report.html"


def read_report(run_dir: Path) -> Report:
    """Return the report of the run in a folder. Raises as `write_report`."""
    events = read_events(run_dir / "events.jsonl")
    figures, forgetting, status = figures_of(events), forgetting_of(events), status_of(events)
    headline, detail = _verdict_in_words(figures, last_of(events, Evaluated), status)
    return Report(
        version=2,
        run=run_dir.resolve().name,
        status=status,
        headline=headline,
        detail=f"{detail}{_forgot(forgetting)}",
        stopped=_stopped(events, status),
        figures=figures,
        forgetting=forgetting,
        held_out=held_out_of(events),
        curve=curve_of(events),
        samples=_samples(events),
        findings=findings_of(events),
        plan=plan_of(events),
        facts={**event_facts(events), **manifest_facts(run_dir)},
        notes=_notes(events),
        given=_text_of(run_dir / "spec.yaml"),
        spec=_text_of(run_dir / "resolved.yaml"),
    )


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


# --- figures and verdict -----------------------------------------------------------------------------------------------------


def figures_of(events: Sequence[Event]) -> list[Figure]:
    """Return every measure of the newest scores of base and tuned."""
    base, tuned = _evaluation(events, "base"), _evaluation(events, "tuned")
    base_figures, tuned_figures = _named(base), _named(tuned)
    return [_figure(name, base, tuned) for name in {**tuned_figures, **base_figures}]


def _figure(name: str, base: Evaluated | None, tuned: Evaluated | None) -> Figure:
    before, after = _named(base).get(name), _named(tuned).get(name)
    ends = tuned.intervals.get(name + DIFFERENCE) if tuned else None
    both = before is not None and after is not None and tuned is not None and _compared(tuned)
    return Figure(
        name=name,
        base=before,
        tuned=after,
        base_interval=base.intervals.get(name) if base else None,
        tuned_interval=tuned.intervals.get(name) if tuned else None,
        difference_interval=ends,
        verdict=verdict_of(ends, higher_is_better(name)) if both else None,
        words=in_words(name, before, after, ends) if both and before is not None and after is not None else "",
    )


def _compared(tuned: Evaluated) -> bool:
    """Return whether a score was held against the base's; those on the way through training are not."""
    return "nll" not in tuned.intervals or any(name.endswith(DIFFERENCE) for name in tuned.intervals)


def forgetting_of(events: Sequence[Event]) -> Unrelated | None:
    """Return what the newest scores of base and tuned say of unrelated text; None where none was scored."""
    scored = {event.which: event.forgetting for event in all_of(events, Evaluated) if event.forgetting}
    base, tuned = (cast(dict[str, Any], scored.get(which, {})) for which in ("base", "tuned"))
    told = tuned or base
    if not told:
        return None
    before, after, ends = base.get("nll"), tuned.get("nll"), _ends(tuned.get("difference"))
    kinds = {**base.get("by_kind", {}), **tuned.get("by_kind", {})}
    return Unrelated(
        source=told["source"],
        rows=told["rows"],
        truncated=told["truncated"],
        base=before,
        tuned=after,
        base_interval=_ends(base.get("interval")),
        tuned_interval=_ends(tuned.get("interval")),
        difference_interval=ends,
        verdict=tuned.get("verdict") if before is not None else None,
        words=forgetting_in_words(before, after, ends) if before is not None and after is not None else "",
        by_kind=[(kind, base.get("by_kind", {}).get(kind), tuned.get("by_kind", {}).get(kind)) for kind in kinds],
    )


def _forgot(forgetting: Unrelated | None) -> str:
    """Return what the sentence below the headline adds where something was forgotten: it counts in no measure."""
    if forgetting is None or forgetting.verdict != "forgot" or forgetting.base is None or forgetting.tuned is None:
        return ""
    change, ends = LOSS(forgetting.tuned - forgetting.base), between(forgetting.difference_interval, LOSS)
    return f" But it forgot: text that has nothing to do with the task costs {change} nats per token more{ends}."


def _ends(value: Sequence[float] | None) -> Ends:
    return None if value is None else (value[0], value[1])


def _evaluation(events: Sequence[Event], which: str) -> Evaluated | None:
    return next((event for event in reversed(all_of(events, Evaluated)) if event.which == which), None)


def _named(evaluated: Evaluated | None) -> dict[str, float]:
    return {} if evaluated is None else {"nll": evaluated.nll, **evaluated.metrics}


def _verdict_in_words(figures: Sequence[Figure], last: Evaluated | None, status: str) -> tuple[str, str]:
    """Return the headline and one sentence below it."""
    verdicts = [figure.verdict for figure in figures if figure.verdict is not None]
    rows = f"{last.rows:,} held-out rows" if last is not None else "held-out rows"
    if not verdicts:
        return "No verdict", f"Base and tuned model were not compared: {UNCOMPARED.get(status, 'the run has not come to its end')}."
    told = [verdict for verdict in verdicts if verdict != "too few rows"]
    better, worse = told.count("better"), told.count("worse")
    if not told:
        return "Too few rows for a verdict", f"With {rows} an interval would be guesswork; hold out ten or more."
    if better == len(told):
        return "Better than the base", f"On {rows} every measure improved, and no 95 % interval of a difference reaches zero."
    if worse == len(told):
        return "Worse than the base", f"On {rows} every measure got worse, and no 95 % interval of a difference reaches zero."
    if not better and not worse:
        return "No detectable difference", f"On {rows} the 95 % interval of every difference holds zero."
    if not worse:
        return f"Better on {better} of {len(told)} measures", f"On {rows} the others show no detectable difference."
    if not better:
        return f"Worse on {worse} of {len(told)} measures", f"On {rows} the others show no detectable difference."
    return "A mixed result", f"On {rows} {better} of {len(told)} measures got better and {worse} got worse."


# --- curve, samples, notes ---------------------------------------------------------------------------------------------------


def held_out_of(events: Sequence[Event]) -> list[tuple[int, float]]:
    """Return (step, held-out loss) of each time it was measured."""
    return [(event.step, event.nll) for event in all_of(events, Evaluated) if math.isfinite(event.nll)]


def curve_of(events: Sequence[Event]) -> Curve | None:
    """Return the course of training, None before the first step."""
    steps = [step for step in all_of(events, StepDone) if math.isfinite(step.loss) and math.isfinite(step.grad_norm)]
    if not steps:
        return None
    size = math.ceil(len(steps) / CURVE_POINTS)
    groups = [steps[start : start + size] for start in range(0, len(steps), size)]
    return Curve(
        steps_per_point=size,
        step=[group[-1].step for group in groups],
        loss=[_mean([step.loss for step in group]) for group in groups],
        learning_rate=[_mean([step.learning_rate for step in group]) for group in groups],
        grad_norm=[_mean([step.grad_norm for step in group]) for group in groups],
        tokens_per_s=[_speed(group) for group in groups],
    )


def _speed(steps: Sequence[StepDone]) -> float:
    seconds = math.fsum(step.seconds for step in steps)
    return sum(step.tokens for step in steps) / seconds if seconds > 0 else 0.0


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _samples(events: Sequence[Event]) -> list[SamplePair]:
    """Pair the replies of base and tuned to the same row."""
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for which in ("base", "tuned"):
        with_samples = [event for event in all_of(events, Evaluated) if event.which == which and event.samples]
        for sample in cast(list[dict[str, str]], with_samples[-1].samples) if with_samples else []:
            pairs.setdefault((sample["prompt"], sample["reference"]), {})[which] = sample["reply"]
    return [
        SamplePair(prompt, reference, replies.get("base"), replies.get("tuned")) for (prompt, reference), replies in pairs.items()
    ]


def _notes(events: Sequence[Event]) -> list[str]:
    notes: list[str] = []
    for event in events:
        if isinstance(event, Warned):
            notes.append(event.message)
        elif isinstance(event, Resumed):
            notes.append(f"Resumed at step {event.step}." if event.path else "Started over: there was no checkpoint yet.")
        elif isinstance(event, RunFailed) and event.code != InterruptedRun.code:
            notes.append(f"Failed ({event.code}): {event.message}")
        elif isinstance(event, RunInterrupted):
            notes.append(f"Interrupted by the user after step {event.step}.")
    return list(dict.fromkeys(notes))


def _stopped(events: Sequence[Event], status: str) -> str:
    """Return why a run that did not end well has no result, and what to do; "" for one that did."""
    again = "The same command with --resume goes on from the newest checkpoint."
    if status == "failed" and (failed := last_of(events, RunFailed)) is not None:
        return f"Failed ({failed.code}): {failed.message}"
    if status == "interrupted" and (stopped := last_of(events, RunInterrupted)) is not None:
        return f"Interrupted by the user after step {stopped.step:,}. {again}"
    return "" if status == "succeeded" else f"This run has not come to its end. {again}"


def status_of(events: Sequence[Event]) -> str:
    """Return succeeded, failed, interrupted or not finished, by the last event that ends a run or begins one."""
    names = {RunFailed: "failed", RunInterrupted: "interrupted", RunStarted: "not finished"}
    for event in reversed(events):
        if isinstance(event, RunFinished):
            return event.status
        if isinstance(event, RunFailed) and event.code == InterruptedRun.code:
            return "interrupted"  # the line before says after which step
        if type(event) in names:
            return names[type(event)]
    return "not finished"
