"""A line of the log holds what is listed and nothing else, and the code writes no message that could hold more."""

from __future__ import annotations

import ast
import json
import logging
from pathlib import Path
from typing import Any

import pytest

import kivnun
from kivnun.errors import SpecError
from kivnun.service.logs import COUNTS, NAMES, JsonLines

SECRET = "a-secret-2b71"


def _line(
    message: str, *args: object, logger: str = "kivnun.x", error: BaseException | None = None, **fields: Any
) -> dict[str, Any]:
    info = None if error is None else (type(error), error, error.__traceback__)
    record = logging.LogRecord(logger, logging.ERROR, "x.py", 7, message, args, info)
    record.__dict__.update(fields)
    written = JsonLines().format(record)
    assert SECRET not in written
    assert "\n" not in written
    return json.loads(written)


def test_listed_fields_are_written_and_others_are_not() -> None:
    line = _line("done", action="told", job="ftjob-1", tokens=7, filename=SECRET, prompt=SECRET, messages=[SECRET], content=SECRET)
    assert {name: line[name] for name in ("message", "action", "job", "tokens")} == {
        "message": "done", "action": "told", "job": "ftjob-1", "tokens": 7
    }  # fmt: skip
    assert set(line) == {"time", "level", "logger", "message", "action", "job", "tokens"}
    assert len(_line("done", worker="w" * 5000)["worker"]) == 200
    assert _line("done", tokens=float("inf"))["message"] == "done"


@pytest.mark.parametrize(
    ("message", "args", "written"),
    [
        ("%s of %d", (SECRET, 3), "… of 3"), ("%s", (SpecError(SECRET, hint=SECRET),), "SpecError"),
        ("%s", ("SpecError",), "SpecError"), ("%s", ([SECRET],), "…"), ("%(a)s", ({"a": SECRET},), "%(a)s"),
        ("%d", (SECRET,), "%d"), ("%s %s", (1,), "%s %s"), ("100 %", (), "100 %"),
    ],
)  # fmt: skip
def test_of_a_message_s_arguments_numbers_and_types_of_errors_are_shown(
    message: str, args: tuple[object, ...], written: str
) -> None:
    assert _line(message, *args)["message"] == written


def test_of_an_error_its_type_its_code_and_its_place_are_told() -> None:
    try:
        try:
            raise ValueError(SECRET)
        except ValueError as cause:
            raise SpecError(SECRET, hint=SECRET) from cause
    except SpecError as error:
        told = _line("failed", error=error)["error"]
    assert (told["type"], told["code"], told["cause"]) == ("kivnun.errors.SpecError", "spec_invalid", "builtins.ValueError")
    assert told["at"][-1].endswith("test_of_an_error_its_type_its_code_and_its_place_are_told")


def test_another_library_s_line_tells_where_it_was_written_and_no_more() -> None:
    assert _line(f"GET /?key={SECRET}", logger="some.library", action="x")["message"] == "x:7"


def _calls() -> list[tuple[str, ast.Call]]:
    found: list[tuple[str, ast.Call]] = []
    for package in ("jobs", "service", "worker"):
        for path in sorted((Path(kivnun.__file__).parent / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                    levels = ("debug", "info", "warning", "error", "exception", "critical")
                    if node.func.value.id in ("log", "logger", "logging") and node.func.attr in levels:
                        found.append((f"{path.name}:{node.lineno}", node))
    return found


def test_every_message_of_the_service_is_a_constant_and_every_field_is_listed() -> None:
    calls = _calls()
    assert len(calls) > 15
    for place, call in calls:
        assert isinstance(call.args[0], ast.Constant), f"{place}: a message is a constant; values go into extra"
        for extra in (keyword.value for keyword in call.keywords if keyword.arg == "extra"):
            if isinstance(extra, ast.Dict):
                names = {key.value for key in extra.keys if isinstance(key, ast.Constant)}
                assert names <= {*NAMES, *COUNTS}, f"{place}: not listed in logs.py: {names - {*NAMES, *COUNTS}}"
