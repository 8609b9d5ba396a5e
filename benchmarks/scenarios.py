"""The positive control of the scenarios: `python -m benchmarks.scenarios [--quick] [--only NAME,NAME] [--json]`.

Each task is tuned in full on the built-in base twice, by its own spec: on its rows, and on the control's, whose replies are
permuted (`kivnun/data/scenarios/control.py`). A task may stay when tuning on its rows beats the base with a paired 95 % interval
that leaves out zero, and tuning on the control's does not. Writes a dated page, its numbers and a picture of melodies.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import babel
import numpy as np
import torch
from rich.console import Console

from benchmarks.engine.report import Section, machine
from kivnun.cli.screen import figure
from kivnun.data.scenarios import SCENARIOS, Scenario, find_scenario
from kivnun.data.scenarios.control import shuffled
from kivnun.evaluate.melodies import novelty_of_run, piano_rolls, run_samples
from kivnun.pipeline import tune
from kivnun.spec import load_spec

RESULTS = Path(__file__).parent / "results"
SEED = 7
QUICK = ("schedule.epochs=null", "schedule.steps=20", "evaluation.generate_rows=32", "evaluation.samples=0")


@dataclass(frozen=True, slots=True)
class Side:
    """One tuning: its steps, CPU seconds with both evaluations, and every figure of base and tuned with its intervals."""

    steps: int
    cpu_s: float
    wall_s: float
    base: dict[str, Any]
    tuned: dict[str, Any]

    def difference(self, name: str) -> tuple[float, float]:
        low, high = self.tuned["intervals"][f"{name}_difference"]
        return low, high

    def verdict(self, name: str) -> str:
        return self.tuned["verdicts"][name]


@dataclass(frozen=True, slots=True)
class Control:
    """Both tunings of one scenario, what its two files share, and for melodies how new the tunes are."""

    name: str
    metric: str
    full: Side
    shuffled: Side
    overlap: dict[str, Any]
    novelty: dict[str, Any]

    @property
    def stays(self) -> bool:
        return self.full.verdict(self.metric) == "better" and self.shuffled.verdict(self.metric) != "better"


def run_side(scenario: Scenario, folder: Path, overrides: Sequence[str], shuffle: bool) -> tuple[Side, dict[str, Any]]:
    """Write the scenario into `folder`, tune by its spec into `folder`/run; return what came of it and the overlap."""
    overlap = scenario.write(folder, change=(lambda rows: shuffled(rows, SEED)) if shuffle else None)
    spec = load_spec(folder / "spec.yaml", overrides)
    cpu, wall = time.process_time(), time.monotonic()
    result = tune(spec, (folder / "spec.yaml").read_text(encoding="utf-8"), folder / "run")
    side = Side(result["steps"], time.process_time() - cpu, time.monotonic() - wall, result["base"], result["tuned"])
    return side, overlap.as_json()


def control(scenario: Scenario, overrides: Sequence[str], picture: Path | None) -> Control:
    """Run both sides of a scenario; with `picture`, draw four melodies of the tuned model there."""
    with tempfile.TemporaryDirectory() as place:
        full, overlap = run_side(scenario, Path(place) / "full", overrides, shuffle=False)
        other, _ = run_side(scenario, Path(place) / "shuffled", overrides, shuffle=True)
        novelty: dict[str, Any] = {}
        if picture is not None:
            run = Path(place) / "full" / "run"
            novelty = {which: asdict(found) for which, found in novelty_of_run(run).items()}
            picture.write_text(piano_rolls(run_samples(run)["tuned"][:4]), encoding="utf-8")
    return Control(scenario.name, scenario.main_metric, full, other, overlap, novelty)


def sections(found: Sequence[Control]) -> list[Section]:
    """Return the tables: the control, every figure, the overlap, the novelty of melodies."""
    columns = ["task", "metric", "base", "full", "difference", "shuffled", "difference", "stays"]
    decided = [
        [
            c.name,
            c.metric,
            _with_interval(c.metric, c.full.base),
            _with_interval(c.metric, c.full.tuned),
            _ends(c.metric, c.full),
            _with_interval(c.metric, c.shuffled.tuned),
            _ends(c.metric, c.shuffled),
            "yes" if c.stays else "no",
        ]
        for c in found
    ]
    names = ("exact_match", "chrf", "ended_turn", "nll")
    others = [
        [c.name, name, *(figure(name, side[name]) for side in (c.full.base, c.full.tuned, c.shuffled.tuned))]
        for c in found
        for name in names
        if name in c.full.tuned and name != c.metric
    ]
    costs = [
        [
            c.name,
            f"{c.overlap['train_rows']:,}",
            f"{c.overlap['validation_rows']:,}",
            str(c.full.steps),
            f"{c.full.cpu_s:.1f}",
            f"{c.full.wall_s:.1f}",
            str(sum(both for _, _, both in c.overlap["topics"].values())),
            str(c.overlap["equal_rows"]),
            str(c.overlap["equal_prompts"]),
            str(c.overlap["near_rows"]),
            f"{c.overlap['nearest_median']:.2f} / {c.overlap['nearest_highest']:.2f}",
        ]
        for c in found
    ]
    tables = [
        Section("Base, full tuning, and full tuning on shuffled rows", columns, decided),
        Section("Other figures", ["task", "metric", "base", "full", "shuffled"], others),
        Section(
            "Rows, cost of one run, and overlap of training and held-out rows",
            [
                "task",
                "train",
                "held out",
                "steps",
                "CPU s",
                "wall s",
                "topics in both",
                "equal rows",
                "equal prompts",
                "near",
                "Jaccard",
            ],
            costs,
        ),
    ]
    novel = [
        [
            which,
            figure("exact_match", n["share"]) if n["share"] is not None else "-",
            f"{n['tunes']} of {n['replies']}",
            str(n["copies"]),
        ]
        for c in found
        for which, n in c.novelty.items()
    ]
    if novel:
        heads = ["replies of", "new runs of four notes", "tunes", "copies of a training tune"]
        tables.append(Section("Melodies: new beside the training tunes", heads, novel))
    return tables


def _with_interval(name: str, side: dict[str, Any]) -> str:
    low, high = side["intervals"][name]
    return f"{figure(name, side[name])} [{figure(name, low)}, {figure(name, high)}]"


def _ends(name: str, side: Side) -> str:
    low, high = side.difference(name)
    return f"[{figure(name, low)}, {figure(name, high)}]"


def write(stem: str, found: Sequence[Control], command: str, picture: bool) -> Path:
    """Write `stem`.md and `stem`.json to the results folder; return the first."""
    facts = {
        **machine(),
        "torch": torch.__version__,
        "numpy (its documentation is the domain's text)": np.__version__,
        "babel": babel.__version__,
    }
    lines = [
        f"# The scenarios' positive control\n\n{datetime.now(UTC):%Y-%m-%d}, made by `{command}`.\n",
        ", ".join(f"{name}: {value}" for name, value in facts.items()) + ".\n",
        "Full tuning of `kivnun/tiny-phi` by each scenario's own spec, one thread, one seed; 95 % intervals in brackets, those of "
        "differences paired on the held-out rows. Shuffled: the same rows with their replies permuted (running text: the letters "
        "of each word). A task stays when full tuning beats the base with an interval that leaves out zero and shuffled rows do "
        "not. CPU seconds are those of one run with both evaluations; other work ran beside it.\n",
        *(section.as_markdown() for section in sections(found)),
    ]
    if picture:
        lines.append(f"References and what the tuned model wrote, piano rolls:\n\n![four melodies]({stem}.svg)\n")
    numbers = {"machine": facts, "command": command, "scenarios": [{**asdict(c), "stays": c.stays} for c in found]}
    (RESULTS / f"{stem}.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{stem}.md").write_text("\n".join(lines), encoding="utf-8")
    return RESULTS / f"{stem}.md"


def main(args: Sequence[str]) -> int:
    """Run the control; the exit status is 1 when a task may not stay (with --quick it is only told)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scenarios", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="20 steps and 32 replies a side: whether it runs, not what it shows")
    parser.add_argument("--only", default="", help="names of scenarios, with commas between")
    parser.add_argument("--json", action="store_true", help="print the numbers as one JSON object on the last line")
    given = parser.parse_args(args)
    torch.set_num_threads(1)
    chosen = [find_scenario(name) for name in given.only.split(",")] if given.only else list(SCENARIOS)
    stem = f"scenarios{'_quick' if given.quick else ''}_{datetime.now(UTC):%Y-%m-%d}"
    found: list[Control] = []
    wide = None if sys.stdout.isatty() else 240  # a log has no width to fold at
    console = Console(stderr=given.json, width=wide)
    for scenario in chosen:
        picture = RESULTS / f"{stem}.svg" if scenario.name == "melodies" and not given.quick else None
        found.append(control(scenario, QUICK if given.quick else (), picture))
        done = found[-1]
        console.print(f"{done.name}: {'stays' if done.stays else 'does not stay'}, {done.full.cpu_s:.1f} CPU s", highlight=False)
    for section in sections(found):
        console.print(section.as_rich())
    drawn = any(done.novelty for done in found)
    path = write(stem, found, " ".join(("python -m benchmarks.scenarios", *args)), drawn)
    console.print(f"written to {path}")
    if given.json:
        print(json.dumps({"stays": {done.name: done.stays for done in found}, "page": str(path)}))
    return 0 if given.quick or all(done.stays for done in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
