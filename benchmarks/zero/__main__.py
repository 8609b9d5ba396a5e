"""`python -m benchmarks.zero`: memory of a process when 1, 2 and 4 divide a run, and the law a + b / N that it follows."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.engine.report import machine
from kivnun.matrix.law import MIB, Law, launch, laws, weights_mib
from kivnun.matrix.law_cases import MODELS, STEPS, TOKENS, Case, cases

RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    screen = Console(stderr=True)
    model = "28m" if options.quick else "95m"
    measured: list[tuple[Case, dict[str, Any]]] = []
    failed = 0
    for case in cases(model, (1, 2) if options.quick else (1, 2, 4), quick=options.quick):
        try:
            measured.append((case, launch(case, options.work, options.work / "measured.json")))
        except subprocess.CalledProcessError as error:
            failed += 1
            screen.print(f"[red]{case.group}, {case.processes} processes failed:[/red] {error.stderr[-2000:]}", highlight=False)
            continue
        screen.print(
            f"{case.group}, N = {case.processes}: {laws(measured)[case.group][0][case.processes]:.0f} MiB", highlight=False
        )
    stem = f"zero_{'quick_' if options.quick else ''}{datetime.now(UTC):%Y-%m-%d}"
    path = _write(options.results, stem, model, measured, "python -m benchmarks.zero" + (" --quick" if options.quick else ""))
    screen.print(f"written to {path}", highlight=False)
    if options.json:
        print(json.dumps({group: [peaks, law and asdict(law)] for group, (peaks, law) in laws(measured).items()}), flush=True)
    return 1 if failed else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zero", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a model of 28 M parameters, stages 2 and 3, up to two processes")
    parser.add_argument("--json", action="store_true", help="print the peaks and laws as one object on the last line of stdout")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "kivnun-bench-zero", help="where the models are kept"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the dated files go")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    return options


def _write(folder: Path, stem: str, model: str, measured: list[tuple[Case, dict[str, Any]]], command: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    facts = machine()
    record = {"machine": facts, "command": command, "model": asdict(MODELS[model]), "parameters": MODELS[model].parameters}
    runs = [{"case": asdict(case), **its} for case, its in measured]
    (folder / f"{stem}.json").write_text(json.dumps({**record, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    path = folder / f"{stem}.md"
    path.write_text(_page(stem, model, measured, command, facts), encoding="utf-8")
    return path


def _page(stem: str, model: str, measured: list[tuple[Case, dict[str, Any]]], command: str, facts: dict[str, str]) -> str:
    size, weights = MODELS[model].parameters, weights_mib(model)
    counts = sorted({case.processes for case, _ in measured})
    full = [(case, run) for case, run in measured if case.group == "ZeRO-3, full, fp32"]
    start = {case.processes: max(its["start"] for its in run["processes"]) / MIB for case, run in full}
    lines = [
        f"# Memory of a process under ZeRO, {stem[-10:]}",
        "",
        f"`{command}` · " + " · ".join(f"{name}: {value}" for name, value in facts.items()),
        "",
        f"A model of {size / 1e6:.1f} M parameters of Phi-3's shape with random weights (P = {weights:.0f} MiB in float32), a row",
        f"of {TOKENS} tokens per process and step, {STEPS} steps, AdamW, one thread per process, gloo. Figures: the most anonymous",
        "memory of a process during forward, backward and update above what it had before the model, MiB; of several processes",
        "the largest.",
        "Single runs.",
        "",
        f"| what is divided | {' | '.join(f'N = {count}' for count in counts)} | a + b / N | b in P |",
        f"|---|{'---:|' * len(counts)}---|---:|",
    ]
    for group, (peaks, law) in laws(measured).items():
        lines.append(_row(group, peaks, law, counts, weights))
    lines += [
        "",
        "Held when training begins, without what is gathered, made and freed on the way:",
        "",
        f"| what is divided | {' | '.join(f'N = {count}' for count in counts)} | a + b / N | b in P |",
        f"|---|{'---:|' * len(counts)}---|---:|",
    ]
    for group, (held, law) in laws(measured, "opened").items():
        lines.append(_row(group, held, law, counts, weights))
    lines += [
        "",
        "Until training begins every process holds the whole base once; the most it took by then at stage 3, full: "
        + ", ".join(f"{mib:.0f} MiB (N = {count})" for count, mib in sorted(start.items()))
        + ".",
        "",
        "Seconds are no result: all processes shared this machine's cores.",
    ]
    return "\n".join(lines) + "\n"


def _row(group: str, figures: dict[int, float], law: Law | None, counts: list[int], weights: float) -> str:
    cells = " | ".join(f"{figures[count]:.0f}" if count in figures else "" for count in counts)
    return f"| {group} | {cells} | {_law_text(law)} | {f'{abs(law.divided / weights):.1f}' if law else ''} |"


def _law_text(law: Law | None) -> str:
    if law is None:
        return ""
    sign = "-" if law.divided < 0 else "+"
    return f"{law.fixed:.0f} {sign} {abs(law.divided):.0f} / N (off by {law.residual:.0f} at most)"


if __name__ == "__main__":
    sys.exit(main())
