"""The generated pages of docs/reference are what the code says now."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import click
import pytest

from kivnun.cli.failure import exit_statuses
from kivnun.cli.main import cli

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["reference_cli", "reference_errors"])
def test_the_page_is_current(name: str) -> None:
    writer = script(name)
    assert writer.PAGE.read_text(encoding="utf-8") == writer.page(), "run `make docs`"


def test_every_exit_status_is_in_the_help_and_in_the_reference() -> None:
    shown = cli.get_help(click.Context(cli, info_name="kivnun"))
    page = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    for status, code, _ in exit_statuses():
        assert f"{status}  {code}" in shown
        assert f"| {status} | {f'`{code}`' if code else ''} |" in page


def test_every_option_of_every_command_has_a_help_text() -> None:
    waiting: list[click.Command] = [cli]
    while waiting:
        command = waiting.pop()
        if isinstance(command, click.Group):
            waiting.extend(command.commands.values())
        for option in command.params:
            assert not isinstance(option, click.Option) or option.help, f"{command.name} {option.name}"
        assert command.help
