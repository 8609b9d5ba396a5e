"""`kivnun scenario`: the built-in tasks, written as data and a spec that run as they are. Loads no torch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kivnun.cli.completion import run_folders, scenario_names

if TYPE_CHECKING:
    from kivnun.data.scenarios.overlap import Overlap

FOLDER = click.Path(path_type=Path, file_okay=False)


@click.group()
def scenario() -> None:
    """The built-in tasks: data, spec and metric of each."""


@scenario.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list of {name, table_row, title, metrics, main_metric, ...}.")
def list_scenarios(as_json: bool) -> None:
    """List the scenarios: which row of the technique table each stands for, its rows and its metrics (the first decides)."""
    from kivnun.cli.screen import print_json, table
    from kivnun.data.scenarios import SCENARIOS

    if as_json:
        print_json([asdict(found) for found in SCENARIOS])
        return
    rows = [
        (s.name, s.title, str(s.table_row), f"{s.train_rows:,}", f"{s.validation_rows:,}", ", ".join(s.metrics)) for s in SCENARIOS
    ]
    table(("name", "task", "row", "train", "held out", "metrics"), rows)


@scenario.command()
@click.argument("name", shell_complete=scenario_names)
@click.option("--output", type=FOLDER, required=True, metavar="DIR", help="The folder to write into; made when it is not there.")
@click.option("--seed", type=int, default=7, show_default=True, help="Draws the rows; held-out topics do not depend on it.")
@click.option("--shuffled", is_flag=True, help="Write the control: replies permuted among the training rows.")
@click.option("--json", "as_json", is_flag=True, help="Print {scenario, folder, spec, overlap} as one JSON object.")
def write(name: str, output: Path, seed: int, shuffled: bool, as_json: bool) -> None:
    """Write train.jsonl, validation.jsonl and spec.yaml of the scenario NAME, and show how far the two files overlap.

    Then: kivnun tune DIR/spec.yaml. The overlap is kept in overlap.json.
    """
    from kivnun.cli.screen import print_json, stderr, stdout, table
    from kivnun.data.scenarios import find_scenario
    from kivnun.data.scenarios.control import shuffled as shuffle

    found = find_scenario(name)
    overlap = found.write(output, seed, (lambda rows: shuffle(rows, seed)) if shuffled else None)
    if as_json:
        print_json({"scenario": name, "folder": str(output), "spec": str(output / "spec.yaml"), "overlap": overlap.as_json()})
        return
    table(("", ""), _overlap_lines(overlap), stdout())
    stderr().print(f"\nwritten: {output}\n  kivnun tune {output / 'spec.yaml'}")


@scenario.command()
@click.argument("name", shell_complete=scenario_names)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The data file to write (JSONL).")
@click.option("--json", "as_json", is_flag=True, help="Print {scenario, rows, output} as one JSON object.")
def convert(name: str, file: Path, output: Path, as_json: bool) -> None:
    """Write a published data set's FILE (JSONL) as rows of the scenario NAME, in its template.

    The keys that each line needs are on the scenario's page: for entities, text and entities (start, end, label).
    """
    from kivnun.cli.screen import print_json, stderr
    from kivnun.data.jsonl import LineProblem, read_objects
    from kivnun.data.scenarios import find_scenario
    from kivnun.data.scenarios.scenario import write_rows
    from kivnun.errors import DataError, RowProblem

    recipe = find_scenario(name).recipe
    rows: list[dict[str, Any]] = []
    problems: list[RowProblem] = []
    for line, value in read_objects(file):
        try:
            if isinstance(value, LineProblem):
                raise DataError(str(value))
            rows.append(recipe.convert(value))
        except DataError as error:
            problems.append(RowProblem(str(file), line, error.message))
    if problems:
        raise DataError(f"{len(problems):,} rows cannot be converted", tuple(problems), hint=f"the page of {name} names the keys")
    write_rows(output, rows)
    if as_json:
        print_json({"scenario": name, "rows": len(rows), "output": str(output)})
    else:
        stderr().print(f"{len(rows):,} rows written to {output}")


@scenario.command()
@click.argument("run", type=FOLDER, shell_complete=run_folders)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The SVG file to write.")
@click.option("--tunes", type=click.IntRange(min=1), default=4, show_default=True, help="Tunes to draw.")
@click.option("--json", "as_json", is_flag=True, help="Print {output, novelty} as one JSON object.")
def roll(run: Path, output: Path, tunes: int, as_json: bool) -> None:
    """Draw tunes of a melody RUN beside their references as piano rolls, and say how new they are beside the training tunes."""
    from kivnun.artifacts import atomic_write
    from kivnun.cli.screen import print_json, stderr, stdout, table
    from kivnun.evaluate.melodies import novelty_of_run, piano_rolls, run_samples

    found = novelty_of_run(run)
    atomic_write(output, piano_rolls(run_samples(run)["tuned"][:tunes]))
    if as_json:
        print_json({"output": str(output), "novelty": {which: asdict(value) for which, value in found.items()}})
        return
    rows = [
        (which, "-" if n.share is None else f"{100 * n.share:.1f} %", f"{n.tunes} of {n.replies}", str(n.copies))
        for which, n in found.items()
    ]
    table(("replies of", "new runs of four notes", "tunes", "copies of a training tune"), rows, stdout())
    stderr().print(f"\nwritten: {output}")


def _overlap_lines(found: Overlap) -> list[tuple[str, str]]:
    topics = [
        (f"topics: {kind}", f"{train:,} in training, {held:,} held out, {both:,} in both")
        for kind, (train, held, both) in found.topics.items()
    ]
    limits = found.as_json()
    return [
        ("rows", f"{found.train_rows:,} to train on, {found.validation_rows:,} held out"),
        *topics,
        ("held-out rows that are training rows", f"{found.equal_rows:,}"),
        ("held-out prompts that are training prompts", f"{found.equal_prompts:,}"),
        (f"near duplicates (Jaccard from {limits['near_from']}, {limits['ngram']} letters)", f"{found.near_rows:,}"),
        ("Jaccard of a held-out row with the nearest", f"median {found.nearest_median:.2f}, highest {found.nearest_highest:.2f}"),
    ]
