"""Every failure is one short message with a hint, a documented status, and with --json one object."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import click
import pytest

from kivnun.cli import failure
from kivnun.cli.main import run
from kivnun.errors import DataError, InterruptedRun, KivnunError, RowProblem, SpecError, StorageError


@pytest.mark.parametrize("kind", failure.error_classes(), ids=lambda kind: kind.code)
def test_an_error_is_shown_with_its_own_code_status_and_hint(kind: type[KivnunError]) -> None:
    shown = failure.describe(kind("it broke", hint="mend it"))
    assert (shown.code, shown.exit_status, shown.message, shown.hint) == (kind.code, kind.exit_status, "it broke", "mend it")
    assert shown.text == "it broke\n  hint: mend it"


def test_codes_and_exit_statuses_are_distinct() -> None:
    classes = failure.error_classes()
    assert len({kind.code for kind in classes}) == len(classes)
    assert len({kind.exit_status for kind in classes}) == len(classes)


def test_data_problems_are_all_in_the_json_and_twenty_in_the_text() -> None:
    problems = tuple(RowProblem("rows.jsonl", line, "not JSON") for line in range(1, 31))
    shown = failure.describe(DataError("30 rows", problems))
    assert len(json.loads(shown.as_json())["error"]["problems"]) == 30
    assert shown.text.count("rows.jsonl:") == 20
    assert "10 more" in shown.text


def test_the_json_of_a_failure_is_one_line_and_says_failed() -> None:
    line = failure.describe(SpecError("two\nlines")).as_json()
    assert "\n" not in line
    assert json.loads(line) == {
        "status": "failed",
        "exit_status": 2,
        "error": {"code": "spec_invalid", "message": "two\nlines", "hint": None},
    }


def test_an_interrupted_run_says_interrupted_not_failed() -> None:
    assert json.loads(failure.describe(InterruptedRun("stopped")).as_json())["status"] == "interrupted"
    assert failure.describe(KeyboardInterrupt()).exit_status == 130


def test_a_missing_file_is_named_with_its_reason() -> None:
    shown = failure.describe(FileNotFoundError(2, "No such file or directory", "rows.jsonl"))
    assert (shown.code, shown.exit_status) == (StorageError.code, StorageError.exit_status)
    assert shown.message == "rows.jsonl: No such file or directory"


def test_an_unexpected_exception_is_short_and_says_how_to_see_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    error = ZeroDivisionError("division by zero")
    shown = failure.describe(error)
    failure.report(shown, error, as_json=False)
    text = capsys.readouterr().err
    assert shown.exit_status == 70
    assert "Traceback" not in text
    assert "KIVNUN_TRACEBACK=1" in text


def test_the_traceback_is_shown_on_request(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIVNUN_TRACEBACK", "1")
    try:
        raise ZeroDivisionError("division by zero")
    except ZeroDivisionError as error:
        failure.report(failure.describe(error), error, as_json=False)
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_unknown_option_is_refused_in_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tune", "spec.yaml", "--outptu", "x", "--json"]) == 2
    out, err = capsys.readouterr()
    assert "--outptu" in err
    assert json.loads(out.splitlines()[-1])["error"]["code"] == "usage"


def test_json_after_a_double_dash_is_an_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tune", "--", "--json"]) != 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "args",
    [["tune", "none.yaml"], ["data", "check", "none.jsonl"], ["data", "show", "none.yaml"]],
    ids=lambda args: "-".join(args[:-1]),
)
def test_a_missing_file_never_gives_a_traceback(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status = run([*args, "--json"])
    out, err = capsys.readouterr()
    assert status in (2, 3)
    assert "none." in err
    assert "Traceback" not in err
    assert json.loads(out.splitlines()[-1])["exit_status"] == status


def test_an_empty_command_line_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert "Usage: kivnun" in capsys.readouterr().err


def test_click_errors_without_a_context_are_shown_too() -> None:
    assert failure.describe(click.ClickException("no")).exit_status == 1
    assert failure.describe(click.UsageError("no")).exit_status == 2


def test_errors_can_be_pickled() -> None:
    """Data workers hand errors to their parent."""
    again = pickle.loads(pickle.dumps(DataError("bad", (RowProblem("a", 1, "b"),), hint="c")))
    assert isinstance(again, DataError)
