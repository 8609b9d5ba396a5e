"""What a person reads of a benchmark: tables on the screen, and a dated file, its numbers and a plot in the results folder."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.engine.cases import GROUPS, MALLOC, Case
from benchmarks.engine.runner import ROOT, Results
from benchmarks.engine.summary import (
    Figures,
    distance,
    expected_speed,
    floor_share,
    memory_ratio,
    per_operation,
    rate,
    ratio,
    step_ratio,
)

TITLES = {
    "main": "71 M Phi-3-shaped model, 16 chats a step, one thread",
    "two_threads": "the same, two threads (ratios are tokens per second)",
    "wide": "wide model (hidden 2048, 4 layers), 8 chats a step, one thread",
    "accuracy": "20 steps of a small model (hidden 256, 4 layers), against TRL in fp32",
    "accuracy_71m": "20 steps of the 71 M model, against TRL in fp32",
    "extras": "what rides on the same path (71 M, bf16), step by step in one process, against plain LoRA",
    "trl_batches": "TRL padding-free by rows per pass (71 M): why its best is what it is",
}
PEERS = {"best": "", "best + malloc": "-malloc", "8x2": "-8x2"}
IDLE = 0.7  # load average; writing the models just before the first case leaves some
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile")


@dataclass(frozen=True, slots=True)
class Section:
    """One table: its title, its columns, and its rows as text."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def as_rich(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0)
        for row in self.rows:
            table.add_row(*row)
        return table

    def as_markdown(self) -> str:
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        return f"## {self.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def sections(cases: Sequence[Case], results: Results) -> list[Section]:
    """Return one table per group that was run."""
    return [_section(group, cases, results) for group in GROUPS if any(case.group == group for case in cases)]


def _section(group: str, cases: Sequence[Case], results: Results) -> Section:
    members = [case for case in cases if case.group == group]
    if group == "extras":
        columns = ["configuration", "tokens/CPU-s", "x plain LoRA", "expected of its operations", "per operation"]
        return Section(TITLES[group], columns, [_extra_row(case, cases, results) for case in members])
    columns = ["configuration", "tokens/CPU-s", "tokens/s", *(f"x TRL {peer}" for peer in PEERS), "x padded", "x out of box"]
    columns += ["peak RSS MB", "RSS / best", "of floor", "loss off by", "norm off by"]
    rows = [_row(case, cases, results) for case in members]
    told = [n for n in range(len(columns)) if n == 0 or any(row[n] != "-" for row in rows)]
    return Section(TITLES[group], [columns[n] for n in told], [[row[n] for n in told] for row in rows])


def _row(case: Case, cases: Sequence[Case], results: Results) -> list[str]:
    group, name = case.group, case.name
    clock = "wall_s" if case.threads > 1 else "cpu_s"
    arithmetic = "fp32" if case.precision == "fp32" and not case.out_of_the_box else "bf16"
    peers = [f"trl-{arithmetic}{ending}" for ending in PEERS.values()] + ["trl-bf16-padded", "trl-out-of-the-box"]
    comparable = case.same_mathematics or case.precision == "nf4" or case.variant == "dora" or case.out_of_the_box
    return [
        _label(case, results),
        _number(rate(results, group, name), "{:,.0f}"),
        _number(rate(results, group, name, "wall_s"), "{:,.0f}"),
        *(_number(ratio(results, group, name, peer, clock) if comparable else None, "{:.2f}") for peer in peers),
        _peak(results, group, name),
        _number(memory_ratio(results, group, name, f"trl-{arithmetic}"), "{:.2f}"),
        _number(floor_share(cases, results, group, name), "{:.0%}"),
        *(
            _number(distance(results, group, name, what, max) if case.same_mathematics else None, "{:.1e}")
            for what in ("loss", "grad_norm")
        ),
    ]


def _extra_row(case: Case, cases: Sequence[Case], results: Results) -> list[str]:
    figures = (step_ratio(results, case.name), expected_speed(cases, case.name), per_operation(cases, results, case.name))
    return [
        _label(case, results),
        _number(rate(results, case.group, case.name), "{:,.0f}"),
        *(_number(f, "{:.3f}") for f in figures),
    ]


def _label(case: Case, results: Results) -> str:
    return f"{case.name} (did not run)" if (case.group, case.name) in results.failures else case.name


def _peak(results: Results, group: str, name: str) -> str:
    runs = results.of(group, name).values()
    return f"{max(run.rss_peak_bytes for run in runs) / 1e6:,.0f}" if runs else "-"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def show(console: Console, cases: Sequence[Case], results: Results) -> None:
    for section in sections(cases, results):
        console.print(section.as_rich())
    for model, rates in results.floors.items():
        console.print(f"floor of {model}: " + ", ".join(f"{name} {rate / 1e9:,.0f} Gflop/s" for name, rate in rates.items()))
    if results.load > IDLE:
        console.print(
            f"[yellow]The machine was busy (load {results.load:.1f} at the start).[/yellow] Two threads that wait for each other "
            "suffer most from that: repeat on an idle machine before quoting a figure.",
            highlight=False,
        )
    for (group, name), reason in results.failures.items():
        console.print(f"[red]{group}/{name} did not run:[/red] {reason}", highlight=False)


def write(folder: Path, stem: str, cases: Sequence[Case], results: Results, summary: Figures, command: str) -> Path:
    """Write `stem`.md, `stem`.json and `stem`.svg into the folder; return the first."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = machine()
    versions = next((run.versions for runs in results.runs.values() for run in runs.values()), {})
    numbers = {
        "machine": facts,
        "load_at_start": results.load,
        "versions": versions,
        "command": command,
        "figures": summary,
        "floors": results.floors,
        "malloc_environment": MALLOC,
        "cases": [asdict(case) for case in cases],
        "failures": {"/".join(key): reason for key, reason in results.failures.items()},
        "runs": {"/".join(key): {str(n): asdict(run) for n, run in runs.items()} for key, runs in results.runs.items()},
    }
    (folder / f"{stem}.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    _plot(folder / f"{stem}.svg", cases, results)
    text = [f"# The LoRA engine beside TRL and PEFT\n\n{datetime.now(UTC):%Y-%m-%d}, made by `{command}`.\n"]
    facts |= {"load at the start": f"{results.load:.1f}"}
    text += [", ".join(f"{k}: {v}" for k, v in {**facts, **versions}.items()) + ".\n", _reading(stem, results)]
    text += [section.as_markdown() for section in sections(cases, results)]
    text += ["## Figures\n\n```json\n" + json.dumps(summary, indent=1) + "\n```\n", *_trajectories(cases, results)]
    (folder / f"{stem}.md").write_text("\n".join(text), encoding="utf-8")
    return folder / f"{stem}.md"


def _reading(stem: str, results: Results) -> str:
    floors = "; ".join(f"{m} bf16 {r['bf16'] / 1e9:.0f}, fp32 {r['fp32'] / 1e9:.0f} Gflop/s" for m, r in results.floors.items())
    return f"""\
Tokens are those of the rows, padding not counted; the first step of a process is not measured. A ratio is taken within a round, in
which all sides run one after the other, and the table gives the median. "TRL best" is padding-free with as many rows per pass as
was fastest; "+ malloc" is the same with glibc's allocator thresholds set from outside; "8x2" has TRL's default of eight rows per
pass. "Of floor" is the time that the useful operations (`benchmarks/engine/flops.py`) would take at the best rate of torch's own
products (`floor.py`; {floors}), over the CPU time taken. Loss and norm are off by the largest relative distance to TRL in fp32,
over the steps.

Full configurations and every step's numbers: `{stem}.json`.

![tokens per CPU second]({stem}.svg)
"""


def _trajectories(cases: Sequence[Case], results: Results) -> list[str]:
    """Return, for each group with a reference, a table of losses and gradient norms by step."""
    tables: list[str] = []
    for group in ("accuracy", "accuracy_71m", "main", "wide"):
        names = [c.name for c in cases if c.group == group and c.same_mathematics and results.of(group, c.name)]
        first = [next(iter(results.of(group, name).values())) for name in names]
        if not names:
            continue
        cells = [
            [str(step + 1), *(f"{r.loss[step]:.6f} / {r.grad_norm[step]:.5f}" for r in first)] for step in range(len(first[0].loss))
        ]
        tables.append(Section(f"Loss / gradient norm by step: {TITLES[group]}", ["step", *names], cells).as_markdown())
    return tables


def machine() -> dict[str, str]:
    """Return the processor, its flags that matter here, and the commit."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    # What an earlier benchmark wrote is no change of what is measured.
    code = ("--", ":/", ":(top,exclude)benchmarks/results")
    changed = " with changes" if _git("status", "--porcelain", "--untracked-files=no", *code) else ""
    return {
        "CPU": cpu.get("model name", "unknown"),
        "cores": str(sum(line.startswith("processor") for line in lines)),
        "flags": " ".join(flag for flag in FLAGS if flag in cpu.get("flags", "").split()),
        "Python": platform.python_version(),
        "commit": commit + changed,
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _plot(path: Path, cases: Sequence[Case], results: Results) -> None:
    """Write bars of tokens per CPU second, one per configuration on the 71 M model."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    shown = [case for case in cases if case.group == "main" and results.of("main", case.name)]
    rates = [rate(results, "main", case.name) or 0.0 for case in shown]
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(shown) + 1.2), layout="constrained")
    bars = axes.barh([c.name for c in shown], rates, color=["#2a6f97" if c.side == "ours" else "#b0b0b0" for c in shown])
    axes.bar_label(bars, [f"{value:,.0f}" for value in rates], padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("tokens per CPU second")
    axes.set_title(TITLES["main"], fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
