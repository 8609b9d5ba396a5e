"""Predicted beside measured: a table, a summary, and a dated page with a picture.

Next: `kivnun/plan/memory.py` and `time.py`, whose figures these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.engine.report import Section, machine
from benchmarks.plan.cases import MODELS, NEW_TOKENS, PROMPTS, SCORED_ROWS, SCORED_SHARE, Case
from benchmarks.plan.measure import FoundOnce, Record
from kivnun.plan.memory import COMPUTE_BYTES, Shape, peak_bytes
from kivnun.plan.techniques import adapter_of
from kivnun.plan.time import REFERENCE_FLOPS, generation_seconds, scoring_seconds, start_seconds, training_seconds, work_of

MB = 1e6
LARGE = 70e6  # parameters
WORDS = {
    "peak": "peak memory",
    "above": "peak above the idle process",
    "steps": "CPU time of the steps",
    "start": "CPU time before the first step",
    "whole": "CPU time up to the last step",
    "scoring": f"CPU time of scoring {SCORED_ROWS} rows",
    "replies": f"CPU time of {PROMPTS} replies of {NEW_TOKENS} tokens",
}
WITHIN = {"peak": 0.1, "above": 0.1, "steps": 0.2, "start": 0.2, "whole": 0.2, "scoring": 0.2, "replies": 0.2}
COLOURS = {"full": "#4c72b0", "lora": "#dd8452", "others": "#55a868"}


@dataclass(frozen=True, slots=True)
class Pair:
    """A figure, predicted and measured."""

    predicted: float
    measured: float

    @property
    def off(self) -> float:
        return self.predicted / self.measured - 1


@dataclass(frozen=True, slots=True)
class Compared:
    """A case's figures by name: bytes of the largest process, CPU seconds of all. `at_the_moment` is the prediction of the steps'
    seconds with the core's speed as it was between them."""

    case: Case
    pairs: dict[str, Pair]
    at_the_moment: Pair

    @property
    def large(self) -> bool:
        return MODELS[self.case.model].parameters >= LARGE


def compared(case: Case, processes: Sequence[dict[str, Any]], of: FoundOnce) -> Compared:
    """Return what was predicted of a case beside what its processes measured."""
    sizes, spec, count = case.sizes, adapter_of(case.kind), len(processes)
    speed = of.speed[case.precision if count == 1 else f"{case.precision} x {count}"]
    own = [lengths[::count] for lengths in case.step_lengths()]  # rows of one process
    work = work_of(own, case.pass_tokens, SCORED_SHARE)
    shape = Shape(
        case.precision,
        work.pass_tokens,
        recompute=case.recompute,
        processes=count,
        zero_stage=case.zero_stage,
        packed=case.packed,
    )
    whole = peak_bytes(sizes, spec, shape, idle=of.idle)
    idle, peak = (max(its[what] for its in processes) for what in ("idle", "peak"))
    reference = count * training_seconds(sizes, spec, shape, work)
    steps, start = reference / speed, count * start_seconds(sizes, spec, shape, speed=speed)
    began, stepped = (
        sum(map(of_one, processes)) for of_one in (lambda its: its["opened_cpu_s"], lambda its: sum(its["step_cpu_s"]))
    )
    pairs = {
        "peak": Pair(whole, peak),
        "above": Pair(whole - of.idle, peak - idle),
        "steps": Pair(steps, stepped),
        "start": Pair(start, began),
        "whole": Pair(start + steps, began + stepped),
    }
    if count == 1:
        flat = case.lengths()
        held_out = work_of([flat[:SCORED_ROWS]], case.pass_tokens, SCORED_SHARE)
        pairs["scoring"] = Pair(scoring_seconds(sizes, spec, shape, held_out, speed=speed), processes[0]["score_cpu_s"])
        asked = [length // 2 for length in flat[:PROMPTS]]
        told = generation_seconds(sizes, spec, shape, prompts=asked, new_tokens=NEW_TOKENS, speed=speed)
        pairs["replies"] = Pair(told, processes[0]["generate_cpu_s"])
    moment = median(flops for its in processes for flops in its["flops"]) / REFERENCE_FLOPS[COMPUTE_BYTES[case.precision]]
    return Compared(case, pairs, Pair(reference / moment, stepped))


def table(found: Sequence[Compared]) -> Section:
    """Return every case with the figures that are promised."""
    columns = [
        "configuration",
        "M",
        "peak MB",
        "predicted",
        "off",
        "above idle",
        "predicted",
        "off",
        "steps CPU s",
        "predicted",
        "off",
    ]
    return Section(f"{len(found)} configurations", columns, [_line(it, ("peak", "above", "steps")) for it in found])


def others(found: Sequence[Compared]) -> Section:
    """Return every case with what is predicted beside."""
    columns = ["configuration", "M"]
    for name in ("start", "whole", "scoring", "replies"):
        columns += [f"{name} CPU s", "predicted", "off"]
    return Section("The rest of a run", columns, [_line(it, ("start", "whole", "scoring", "replies")) for it in found])


def _line(it: Compared, names: Sequence[str]) -> list[str]:
    cells = [it.case.name, f"{MODELS[it.case.model].parameters / 1e6:.0f}"]
    for name in names:
        pair = it.pairs.get(name)
        if pair is None:
            cells += ["-", "-", "-"]
        else:
            unit, form = (MB, ",.0f") if name in ("peak", "above") else (1.0, ".2f")
            cells += [format(pair.measured / unit, form), format(pair.predicted / unit, form), f"{pair.off:+.1%}"]
    return cells


def summary(found: Sequence[Compared]) -> Section:
    """Return how many predictions are near enough, the usual error and the worst one: of all cases, and of the large models."""
    lines = []
    for name, words in WORDS.items():
        lines.append(_summed(words, WITHIN[name], [(it, it.pairs[name]) for it in found if name in it.pairs]))
        if name in ("peak", "above", "steps"):
            large = [(it, it.pairs[name]) for it in found if it.large]
            lines.append(_summed(f"{words}, {LARGE / 1e6:.0f} M parameters and more", WITHIN[name], large))
    moment = [(it, it.at_the_moment) for it in found]
    lines.append(_summed(f"{WORDS['steps']}, with the core's speed at the moment", WITHIN["steps"], moment))
    return Section("Summary", ["figure", "within", "how many", "median error", "worst", "where"], lines)


def _summed(words: str, within: float, pairs: Sequence[tuple[Compared, Pair]]) -> list[str]:
    if not pairs:
        return [words, f"{within:.0%}", "-", "-", "-", "-"]
    worst, pair = max(pairs, key=lambda it: abs(it[1].off))
    near = sum(abs(it.off) <= within for _, it in pairs)
    usual = median(abs(it.off) for _, it in pairs)
    return [words, f"{within:.0%}", f"{near} of {len(pairs)}", f"{usual:.1%}", f"{pair.off:+.1%}", worst.case.name]


def write(stem: Path, found: Sequence[Compared], record: Record, command: str) -> Path:
    """Write `stem`.md, .json and .svg; return the first."""
    facts = machine()
    told = {name: {what: asdict(pair) for what, pair in it.pairs.items()} for name, it in ((c.case.name, c) for c in found)}
    record.more = {"machine": facts, "command": command, "compared": told}
    record.save()
    _plot(stem.with_suffix(".svg"), found)
    of = record.found_once
    speeds = ", ".join(f"{speed:.2f} in {precision}" for precision, speed in of.speed.items() if precision[:4] in ("fp32", "bf16"))
    head = f"""\
# What the planner predicts, beside what runs take

{datetime.now(UTC):%Y-%m-%d}, made by `{command}`. {", ".join(f"{name}: {value}" for name, value in facts.items())}.

Each configuration is a fresh process (or two) that goes the way of `kivnun tune` on a model of Phi-3's shape with random weights
and on rows of random tokens, one thread each: `ROWS x LENGTH / tokens of a pass`, `~` for rows of many lengths, half of each row
trained. Peak memory is the kernel's count of resident bytes (of the largest process); idle is the same process before it has a
base. Seconds are of the CPU, user and system (of all processes together); those of steps include the first one.

None of these models, and none of these configurations, is among the points that the laws were fitted to
([plan_calibration_2026-11-27.json](plan_calibration_2026-11-27.json)). Before the first of them the planner looked once at the
machine: its core's speed ({speeds}, of the reference's) and an idle process ({of.idle / MB:.0f} MB).

![predicted against measured]({stem.with_suffix(".svg").name})
"""
    page = stem.with_suffix(".md")
    page.write_text(
        "\n".join([head, *(it.as_markdown() for it in (summary(found), table(found), others(found)))]), encoding="utf-8"
    )
    return page


def _plot(path: Path, found: Sequence[Compared]) -> None:
    """Write predicted against measured of the three figures that are promised, with their bands."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    matplotlib.rcParams["svg.hashsalt"] = "plan"
    figure, every = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    for axes, name in zip(every, ("peak", "above", "steps"), strict=True):
        unit, words, band = (1.0, "CPU s", WITHIN[name]) if name == "steps" else (MB, "MB", WITHIN[name])
        points = [(it.case.kind, it.pairs[name].measured / unit, it.pairs[name].predicted / unit) for it in found]
        for group, colour in COLOURS.items():
            its = [(x, y) for kind, x, y in points if (kind if kind in COLOURS else "others") == group]
            axes.loglog(*zip(*its, strict=True), "o", ms=5, alpha=0.75, color=colour, label=group) if its else None
        both = [value for _, *pair in points for value in pair]
        ends = [min(both) / 1.2, max(both) * 1.2]
        axes.plot(ends, ends, color="0.4", lw=1)
        low, high = ([share * end for end in ends] for share in (1 - band, 1 + band))
        axes.fill_between(ends, low, high, color="0.85", zorder=0, label=f"±{band:.0%}")
        axes.set(title=WORDS[name], xlabel=f"measured, {words}", ylabel=f"predicted, {words}", xlim=ends, ylim=ends)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:,.0f}"))
            axis.set_minor_formatter(NullFormatter())
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
