"""`kivnun compare`: several finished runs side by side, each held against the first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from kivnun.cli.completion import run_folders

if TYPE_CHECKING:
    from kivnun.evaluate.compare import ComparedRun, Comparison

RUN = click.Path(path_type=Path, file_okay=False)
# Beyond this many neither a table nor a chart can be read.
MOST_RUNS = 12


@click.command(short_help="Hold several runs against one another, on the same held-out rows.")
@click.argument("runs", type=RUN, nargs=-1, required=True, metavar="RUN RUN ...", shell_complete=run_folders)
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write a page to this file: one .html file."
)
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as one JSON object.")
def compare(runs: tuple[Path, ...], output: Path | None, as_json: bool) -> None:
    """Show what several finished runs got, and whether each is better or worse than the first RUN.

    Differences are paired: the same held-out rows, matched by what they hold. Runs with other rows are shown without one.
    """
    _check(runs, output)
    from kivnun.cli.screen import print_json, stderr, stdout, working

    with working("reading the runs"):
        from dataclasses import asdict

        from kivnun.artifacts import atomic_write
        from kivnun.evaluate.compare import compare_runs
        from kivnun.evaluate.compare_page import render

        found = compare_runs(runs)
        if output is not None:
            atomic_write(output, render(found))
    if as_json:
        print_json(asdict(found))
    else:
        _show(found, stdout())
    if output is not None:
        stderr().print(f"page: {output}", style="bold")


def _check(runs: tuple[Path, ...], output: Path | None) -> None:
    if len(runs) < 2:
        raise click.UsageError(f"compare takes two runs or more, got {len(runs)}; the report.html of a run shows one")
    if len(runs) > MOST_RUNS:
        raise click.UsageError(f"compare takes {MOST_RUNS} runs at most, got {len(runs)}")
    seen: set[Path] = set()
    for run in runs:
        if run.resolve() in seen:
            raise click.UsageError(f"{run} is named twice")
        seen.add(run.resolve())
    if output is not None and output.suffix != ".html":
        raise click.UsageError(f"--output writes a page: its name must end in .html, got {output}")
    if output is not None and not output.absolute().parent.is_dir():
        raise click.UsageError(f"--output: the folder {output.absolute().parent} does not exist")


def _show(found: Comparison, console: Console) -> None:
    from kivnun.cli.screen import table
    from kivnun.evaluate.compare import in_a_sentence, short_hash

    table(("", *(run.name for run in found.runs)), [*_scores(found), *_facts(found.runs)], console)
    console.print(f"\nagainst {found.reference}, on the same rows, 95 % intervals in brackets", style="bold")
    table(("", "run", "difference", ""), [_difference(one) for one in found.differences], console)
    console.print()
    for run in found.runs[1:]:
        console.print(f"{in_a_sentence(found, run.name)}.")
    for heading, differing in (("spec", found.spec), ("manifest", found.record)):
        if differing:
            console.print(f"\nwhat differs in the {heading}", style="bold")
            table(
                ("", *(run.name for run in found.runs)),
                [(name, *map(short_hash, values)) for name, values in differing.items()],
                console,
            )


def _scores(found: Comparison) -> list[tuple[str, ...]]:
    from kivnun.cli.screen import figure

    def cell(run: ComparedRun, name: str) -> str:
        if name not in run.scores:
            return "-"
        score = run.scores[name]
        ends = f" [{figure(name, score.interval[0])}, {figure(name, score.interval[1])}]" if score.interval else ""
        return f"{figure(name, score.tuned)}{ends}"

    rows = [(name, *(cell(run, name) for run in found.runs)) for name in found.measures]
    if any(run.forgetting for run in found.runs):
        rows.append(("unrelated text", *(_unrelated(run.forgetting) for run in found.runs)))
    return rows


def _unrelated(forgetting: dict[str, Any]) -> str:
    if not forgetting:
        return "-"
    base = forgetting["base_nll"]
    change = "" if base is None else f" ({forgetting['nll'] - base:+.4f}: {forgetting.get('verdict', 'not compared')})"
    return f"{forgetting['nll']:.4f}{change}"


def _facts(runs: list[ComparedRun]) -> list[tuple[str, ...]]:
    from kivnun.cli.screen import clock_time

    return [
        ("held-out rows", *(f"{run.held_out_rows:,}" for run in runs)),
        ("base", *(run.base_model for run in runs)),
        ("adapter", *(run.adapter for run in runs)),
        ("trained parameters", *(f"{run.trained_parameters:,}" for run in runs)),
        ("steps", *(f"{run.steps:,}" for run in runs)),
        ("trained tokens", *(f"{run.trained_tokens:,}" for run in runs)),
        ("time", *(clock_time(run.seconds) for run in runs)),
        ("peak memory", *(f"{run.peak_bytes / 2**20:,.0f} MiB" for run in runs)),
    ]


def _difference(one: Any) -> tuple[str, str, str, str]:
    from kivnun.cli.screen import figure
    from kivnun.evaluate.compare import UNRELATED

    name, label = ("nll", "unrelated text") if one.measure == UNRELATED else (one.measure, one.measure)
    if one.value is None:
        return label, one.run, "", f"not paired: {one.unpaired}"
    ends = f" [{figure(name, one.interval[0])}, {figure(name, one.interval[1])}]" if one.interval else ""
    return label, one.run, f"{'+' if one.value >= 0 else ''}{figure(name, one.value)}{ends}", one.verdict
