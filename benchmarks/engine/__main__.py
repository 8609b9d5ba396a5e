"""`python -m benchmarks.engine`: Kivnun's LoRA engine beside TRL with PEFT: speed, memory, and that both compute the same."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.engine.cases import GROUPS, Case, chosen, full_cases, quick_cases
from benchmarks.engine.report import show, write
from benchmarks.engine.runner import DifferentMathematics, Results, measure_floor, run_all, start_process, turns, write_workloads
from benchmarks.engine.summary import figures

RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    groups = options.only or GROUPS
    cases = chosen(quick_cases() if options.quick else full_cases(), groups)
    screen = Console(stderr=True)
    tables = Console(stderr=options.json, width=None if sys.stdout.isatty() else 170)
    try:
        results = _run(cases, options.work, screen)
    except DifferentMathematics as difference:
        screen.print(f"[red]Stopped:[/red] {difference}", highlight=False)
        return 2
    summary = figures(cases, results)
    show(tables, cases, results)
    if options.only is None:
        stem = f"engine_{'quick_' if options.quick else ''}{datetime.now(UTC):%Y-%m-%d}"
        command = "python -m benchmarks.engine" + (" --quick" if options.quick else "")
        tables.print(f"written to {write(options.results, stem, cases, results, summary, command)}", highlight=False)
    if options.json:
        print(json.dumps(summary), flush=True)
    return 1 if results.failures else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under 10 minutes on two cores: fewer steps, rounds and peers")
    parser.add_argument("--json", action="store_true", help="print the figures as one object on the last line of stdout")
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="GROUP", help=f"of {', '.join(GROUPS)}; writes no file")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "kivnun-bench-engine", help="where the models are kept"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the dated files go")
    return parser.parse_args(arguments)


def _run(cases: list[Case], work: Path, screen: Console) -> Results:
    columns = [TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=screen) as progress:
        task = progress.add_task("writing models", total=sum(1 for _ in turns(cases)))
        write_workloads(work, sorted({case.model for case in cases}))

        def on_progress(name: str) -> None:
            progress.update(task, description=name, advance=0 if name.endswith("floor") else 1)
            if not screen.is_terminal:  # a bar is drawn on terminals only
                screen.print(name, highlight=False)

        results = run_all(cases, lambda due: start_process(due, work), measure_floor, on_progress)
    return results


if __name__ == "__main__":
    sys.exit(main())
