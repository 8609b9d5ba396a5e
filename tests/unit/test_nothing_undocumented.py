"""Nothing that a user can meet is undocumented; and each check here is shown to find what it looks for."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

import click
import pytest

from kivnun import events
from kivnun.cli.failure import error_classes
from kivnun.cli.main import cli
from kivnun.errors import KivnunError
from kivnun.spec.catalogue import Option, options
from pages import ROOT

REFERENCE = ROOT / "docs" / "reference"


def in_command(command: click.Command, path: str = "kivnun") -> Iterator[str]:
    """Yield what of a command, and of those below it, has no words."""
    if not (command.help or "").strip():
        yield f"{path}: no help"
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not (parameter.help or "").strip():
            yield f"{path} {parameter.opts[0]}: no help"
        if isinstance(parameter, click.Argument) and (parameter.metavar or parameter.human_readable_name) not in (
            command.help or ""
        ):
            yield f"{path} {parameter.human_readable_name}: its help does not say what it is"
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from in_command(below, f"{path} {name}")


def in_error(kind: type[KivnunError]) -> Iterator[str]:
    """A class without words of its own would show its parent's."""
    if not vars(kind).get("__doc__"):
        yield f"{kind.__name__}: no words of its own"
    for name in ("code", "exit_status"):
        if name not in vars(kind):
            yield f"{kind.__name__}: no {name} of its own"


def in_event(kind: Any) -> Iterator[str]:
    """A dataclass without words is given its signature as its words."""
    if not kind.__doc__ or kind.__doc__.startswith(f"{kind.__name__}("):
        yield f"{kind.__name__}: no words"
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        meaning = [part for part in getattr(hints[field.name], "__metadata__", ()) if isinstance(part, str)]
        if not meaning or not meaning[0].strip():
            yield f"{kind.__name__}.{field.name}: no meaning"


def in_option(option: Option) -> Iterator[str]:
    if not option.description.strip():
        yield f"{option.path}: no description"
    if not option.required and not option.path.endswith("kind") and not option.why.strip():
        yield f"{option.path}: no reason for its default"


# --- the checks, on what there is ---


def test_every_command_option_and_argument_has_words() -> None:
    assert list(in_command(cli)) == []


@pytest.mark.parametrize("kind", error_classes(), ids=lambda kind: kind.__name__)
def test_every_error_has_words_a_code_and_a_status_of_its_own(kind: type[KivnunError]) -> None:
    assert list(in_error(kind)) == []
    assert f"## `{kind.code}`" in (REFERENCE / "errors.md").read_text(encoding="utf-8")


def test_every_event_and_each_of_its_fields_has_words() -> None:
    assert [line for kind in events.EVENTS.values() for line in in_event(kind)] == []


def test_every_class_that_is_an_event_is_among_the_events() -> None:
    here = [kind for _, kind in inspect.getmembers(events, inspect.isclass) if kind.__module__ == events.__name__]
    classes = {kind for kind in here if isinstance(vars(kind).get("name"), str)}
    assert classes == set(events.EVENTS.values()) == set(get_args(events.Event))
    page = (REFERENCE / "events.md").read_text(encoding="utf-8")
    assert [name for name in events.EVENTS if f"\n## {name}\n" not in page] == []


def test_every_option_has_a_description_and_a_reason() -> None:
    assert [line for option in options() for line in in_option(option)] == []


# --- the checks, on what is lacking ---


def test_a_command_without_words_is_found() -> None:
    @click.command()
    @click.argument("thing")
    @click.option("--bare")
    @click.option("--told", help="Told.")
    def bad(thing: str, bare: str, told: str) -> None: ...

    @click.group(help="A group.")
    def group() -> None: ...

    group.add_command(bad)
    found = list(in_command(group))
    assert [line.partition(":")[0] for line in found] == ["kivnun bad", "kivnun bad THING", "kivnun bad --bare"]


def test_an_error_without_words_is_found() -> None:
    class Bad(KivnunError):
        code = "bad"

    try:
        assert list(in_error(Bad)) == ["Bad: no words of its own", "Bad: no exit_status of its own"]
    finally:
        del Bad  # it is a subclass as long as it lives, and others list those
        gc.collect()
    assert "bad" not in {kind.code for kind in error_classes()}


def test_an_event_without_words_is_found() -> None:
    @dataclass(frozen=True)
    class Bad:
        name: ClassVar[str] = "bad"
        plain: int = 0
        blank: Annotated[int, " "] = 0
        told: Annotated[int, "told"] = 0

    found = list(in_event(Bad))
    assert found == ["Bad: no words", "Bad.plain: no meaning", "Bad.blank: no meaning"]


def test_an_option_without_words_is_found() -> None:
    bad = Option("a.b", None, "a number", False, "1", " ", "")
    assert list(in_option(bad)) == ["a.b: no description", "a.b: no reason for its default"]
