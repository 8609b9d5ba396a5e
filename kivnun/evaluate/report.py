"""The report of a run: what was asked, what happened, and whether the tuned model is better, from the run folder alone.

`report.json` is read from `events.jsonl`, `resolved.yaml` and `manifest.json`; `report.html` is made from the values of
`report.json` and nothing else. Works for runs that failed or were interrupted too: what is not known is left out.
Next: `page.py` (the HTML).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from kivnun.artifacts import atomic_write, read_manifest
from kivnun.errors import IntegrityError
from kivnun.evaluate.intervals import Verdict, verdict_of
from kivnun.evaluate.metrics import DIFFERENCE, higher_is_better
from kivnun.events import (
    AdapterOpened,
    BaseLoaded,
    DataLoaded,
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

EventT = TypeVar("EventT", bound=Event)
Ends = tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Figure:
    """One measure of base and tuned with 95 % intervals (None: fewer than ten rows), and what their paired difference says."""

    name: str
    base: float | None
    tuned: float | None
    base_interval: Ends
    tuned_interval: Ends
    difference_interval: Ends
    verdict: Verdict | None


@dataclass(frozen=True, slots=True)
class Curve:
    """The course of training. Each point is the mean over `steps_per_point` steps and stands at the last of them."""

    steps_per_point: int
    step: list[int]
    loss: list[float]
    learning_rate: list[float]
    grad_norm: list[float]


@dataclass(frozen=True, slots=True)
class SamplePair:
    """One held-out row with both replies; None where a model was not asked."""

    prompt: str
    reference: str
    base: str | None
    tuned: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """All that the page shows. `facts` maps a heading to labelled texts."""

    version: int
    run: str
    status: str
    headline: str
    detail: str
    figures: list[Figure]
    held_out: list[tuple[int, float]]
    curve: Curve | None
    samples: list[SamplePair]
    facts: dict[str, dict[str, str]]
    notes: list[str]
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
    figures = _figures(events)
    status = _status(events)
    headline, detail = _verdict_in_words(figures, _last(events, Evaluated), status)
    resolved = run_dir / "resolved.yaml"
    return Report(
        version=1,
        run=run_dir.resolve().name,
        status=status,
        headline=headline,
        detail=detail,
        figures=figures,
        held_out=[(event.step, event.nll) for event in _all(events, Evaluated) if math.isfinite(event.nll)],
        curve=_curve(_all(events, StepDone)),
        samples=_samples(events),
        facts={**_event_facts(events), **_manifest_facts(run_dir)},
        notes=_notes(events),
        spec=resolved.read_text(encoding="utf-8") if resolved.is_file() else "",
    )


# --- figures and verdict -----------------------------------------------------------------------------------------------------


def _figures(events: Sequence[Event]) -> list[Figure]:
    base, tuned = _evaluation(events, "base"), _evaluation(events, "tuned")
    base_figures, tuned_figures = _named(base), _named(tuned)
    return [
        Figure(
            name=name,
            base=base_figures.get(name),
            tuned=tuned_figures.get(name),
            base_interval=base.intervals.get(name) if base else None,
            tuned_interval=tuned.intervals.get(name) if tuned else None,
            difference_interval=tuned.intervals.get(name + DIFFERENCE) if tuned else None,
            verdict=_verdict(name, tuned) if name in base_figures and name in tuned_figures else None,
        )
        for name in {**tuned_figures, **base_figures}
    ]


def _evaluation(events: Sequence[Event], which: str) -> Evaluated | None:
    return next((event for event in reversed(_all(events, Evaluated)) if event.which == which), None)


def _named(evaluated: Evaluated | None) -> dict[str, float]:
    return {} if evaluated is None else {"nll": evaluated.nll, **evaluated.metrics}


def _verdict(name: str, tuned: Evaluated | None) -> Verdict:
    return verdict_of(tuned.intervals.get(name + DIFFERENCE) if tuned else None, higher_is_better(name))


def _verdict_in_words(figures: Sequence[Figure], last: Evaluated | None, status: str) -> tuple[str, str]:
    """Return the headline and one sentence below it."""
    verdicts = [figure.verdict for figure in figures if figure.verdict is not None]
    rows = f"{last.rows:,} held-out rows" if last is not None else "held-out rows"
    if not verdicts:
        reason = "there are no held-out rows" if status == "succeeded" else f"the run has {status}"
        return "No verdict", f"Base and tuned model were not compared: {reason}."
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


def _curve(steps: Sequence[StepDone]) -> Curve | None:
    steps = [step for step in steps if math.isfinite(step.loss) and math.isfinite(step.grad_norm)]
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
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _samples(events: Sequence[Event]) -> list[SamplePair]:
    """Pair the replies of base and tuned to the same row."""
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for which in ("base", "tuned"):
        with_samples = [event for event in _all(events, Evaluated) if event.which == which and event.samples]
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
        elif isinstance(event, RunFailed):
            notes.append(f"Failed ({event.code}): {event.message}")
        elif isinstance(event, RunInterrupted):
            notes.append(f"Interrupted by the user after step {event.step}.")
    return list(dict.fromkeys(notes))


def _status(events: Sequence[Event]) -> str:
    """Return succeeded, failed, interrupted or not finished, by the last event that ends a run or begins one."""
    names = {RunFailed: "failed", RunInterrupted: "interrupted", RunStarted: "not finished"}
    for event in reversed(events):
        if isinstance(event, RunFinished):
            return event.status
        if type(event) in names:
            return names[type(event)]
    return "not finished"


# --- facts -------------------------------------------------------------------------------------------------------------------


def _event_facts(events: Sequence[Event]) -> dict[str, dict[str, str]]:
    facts = {
        "Data": _data_facts(_last(events, DataLoaded)),
        "Model": _model_facts(_last(events, BaseLoaded), _last(events, AdapterOpened)),
        "Training": _training_facts(events),
    }
    return {heading: entries for heading, entries in facts.items() if entries}


def _data_facts(data: DataLoaded | None) -> dict[str, str]:
    if data is None:
        return {}
    return {
        "format": data.format,
        "training rows": f"{data.train_rows:,}",
        "held-out rows": f"{data.validation_rows:,}",
        "tokens, once through": f"{data.train_tokens:,}",
        "of them trained": f"{data.trained_tokens:,}{_share(data.trained_tokens, data.train_tokens)}",
        "rows skipped": f"{data.skipped:,}",
        "rows truncated": f"{data.truncated:,}",
    }


def _model_facts(base: BaseLoaded | None, adapter: AdapterOpened | None) -> dict[str, str]:
    facts: dict[str, str] = {}
    if base is not None:
        facts |= {"base": base.model, "parameters": f"{base.parameters:,}", "precision": base.precision}
    if adapter is not None:
        total = base.parameters if base is not None else 0
        modules = ", ".join(f"{name} × {count}" for name, count in adapter.modules.items())
        facts |= {
            "what is trained": adapter.kind,
            "trainable parameters": f"{adapter.trainable_parameters:,}{_share(adapter.trainable_parameters, total)}",
            "adapted modules": f"{adapter.sites:,}" + (f" ({modules})" if modules else ""),
        }
    return facts


def _training_facts(events: Sequence[Event]) -> dict[str, str]:
    steps = _all(events, StepDone)
    if not steps:
        return {}
    seconds = math.fsum(step.seconds for step in steps)
    trained = sum(step.trained_tokens for step in steps)
    facts = {
        "steps": f"{len(steps):,} of {steps[-1].steps:,}",
        "epochs": f"{steps[-1].epoch + 1}",
        "trained tokens": f"{trained:,}",
        "last loss": f"{steps[-1].loss:.4f}",
        "time in steps": _duration(seconds),
    }
    tokens, computed = sum(step.tokens for step in steps), sum(step.computed_tokens for step in steps)
    if computed < tokens:
        facts["tokens of rows"] = f"{tokens:,}"
        facts["of them computed"] = f"{computed:,}{_share(computed, tokens)}: what rows begin with once"
    if seconds > 0:
        facts["tokens per second"] = f"{tokens / seconds:,.0f}"
    finished = _last(events, RunFinished)
    if finished is not None:
        facts |= {"whole run": _duration(finished.seconds), "peak memory": f"{finished.peak_bytes / 2**20:,.0f} MiB"}
        facts["finished"] = finished.time
    return facts


def _manifest_facts(run_dir: Path) -> dict[str, dict[str, str]]:
    """Return the manifest's entries as they are; a run without one (not finished, or damaged) says so."""
    try:
        manifest = read_manifest(run_dir)
    except IntegrityError as error:
        return {"Manifest": {"not readable": error.message}}
    files = cast(dict[str, dict[str, Any]], manifest.pop("files"))
    facts = {"Manifest": {name: _text(value) for name, value in manifest.items() if not isinstance(value, Mapping)}}
    for name, value in manifest.items():
        if isinstance(value, Mapping):
            facts[name.replace("_", " ").capitalize()] = _flat(cast(Mapping[str, Any], value))
    facts["Files (SHA-256)"] = {name: str(entry["sha256"]) for name, entry in files.items()}
    return {heading: entries for heading, entries in facts.items() if entries}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(cast(Mapping[str, Any], value), f"{prefix}{name}.")
        else:
            flat[prefix + name] = _text(value)
    return flat


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _share(part: int, whole: int) -> str:
    return f" ({100 * part / whole:.2f} %)" if whole else ""


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _all(events: Sequence[Event], kind: type[EventT]) -> list[EventT]:
    return [event for event in events if isinstance(event, kind)]


def _last(events: Sequence[Event], kind: type[EventT]) -> EventT | None:
    found = _all(events, kind)
    return found[-1] if found else None
