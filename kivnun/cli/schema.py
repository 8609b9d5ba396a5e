"""`kivnun schema`: the JSON Schema of the spec, for editors that complete and check YAML."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print it on one line.")
def schema(as_json: bool) -> None:
    """Print the JSON Schema of the spec.

    Save it beside your spec and name it in the spec's first line, and an editor completes and checks what you write:
    `# yaml-language-server: $schema=kivnun.schema.json`
    """
    from kivnun.spec import json_schema

    click.echo(json.dumps(json_schema(), indent=None if as_json else 2, ensure_ascii=False))
