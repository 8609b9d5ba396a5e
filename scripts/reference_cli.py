"""Writes docs/reference/cli.md from the commands themselves, so that the page cannot say what the program does not.

Run by `make docs`; `tests/unit/test_cli_reference.py` fails when the page is out of date.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from kivnun.cli.failure import exit_statuses
from kivnun.cli.main import cli

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "cli.md"
HEAD = """# Commands

Written by `scripts/reference_cli.py` from the commands' own help; do not edit.
"""


def page() -> str:
    """Return the page's text."""
    parts = [HEAD, *(_section(name, command) for name, command in _commands("kivnun", cli)), "## Exit statuses\n", _statuses()]
    return "\n".join(parts)


def _commands(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for below, child in command.commands.items():
            yield from _commands(f"{name} {below}", child)


def _section(name: str, command: click.Command) -> str:
    # A fixed width, and no epilog: the statuses stand once, at the end.
    context = click.Context(command, info_name=name, terminal_width=100, max_content_width=100, help_option_names=["-h", "--help"])
    formatter = context.make_formatter()
    command.format_usage(context, formatter)
    command.format_help_text(context, formatter)
    command.format_options(context, formatter)
    return f"## `{name}`\n\n```\n{formatter.getvalue().rstrip()}\n```\n"


def _statuses() -> str:
    rows = [f"| {status} | {f'`{code}`' if code else ''} | {meaning} |" for status, code, meaning in exit_statuses()]
    return "\n".join(["| status | error code | meaning |", "|---|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
