"""The planner beside what runs take: `python -m benchmarks.plan [--folder FOLDER] [--only TEXT] [--written | --calibrate]`.

Measures every configuration of `cases.py` in a process of its own, about fifteen minutes of one core on an idle machine, and writes
`plan_DATE.md` with its numbers and a picture. What was measured is kept: called again, it goes on where it was stopped.
`--calibrate` measures the points that the laws are fitted to instead, and writes no page.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.plan.cases import CALIBRATION, VALIDATION
from benchmarks.plan.measure import FoundOnce, Record, measure
from kivnun.plan.memory import idle_bytes
from kivnun.plan.time import machine_speed

RESULTS = Path(__file__).parents[1] / "results"


def main(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results go")
    parser.add_argument("--only", default="", help="measure the configurations with this text in their names alone")
    parser.add_argument("--written", action="store_true", help="measure nothing, and tell what was measured before")
    parser.add_argument("--calibrate", action="store_true", help="measure the points that the laws are fitted to")
    given = parser.parse_args(args)
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    which = "plan_calibration" if given.calibrate else "plan"
    stem = given.folder / f"{which}_{datetime.now(UTC):%Y-%m-%d}"
    cases = [case for case in (CALIBRATION if given.calibrate else VALIDATION) if given.only in case.name]
    record = Record.read(stem.with_suffix(".json")) or Record(stem.with_suffix(".json"), look())
    if not given.written:
        with tempfile.TemporaryDirectory(prefix="plan-models-") as models, progress() as screen:
            task = screen.add_task("measuring", total=len(cases))
            measure(cases, record, Path(models), lambda name: screen.update(task, advance=1, description=name))
    done = [case for case in cases if record.has(case)]
    if given.calibrate or not done:
        print(f"{len(done)} of {len(cases)} measured: {record.file}")
        return 0
    from benchmarks.plan.report import compared, others, summary, table, write  # loads numpy's and rich's weight, and no torch

    found = [compared(case, record.points[case.name]["processes"], record.found_once) for case in done]
    console = Console(width=None if sys.stdout.isatty() else 240)  # a log has no width to fold at
    for section in (table(found), others(found), summary(found)):
        console.print(section.as_rich())
    if given.only:
        return 0
    path = write(stem, found, record, " ".join(("python -m benchmarks.plan", *args)))
    console.print(f"written to {path}")
    return 0


def look() -> FoundOnce:
    """Return what a planner looks for once on a machine: the speed of a core while the others rest, and while as many work as cases
    have processes (cores may be halves of one). Codes are computed with in bfloat16."""
    speed = {}
    for count in (1, 2):
        for precision, like in (("fp32", ("fp32",)), ("bf16", ("bf16", "nf4", "int8"))):
            with ThreadPoolExecutor(count) as side_by_side:
                found = median(side_by_side.map(lambda it: machine_speed(it, "cpu", 1), [precision] * count))
            speed |= {alike if count == 1 else f"{alike} x {count}": found for alike in like}
    return FoundOnce(speed, idle_bytes())


def progress() -> Progress:
    return Progress(TextColumn("{task.completed}/{task.total}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
