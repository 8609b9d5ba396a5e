"""`kivnun truthfulqa`: MC1 and MC2 of a TruthfulQA file, the way the paper computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kivnun.cli.completion import run_folders

FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(short_help="Score a TruthfulQA file: MC1 and MC2 of a base, or of a run before and after.")
@click.argument("file", type=FILE)
@click.option("--base", "model", metavar="MODEL", help="The model to score: a built-in one, a folder, or an id on the hub.")
@click.option(
    "--run", type=click.Path(path_type=Path, file_okay=False), shell_complete=run_folders,
    help="A finished run: its base and its result are both scored.",
)  # fmt: skip
@click.option("--no-primer", is_flag=True, help="Leave out the six examples that the paper puts before each question.")
@click.option("--items", type=FILE, metavar="OUT", help="Write each question's MC1, MC2 and log-probabilities as JSONL.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON object.")
def truthfulqa(file: Path, model: str | None, run: Path | None, no_primer: bool, items: Path | None, as_json: bool) -> None:
    """Score FILE, TruthfulQA as its authors publish it (CSV or JSON) or as the Hugging Face hub does (JSON, JSONL).

    MC1 and MC2 by summed log-probability, with the paper's six examples before each question and no chat template. With --run
    the questions that stand in the run's own training rows are counted too: figures on those say nothing.
    """
    if (model is None) == (run is None):
        raise click.UsageError("give --base MODEL or --run RUN, one of the two")
    from kivnun.cli.process import keep_freed_memory
    from kivnun.cli.screen import print_json, working
    from kivnun.data.choices import read_choices

    keep_freed_memory()
    asked = read_choices(file)
    with working("loading the model") as show:
        from kivnun.showcase.truthfulqa import score_base, score_run, write_items

        found = score_base(model, asked, show, primer=not no_primer) if model is not None else None
        if run is not None:
            found = score_run(run, asked, show, primer=not no_primer)
    assert found is not None
    if items is not None:
        write_items(items, asked, found)
    if as_json:
        print_json({"file": str(file), **found.as_json()})
    else:
        _show(found.as_json())


def _show(record: dict[str, Any]) -> None:
    from kivnun.cli.screen import stderr, stdout, table

    stdout().print(
        f"{record['questions']:,} questions{', 95 % intervals in brackets' if record['intervals'] else ''}", style="bold"
    )
    models = record["models"]
    heads = ("", *models, *(("difference", "") if "difference" in record else ()))
    rows = [
        (name.upper(), *(_cell(scores[name], scores["intervals"].get(name)) for scores in models.values()))
        for name in ("mc1", "mc2")
    ]
    if "difference" in record:
        more = record["difference"]
        rows = [
            (*row, _cell(more[name], more["intervals"].get(name), sign=True), more["verdicts"][name])
            for row, name in zip(rows, ("mc1", "mc2"), strict=True)
        ]
    table(heads, rows)
    for line in record["warnings"]:
        stderr().print(f"note: {line}", style="yellow")


def _cell(value: float, interval: list[float] | None, *, sign: bool = False) -> str:
    form = "{:+.1f}" if sign else "{:.1f}"
    ends = "" if interval is None else f" [{', '.join(form.format(100 * end) for end in interval)}]"
    return f"{form.format(100 * value)} %{ends}"
