"""`kivnun export`: what other programs load, from a finished run."""

from __future__ import annotations

from pathlib import Path

import click

from kivnun.cli.completion import run_folders


@click.command(short_help="Write the tuned model for PEFT or transformers.")
@click.argument("run", type=click.Path(path_type=Path, file_okay=False), shell_complete=run_folders)
@click.option(
    "--to",
    "form",
    type=click.Choice(("peft", "merged")),
    required=True,
    help="peft: the adapter alone. merged: the whole model, adapter folded in.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    required=True,
    help="The folder to make; it must not exist.",
)
@click.option("--json", "as_json", is_flag=True, help="Print {run, form, folder} and the check's figures as one JSON object.")
def export(run: Path, form: str, output: Path, as_json: bool) -> None:
    """Write the tuned model of RUN as a folder that PEFT or transformers loads.

    What is written is read back and compared with the tuned model; a folder that answers differently is not left behind.
    """
    from kivnun.cli.process import keep_freed_memory
    from kivnun.cli.screen import print_json, stderr, stdout, working

    keep_freed_memory()
    with working("loading the run"):
        from kivnun.export.merge import export_run

        result = export_run(run, form, output)
    if as_json:
        print_json(result)
        return
    stdout().print(str(output))
    gate = result.get("gate")
    compared = f", mean KL to base plus adapter {gate['kl']:.1e} over {gate['positions']:,} positions" if gate else ""
    stderr().print(f"written and checked: {form} of {run}{compared}")
    if "note" in result:
        stderr().print(result["note"])
