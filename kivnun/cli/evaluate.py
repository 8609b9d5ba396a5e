"""`kivnun evaluate`: score a finished run's held-out rows again, base against tuned."""

from __future__ import annotations

from pathlib import Path

import click

from kivnun.cli.completion import run_folders

RUN = click.Path(path_type=Path, file_okay=False)


@click.command(short_help="Score a run's held-out rows, base against tuned.")
@click.argument("run", type=RUN, shell_complete=run_folders)
@click.option("--json", "as_json", is_flag=True, help="Print {run, base, tuned} as one JSON object.")
def evaluate(run: Path, as_json: bool) -> None:
    """Score the held-out rows of RUN with its base and with its adapter.

    Loads both from disk, so the figures are those of what was saved.
    """
    from kivnun.cli.process import keep_freed_memory
    from kivnun.cli.result import show_comparison
    from kivnun.cli.screen import print_json, stdout, working

    keep_freed_memory()
    with working("loading the run") as show:
        from kivnun.evaluate.evaluation import result_fields
        from kivnun.opened import open_run

        base, tuned = (result_fields(scored) for scored in open_run(run).evaluate(show))
    if as_json:
        print_json({"run": str(run), "base": base, "tuned": tuned})
    else:
        show_comparison(stdout(), base, tuned)
