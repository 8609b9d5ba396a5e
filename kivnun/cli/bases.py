"""`kivnun bases`: the bases that need no download."""

from __future__ import annotations

from collections.abc import Mapping

import click

from kivnun.cli.screen import print_json, table


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list of {id, family, parameters, folder, licence}.")
def bases(as_json: bool) -> None:
    """List the built-in bases.

    Each folder opens with transformers' AutoModelForCausalLM.from_pretrained. Any other causal language model is named in the
    spec by its folder or its id on the Hugging Face hub.
    """
    from kivnun.model.families import builtin_bases

    rows = [
        {"id": b.id, "family": b.family, "parameters": b.parameters, "folder": str(b.folder), "licence": b.licence}
        for b in builtin_bases()
    ]
    if as_json:
        print_json(rows)
        return
    table(("id", "family", "parameters", "licence", "folder"), [_cells(row) for row in rows])


def _cells(row: Mapping[str, object]) -> tuple[str, ...]:
    return (str(row["id"]), str(row["family"]), f"{row['parameters']:,}", str(row["licence"]), str(row["folder"]))
