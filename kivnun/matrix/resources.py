"""Rows 7, 8 and 9: bytes of a step, numbers trained, bytes of each of several processes.

Next: `memory.py`, `counts.py`, `law.py`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kivnun.artifacts import atomic_write, make_folder
from kivnun.errors import KivnunError
from kivnun.evaluate.intervals import Interval
from kivnun.matrix.counts import Count, count_all
from kivnun.matrix.law import MIB, fit, launch, peak_mib, weights_mib, write_model
from kivnun.matrix.law_cases import Case
from kivnun.matrix.memory import ProbeFailed, Surface, measure_memory, plan
from kivnun.matrix.memory_charts import counts_chart, law_chart, parts_chart, tokens_chart
from kivnun.matrix.memory_summary import MemoryCell, crossings, main_form, memory_cells, outlooks
from kivnun.matrix.methods import SHARDED
from kivnun.matrix.page import Chart, Section, Table
from kivnun.matrix.table import Cell, judged
from kivnun.plan.techniques import TECHNIQUES as LABELS

PLAIN = 0  # rows are divided, and nothing else
NOISE_MIB = 8.0  # by which single runs of one case differed at most (docs/LOG.md, 2026-11-27)


@dataclass(frozen=True, slots=True)
class Measured:
    """The cells of rows 7 to 9, what the page shows of them, and all figures for matrix.json."""

    cells: list[Cell]
    sections: list[Section]
    record: dict[str, Any]
    base_parameters: int


@dataclass(frozen=True, slots=True)
class LawScale:
    """What is launched to find the law: a model, numbers of processes, repeats of each."""

    model: str
    counts: tuple[int, ...]
    stages: tuple[int, ...]
    repeats: int


QUICK_LAW = LawScale("28m", (1, 2), (PLAIN, 2, 3), 1)
FULL_LAW = LawScale("95m", (1, 2, 4), (PLAIN, 1, 2, 3), 2)


def measure(output: Path, *, quick: bool, screen: Any) -> Measured:
    """Measure what is not measured yet, and return the cells of rows 7 to 9."""
    scale = QUICK_LAW if quick else FULL_LAW
    surface = _surface(output / "memory", quick, screen)
    screen.stage("numbers trained", 1)
    counts = count_all()
    screen.done("all techniques")
    cases = law_cases(scale)
    screen.stage("bytes per process", len(cases))
    peaks = _peaks(output / "law", cases, screen)

    memory = memory_cells(surface)
    cells = [
        *(_memory_cell(column, cell) for column, cell in memory.items()),
        *_sharded_memory_cells(peaks, scale),
        *_count_cells(counts),
        *_law_cells(peaks, scale),
    ]
    form = main_form(surface)
    meets = [f"{o.technique}: {o.meets_at:,.0f} tokens a pass" for o in outlooks(surface) if o.form == form and o.meets_at]
    record = {
        "memory": {column: asdict(cell) for column, cell in memory.items()},
        "crossings": [asdict(crossing) for crossing in crossings(surface)],
        "counts": {name: {**asdict(it), "modules": list(it.modules)} for name, it in counts.items()},
        "law": {_named(kind, precision, stage): found for (kind, precision, stage), found in _laws(peaks).items()},
    }
    sections = [
        Section(
            "Memory of a step",
            f"Peak bytes above an idle process of one training step ({form.model}, {form.precision}), by what they are. "
            f"{_crossing_words(crossings(surface), meets)}",
            (
                Chart("By part, at the reference point", parts_chart(surface, form)),
                Chart("Over tokens of a pass", tokens_chart(surface, form)),
            ),
        ),
        Section(
            "Numbers trained",
            "On the built-in base, each technique with its usual options. AdamW keeps two numbers for each that is trained.",
            (Chart("Trained numbers", counts_chart(counts)),),
            (_count_table(counts),),
        ),
        Section(
            "Memory of each of several processes",
            f"Full tuning of a model of {weights_mib(scale.model) / 4 * MIB / 1e6:.0f} M parameters in float32: the most anonymous "
            "memory of a process above what it had before the model. Plain data parallelism divides rows alone; ZeRO divides "
            "optimizer state (1), gradients (2) and weights (3).",
            (Chart("By number of processes", law_chart({_named(*key): law["mib"] for key, law in _laws(peaks).items()})),),
            (_law_table(peaks, scale),),
        ),
    ]
    return Measured(cells, sections, record, next(iter(counts.values())).base_numbers)


def _surface(folder: Path, quick: bool, screen: Any) -> Surface:
    """Measure the points that the folder lacks, heard one by one."""
    screen.stage("bytes of a step", len(plan(quick)))
    known = 0

    def hear(name: str, done: int, total: int) -> None:
        nonlocal known
        for _ in range(known, done):
            screen.done(name)
        known = done

    try:
        surface = measure_memory(folder, quick, hear)
    except ProbeFailed as error:
        raise KivnunError(f"a step could not be measured: {error}", hint="run the command again: what is done is kept") from error
    hear("all points", len(surface.points), len(surface.points))
    return surface


def law_cases(scale: LawScale) -> list[tuple[Case, int]]:
    """Return every launch with its repeat: full tuning at each stage, and each adapter's plain data parallelism."""
    full = [Case(scale.model, "full", "fp32", stage, count) for stage in scale.stages for count in scale.counts]
    adapters = [
        case
        for count in scale.counts
        for case in (
            Case(scale.model, "lora", "fp32", PLAIN, count),
            Case(scale.model, "lora", "nf4", PLAIN, count),
            Case(scale.model, "dora", "fp32", PLAIN, count),
        )
    ]
    return [(case, repeat) for repeat in range(scale.repeats) for case in (*full, *adapters)]


Peaks = dict[tuple[str, str, int], dict[int, list[float]]]
"""MiB by (kind, precision, stage), by number of processes, one for each repeat."""


def _peaks(folder: Path, cases: Sequence[tuple[Case, int]], screen: Any) -> Peaks:
    """Launch what is not measured yet, two at a time: bytes do not mind who else computes."""
    make_folder(folder)
    write_model(folder / "models", cases[0][0].model)
    found: Peaks = {}
    with ThreadPoolExecutor(2) as launches:
        for (case, _), peak in zip(cases, launches.map(lambda it: _peak(folder, *it), cases), strict=True):
            found.setdefault((case.kind, case.precision, case.zero_stage), {}).setdefault(case.processes, []).append(peak)
            screen.done(f"{case.group}, N = {case.processes}")
    return found


def _peak(folder: Path, case: Case, repeat: int) -> float:
    """Return the MiB of a case's largest process, measured now or before."""
    name = f"{case.model}-{case.kind}-{case.precision}-stage-{case.zero_stage}-of-{case.processes}-{repeat}"
    path = folder / f"{name}.json"
    if not path.is_file():
        try:
            measured = launch(case, folder / "models", folder / f"{name}.measured")
        except subprocess.CalledProcessError as error:
            said = str(error.stderr).strip()[-400:]
            raise KivnunError(f"{name} failed: {said}", hint="run the command again: what is done is kept") from error
        atomic_write(path, json.dumps(measured) + "\n")
        (folder / f"{name}.measured").unlink()
    return peak_mib(json.loads(path.read_text(encoding="utf-8")))


def _laws(peaks: Peaks) -> dict[tuple[str, str, int], dict[str, Any]]:
    laws: dict[tuple[str, str, int], dict[str, Any]] = {}
    for key, by_count in peaks.items():
        means = {count: sum(its) / len(its) for count, its in by_count.items()}
        spread = max(NOISE_MIB, *(max(its) - min(its) for its in by_count.values()))
        law = fit(means)
        laws[key] = {
            "fixed_mib": law.fixed,
            "divided_mib": law.divided,
            "residual_mib": law.residual,
            "noise_mib": spread,
            "mib": means,
        }
    return laws


def _saved_share(law: Mapping[str, Any]) -> tuple[float, Interval]:
    """Return which part of a process's memory is gone from the fewest processes to the most, and between what."""
    means: dict[int, float] = law["mib"]
    fewest, most = means[min(means)], means[max(means)]
    share, noise = 1 - most / fewest, law["noise_mib"] / fewest
    return share, Interval(share - noise, share + noise)


def _memory_cell(column: str, found: MemoryCell) -> Cell:
    figures = sorted(found.figures.values(), key=lambda it: it.ratio)
    best, worst = figures[0], figures[-1]
    effect = Interval(1 - best.interval[1], 1 - best.interval[0])
    said = [f"{best.ratio:.2f} of full tuning", f"peak bytes at {found.rows} x {found.tokens} tokens"]
    if len(figures) > 1:
        said[1] += f"; best {LABELS[best.technique].label}, worst {LABELS[worst.technique].label} ({worst.ratio:.2f})"
    measured = {
        "said": said,
        "ratio_to_full": best.ratio,
        "ratio_interval": list(best.interval),
        "over_the_grid": list(best.over_grid),
        "peak_bytes": best.peak,
        "parts_bytes": best.parts,
        "best": best.technique,
        "worst": {"technique": worst.technique, "ratio_to_full": worst.ratio, "over_the_grid": list(worst.over_grid)},
    }
    baseline = {"full_peak_bytes": best.full_peak, "full_parts_bytes": best.full_parts}
    runs = tuple(f"memory/{name}" for name in found.figures)
    return Cell(7, column, measured, baseline, effect, judged(7, column, effect), runs)


def _sharded_memory_cells(peaks: Peaks, scale: LawScale) -> list[Cell]:
    """Return row 7 for the columns that divide state: bytes of a process against the same run with nothing divided."""
    laws, most = _laws(peaks), max(scale.counts)
    plain = laws["full", "fp32", PLAIN]
    cells = []
    for technique, stages in SHARDED.items():
        found = {stage: laws["full", "fp32", stage] for stage in stages if stage in scale.stages}
        best = min(found, key=lambda stage: found[stage]["mib"][most])
        before, after = plain["mib"][most], found[best]["mib"][most]
        noise = (plain["noise_mib"] + found[best]["noise_mib"]) / before
        share = 1 - after / before
        effect = Interval(share - noise, share + noise)
        said = [f"{after / before:.2f} of full tuning", f"bytes of each of {most} processes, stage {best}"]
        measured = {"said": said, "mib": {str(stage): law["mib"] for stage, law in found.items()}, "processes": most}
        baseline = {"plain_data_parallel_mib": plain["mib"]}
        runs = tuple(f"law/{scale.model}-full-fp32-stage-{stage}" for stage in (PLAIN, *found))
        cells.append(Cell(7, technique, measured, baseline, effect, judged(7, technique, effect), runs))
    return cells


def _count_cells(counts: Mapping[str, Count]) -> list[Cell]:
    """Return row 8. Counts are exact, so their intervals are points."""
    full = counts["full"]
    columns = {"LoRA": ["lora"], "QLoRA": ["qlora"], "DoRA": ["dora"], "PEFT": [name for name in counts if name != "full"]}
    cells = []
    for technique, names in columns.items():
        ranked = sorted(names, key=lambda name: counts[name].trained)
        best, worst = counts[ranked[0]], counts[ranked[-1]]
        effect = Interval(1 - best.trained / full.trained, 1 - best.trained / full.trained)
        second = f"{best.trained:,} of {full.trained:,} numbers"
        second += f"; {LABELS[ranked[0]].label} to {LABELS[ranked[-1]].label} ({100 * worst.share:.1f} %)" if len(names) > 1 else ""
        measured = {
            "said": [f"{100 * best.share:.2f} %", second],
            **{
                name: {
                    "trained": counts[name].trained,
                    "moment_bytes": counts[name].moment_bytes,
                    "file_bytes": counts[name].file_bytes,
                    "matched": counts[name].matched,
                }
                for name in names
            },
        }
        baseline = {"trained": full.trained, "moment_bytes": full.moment_bytes, "file_bytes": full.file_bytes}
        cells.append(
            Cell(8, technique, measured, baseline, effect, judged(8, technique, effect), tuple(f"counts/{n}" for n in names))
        )
    for technique in SHARDED:
        effect = Interval(0.0, 0.0)
        measured = {"said": ["100 %", "as many numbers are trained; each process keeps a part of them"], "trained": full.trained}
        cells.append(
            Cell(8, technique, measured, {"trained": full.trained}, effect, judged(8, technique, effect), ("counts/full",))
        )
    return cells


def _law_cells(peaks: Peaks, scale: LawScale) -> list[Cell]:
    """Return row 9: whether bytes of a process fall with the number of processes, and by which law."""
    laws = _laws(peaks)
    own = {"LoRA": ("lora", "fp32"), "QLoRA": ("lora", "nf4"), "PEFT": ("lora", "fp32"), "DoRA": ("dora", "fp32")}
    chosen = {technique: (*kind, PLAIN) for technique, kind in own.items()}
    chosen |= {"DeepSpeed": ("full", "fp32", 2), "ZeRO": ("full", "fp32", 3)}
    cells = []
    for technique, key in chosen.items():
        law = laws[key]
        share, effect = _saved_share(law)
        fewest, most = min(law["mib"]), max(law["mib"])
        said = [
            f"{_law_text(law)} MiB",
            f"{_named(*key)}: {law['mib'][fewest]:.0f} to {law['mib'][most]:.0f} MiB, {fewest} to {most} processes",
        ]
        measured = {"said": said, "share_saved": share, **{name: law[name] for name in law if name != "mib"}, "mib": law["mib"]}
        if technique == "ZeRO":
            measured["stages"] = {str(stage): laws["full", "fp32", stage] for stage in SHARDED["ZeRO"] if stage in scale.stages}
        baseline = {"plain_data_parallel_full_mib": laws["full", "fp32", PLAIN]["mib"]}
        runs = (f"law/{scale.model}-{key[0]}-{key[1]}-stage-{key[2]}",)
        cells.append(Cell(9, technique, measured, baseline, effect, judged(9, technique, effect), runs))
    return cells


def _named(kind: str, precision: str, stage: int) -> str:
    what = {"full": "full tuning", "lora": "LoRA", "dora": "DoRA"}[kind] if precision != "nf4" else "QLoRA"
    return f"{what}, {f'ZeRO {stage}' if stage else 'data parallel'}"


def _law_text(law: Mapping[str, Any]) -> str:
    sign = "+" if law["divided_mib"] >= 0 else "−"
    return f"{law['fixed_mib']:.0f} {sign} {abs(law['divided_mib']):.0f} / N"


def _crossing_words(found: Sequence[Any], meets: Sequence[str]) -> str:
    more = [crossing for crossing in found if crossing.more_above]
    if more:
        first, many = min(more, key=lambda crossing: crossing.pass_tokens), "s" * (len(more) > 1)
        form = f"{first.form.model}, {first.form.precision}"
        where = f"{first.technique} passes full tuning at {first.pass_tokens:,.0f} tokens a pass ({form})"
        return f"Adapters are not always smaller: {len(more)} crossing{many} on the grid, the first where {where}."
    said = "On this grid no technique takes more than full tuning."
    return said + (f" By their straight lines they would from: {'; '.join(meets)}." if meets else "")


def _count_table(counts: Mapping[str, Count]) -> Table:
    lines = [
        (
            name,
            f"{it.trained:,}",
            f"{100 * it.share:.2f} %",
            f"{it.moment_bytes:,}",
            "" if it.file_bytes is None else f"{it.file_bytes:,}",
            ", ".join(f"{count} {ending}" for ending, count in list(it.matched.items())[:4])
            + (" ..." if len(it.matched) > 4 else ""),
        )
        for name, it in counts.items()
    ]
    return Table("Exactly", ("technique", "trained", "of the base", "bytes of moments", "bytes of the file", "modules"), lines)


def _law_table(peaks: Peaks, scale: LawScale) -> Table:
    lines = []
    for key, law in _laws(peaks).items():
        cells = (f"{law['mib'][count]:.0f}" if count in law["mib"] else "" for count in scale.counts)
        lines.append((_named(*key), *cells, _law_text(law), f"{law['residual_mib']:.0f}"))
    return Table("MiB of a process", ("", *(f"N = {count}" for count in scale.counts), "law", "off by"), lines)
