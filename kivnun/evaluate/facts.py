"""Facts of a run for its report: what was read, trained and taken, what the data were found to hold, and what had been planned.

All of it comes from the record and the manifest; what a run did not tell is left out. Next: `report.py`, `compare.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from kivnun.artifacts import read_manifest
from kivnun.errors import IntegrityError
from kivnun.events import AdapterOpened, BaseLoaded, DataLoaded, Event, Planned, RunFinished, StepDone

EventT = TypeVar("EventT", bound=Event)

# What the record calls a finding -> what people read.
FINDINGS = {
    "duplicates": "training rows equal to an earlier one",
    "near_duplicates": "training rows nearly equal to an earlier one",
    "overlap": "held-out rows that are also training rows",
    "near_overlap": "held-out rows nearly equal to a training row",
    "problems": "rows with a problem",
}


@dataclass(frozen=True, slots=True)
class Findings:
    """What looking at the rows brought up: counts by words, and how long rows are: (most tokens, training rows, held-out rows)."""

    counts: dict[str, int]
    lengths: list[tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What was predicted before the base was loaded, and what it came to; None for what is not known (yet). `parts` are bytes."""

    parts: dict[str, int]
    peak_bytes: int
    seconds: float | None
    steps: int
    actual_peak_bytes: int | None
    actual_seconds: float | None
    actual_steps: int | None


def findings_of(events: Sequence[Event]) -> Findings | None:
    """Return what was found in the data; None where the record tells of none, as older ones do not."""
    data = last_of(events, DataLoaded)
    if data is None or not data.findings:
        return None
    counts = {FINDINGS.get(name, name.replace("_", " ")): value for name, value in data.findings.items() if type(value) is int}
    reasons = cast(dict[str, int], data.findings.get("reasons", {}))
    counts |= {f"of them: {reason}": rows for reason, rows in reasons.items()}
    lengths = cast(list[list[int]], data.findings.get("lengths", []))
    return Findings(counts, [(most, train, held_out) for most, train, held_out in lengths])


def plan_of(events: Sequence[Event]) -> Plan | None:
    """Return the newest plan beside what the run took; None where none was made."""
    planned, finished = last_of(events, Planned), last_of(events, RunFinished)
    if planned is None:
        return None
    return Plan(
        parts=planned.parts,
        peak_bytes=planned.peak_bytes,
        seconds=planned.seconds if math.isfinite(planned.seconds) else None,
        steps=planned.steps,
        actual_peak_bytes=finished.peak_bytes if finished is not None else None,
        actual_seconds=finished.seconds if finished is not None else None,
        actual_steps=finished.steps if finished is not None else None,
    )


def event_facts(events: Sequence[Event]) -> dict[str, dict[str, str]]:
    facts = {
        "Data": _data_facts(last_of(events, DataLoaded)),
        "Model": _model_facts(last_of(events, BaseLoaded), last_of(events, AdapterOpened)),
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
        "of them trained": f"{data.trained_tokens:,}{share(data.trained_tokens, data.train_tokens)}",
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
            "trainable parameters": f"{adapter.trainable_parameters:,}{share(adapter.trainable_parameters, total)}",
            "adapted modules": f"{adapter.sites:,}" + (f" ({modules})" if modules else ""),
        }
    return facts


def _training_facts(events: Sequence[Event]) -> dict[str, str]:
    steps = all_of(events, StepDone)
    if not steps:
        return {}
    seconds = math.fsum(step.seconds for step in steps)
    trained = sum(step.trained_tokens for step in steps)
    facts = {
        "steps": f"{len(steps):,} of {steps[-1].steps:,}",
        "epochs": f"{steps[-1].epoch + 1}",
        "trained tokens": f"{trained:,}",
        "last loss": f"{steps[-1].loss:.4f}",
        "time in steps": duration(seconds),
    }
    tokens, computed = sum(step.tokens for step in steps), sum(step.computed_tokens for step in steps)
    if computed < tokens:
        facts["tokens of rows"] = f"{tokens:,}"
        facts["of them computed"] = f"{computed:,}{share(computed, tokens)}: what rows begin with once"
    if seconds > 0:
        facts["tokens per second"] = f"{tokens / seconds:,.0f}"
    finished = last_of(events, RunFinished)
    if finished is not None:
        facts |= {"whole run": duration(finished.seconds), "peak memory": f"{finished.peak_bytes / 2**20:,.0f} MiB"}
        facts["finished"] = finished.time
    return facts


def manifest_facts(run_dir: Path) -> dict[str, dict[str, str]]:
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


def share(part: int, whole: int) -> str:
    return f" ({100 * part / whole:.2f} %)" if whole else ""


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def all_of(events: Sequence[Event], kind: type[EventT]) -> list[EventT]:
    return [event for event in events if isinstance(event, kind)]


def last_of(events: Sequence[Event], kind: type[EventT]) -> EventT | None:
    found = all_of(events, kind)
    return found[-1] if found else None
