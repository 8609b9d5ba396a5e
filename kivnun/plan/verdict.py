"""Whether a run fits, and how its passes are computed so that it does: what the plan decides.

    spec + rows + base + device -> resolved as usual -> fits? else shorter passes -> else layers computed again -> else refused

Whatever the spec leaves open of its passes is decided here; what it says is kept. Where all fits, nothing is changed. The
refusal names changes of the spec that would make it fit, each foretold by the same law. Next: `forecast.py`, `changes.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from kivnun.errors import WontFitError
from kivnun.plan.advise import words_of_bytes
from kivnun.plan.cautions import FITS_BARELY, cautions, of_lengths
from kivnun.plan.devices import Device
from kivnun.plan.forecast import Forecast, Here, Steps, forecast, steps_of
from kivnun.plan.rows import RunRows
from kivnun.plan.sizes import Sizes
from kivnun.spec import MultiProcessSpec, PassChoice, ResolveFacts, TuneSpec, resolve

SHORT_PASS = 512  # tokens: shorter ones save little and cost time


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be planned: a spec as it was given, what is known of data, base and machine, and the device.

    `sizes` is None for a base whose layers are not known, `unknown` says why. `turns_from` is the length above which rows take
    LongRoPE's long factors. `here` is what was found out about the machine and the base's files."""

    spec: TuneSpec
    facts: ResolveFacts
    rows: RunRows
    device: Device
    sizes: Sizes | None
    unknown: str = ""
    turns_from: int | None = None
    here: Here = field(default_factory=Here)


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the spec, as `--set` takes it, that makes the run fit, and what it takes then."""

    what: str
    overrides: tuple[str, ...]
    peak: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """A spec with every choice made and the reasons, what it will take, and whether that fits.

    `urgent` are the cautions that a run tells, too. `forecast` is None where nothing can be foretold: `unknown` says why. `limit`
    is what one process may have of the device's memory, in bytes."""

    spec: TuneSpec
    reasons: Mapping[str, str]
    steps: Steps
    forecast: Forecast | None
    unknown: str
    limit: float
    cautions: tuple[str, ...]
    urgent: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()

    @property
    def verdict(self) -> Literal["fits", "does_not_fit", "unknown"]:
        if self.forecast is None:
            return "unknown"
        return "fits" if self.forecast.peak <= self.limit else "does_not_fit"

    def figures(self) -> dict[str, Any] | None:
        """Return what is foretold, as a run's record holds it; None: nothing is."""
        if self.forecast is None:
            return None
        parts = {name: round(size) for name, size in self.forecast.parts.items()}
        seconds = self.forecast.seconds
        return {"peak_bytes": sum(parts.values()), "parts": parts, "seconds": round(seconds, 3), "steps": self.steps.count}

    def result(self) -> dict[str, Any] | None:
        """Return the same as JSON holds it, which has no NaN: null where seconds are not known."""
        figures = self.figures()
        return None if figures is None else {name: None if value != value else value for name, value in figures.items()}

    def refusal(self) -> WontFitError | None:
        """Return the error of a run that cannot fit, with the changes that would make it fit; None: it fits, or nobody knows."""
        if self.verdict != "does_not_fit" or self.forecast is None:
            return None
        largest = sorted(self.forecast.parts.items(), key=lambda part: -part[1])[:3]
        parts = ", ".join(f"{name} {words_of_bytes(size)}" for name, size in largest)
        return WontFitError(
            f"the run takes about {words_of_bytes(self.forecast.peak)} of memory at most, and {words_of_bytes(self.limit)} are "
            f"there (most of it: {parts})",
            hint=self._ways_out(),
        )

    def _ways_out(self) -> str:
        if not self.changes:
            return "no change of the spec makes it fit: take a smaller base, or a device with more memory"
        ways = [f"{' '.join(f'--set {_quoted(it)}' for it in way.overrides)} ({words_of_bytes(way.peak)})" for way in self.changes]
        return "it fits with " + ", or with ".join(ways)


def _quoted(override: str) -> str:
    return f"'{override}'" if " " in override else override


def chosen(question: Question) -> Plan:
    """Return the first way to compute the spec's passes that fits; where none does, the one that takes least. Without changes."""
    first = _planned(question, question.facts)
    if first.verdict != "does_not_fit" or question.facts.passes is not None:
        return first
    least = first
    for facts in _tighter(question, first):
        plan = _planned(question, facts)
        if plan.verdict == "fits":
            return plan
        least = min(least, plan, key=_peak)
    return least


def _tighter(question: Question, first: Plan) -> Iterator[ResolveFacts]:
    """Yield facts with shorter passes, then with layers computed again, as far as the spec leaves both open."""
    compute, usual = question.spec.compute, cast(int, first.spec.compute.micro_batch_tokens)
    reason = f"else the run would take {words_of_bytes(_peak(first))} of memory, and {words_of_bytes(first.limit)} are there"
    short, fewer = max(SHORT_PASS, question.rows.longest), None
    if compute.micro_batch_tokens is None:
        for tokens in dict.fromkeys((usual // 2, usual // 4, short)):
            if short <= tokens < usual:
                fewer = tokens
                yield replace(question.facts, passes=PassChoice(fewer, bool(compute.activation_checkpointing), reason))
    if compute.activation_checkpointing is None:
        yield replace(question.facts, passes=PassChoice(fewer, True, reason))


def _planned(question: Question, facts: ResolveFacts) -> Plan:
    spec, reasons = resolve(question.spec, facts)
    rows = question.rows
    steps, limit = steps_of(spec, rows), memory_of_a_process(spec, question.device)
    told = cautions(spec, rows, steps, facts.base_parameters, question.turns_from)
    urgent = tuple(of_lengths(spec, rows, question.turns_from))
    if question.sizes is None:
        return Plan(spec, reasons, steps, None, question.unknown, limit, told, urgent)
    found = forecast(spec, question.sizes, rows, steps, question.device, question.here)
    if limit >= found.peak > FITS_BARELY * limit:
        barely = f"{words_of_bytes(found.peak)} of {words_of_bytes(limit)} of memory are foretold, which may be off by a tenth"
        urgent = (*urgent, f"{barely}: close other programs, or lower compute.micro_batch_tokens")
        told = (*told, urgent[-1])
    return Plan(spec, reasons, steps, found, "", limit, told, urgent)


def memory_of_a_process(spec: TuneSpec, device: Device) -> float:
    """Return what one process of the run may have: a GPU each, or its part of a machine's memory."""
    if device.kind == "cuda" or not isinstance(spec.compute, MultiProcessSpec):
        return device.memory_bytes
    return device.memory_bytes / -(-spec.compute.processes // device.count)


def _peak(plan: Plan) -> float:
    assert plan.forecast is not None
    return plan.forecast.peak
