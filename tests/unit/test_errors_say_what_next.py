"""Every error says what to do next: each place that raises one gives a hint, or stands in a short list with the reason why not."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kivnun.cli import failure
from kivnun.cli.main import cli, run
from kivnun.data.formats import read_records
from kivnun.errors import DataError, KivnunError, RowProblem, SpecError, path_of
from kivnun.spec import MultiProcessSpec, load_spec

PACKAGE = Path(__file__).parents[2] / "kivnun"
NAMES = {kind.__name__ for kind in (KivnunError, *failure.error_classes())}
AS_A_ROW = "told as a problem of a row, with its line, by an error that has the hint"
WITHOUT: dict[tuple[str, str], str] = {
    ("cli/scenario.py", "convert"): AS_A_ROW,
    ("data/abc_notation.py", "tune"): AS_A_ROW,
    ("data/abc_notation.py", "_error"): AS_A_ROW,
    ("data/abc_notation.py", "read"): AS_A_ROW,
    ("data/entity_spans.py", "checked_spans"): AS_A_ROW,
    ("data/entity_spans.py", "_check"): AS_A_ROW,
    ("data/tokens.py", "make_drafts"): AS_A_ROW,
    ("data/tokens.py", "_check_prompts"): AS_A_ROW,
    ("events.py", "from_json"): "read_events adds the file, the line and the hint",
    ("spec/problems.py", "spec_error"): "each of the problems has its own hint, below it",
    **{(f"data/scenarios/{name}/recipe.py", "convert"): AS_A_ROW for name in (
        "chat", "classification", "domain", "entities", "melodies", "question_answering", "translation",
    )},
}  # fmt: skip


def raised() -> Iterator[tuple[str, str, int, bool]]:
    """Yield (file, function, line, has a hint) of every error of ours that the package makes."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
                around = [f for f in functions if f.lineno <= node.lineno <= (f.end_lineno or 0)]
                name = max(around, key=lambda f: f.lineno).name if around else ""
                hints = [keyword.value for keyword in node.keywords if keyword.arg == "hint"]
                given = bool(hints) and not (isinstance(hints[0], ast.Constant) and not hints[0].value)
                yield str(path.relative_to(PACKAGE)), name, node.lineno, given


def test_every_error_has_a_hint_or_a_reason_for_none() -> None:
    found = list(raised())
    assert len(found) > 150, "the walk finds the errors"
    assert [f"{file}:{line}" for file, name, line, hint in found if not hint and (file, name) not in WITHOUT] == []
    used = {(file, name) for file, name, _, hint in found if not hint}
    assert set(WITHOUT) - used == set(), "these have hints by now"


def test_classes_of_errors_are_made_by_name_so_that_the_walk_sees_them() -> None:
    """No error is raised through another name: an alias or an attribute would escape the test above."""
    escaped = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and node.attr in NAMES)
        or (isinstance(node, ast.alias) and node.name in NAMES and node.asname is not None)
        or (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name) and node.exc.id in NAMES)
    ]
    assert escaped == []


@pytest.mark.parametrize("kind", failure.error_classes(), ids=lambda kind: kind.code)
def test_the_page_is_the_last_line_and_in_the_json(kind: type[KivnunError]) -> None:
    error = kind("it broke", hint="mend it", pages=("01-misspelt-key",))
    shown = failure.describe(error)
    assert shown.text == f"it broke\n  hint: mend it\n  more: {path_of('01-misspelt-key')}"
    assert json.loads(shown.as_json())["error"]["pages"] == [path_of("01-misspelt-key")]
    assert "pages" not in json.loads(failure.describe(kind("it broke")).as_json())["error"]


def test_pages_of_rows_are_those_of_the_error_each_once() -> None:
    rows = (RowProblem("a", 1, "x", "05-wrong-role"), RowProblem("a", 2, "x", "05-wrong-role"), RowProblem("a", 3, "y"))
    assert DataError("bad", rows, pages=("04-bad-json-line",)).pages == ("04-bad-json-line", "05-wrong-role")


def test_a_row_keeps_its_page_through_reading(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "bot", "content": "x"}]}\n{\n', encoding="utf-8")
    _, _, problems = read_records(tmp_path / "rows.jsonl")
    assert [problem.page for problem in problems] == ["05-wrong-role", "04-bad-json-line"]


def test_every_problem_of_a_spec_has_a_hint_where_something_can_be_meant(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("version: 1\nbase: a/b\ndata: {trian: x}\nschedule: {lr: 1}\n", encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        load_spec(tmp_path / "x.yaml", ("seed",))
    assert caught.value.message.count("hint:") == 4  # train missing, trian, lr, the override without a value


# --- click's own parser ---


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("tnue spec.yaml", "'tune'"),
        ("data chek rows.jsonl", "'check'"),
        ("tune spec.yaml --outptu x", "'--output'"),
        ("chat run --max_new_tokens 3", "'--max-new-tokens'"),
        ("data check rows.jsonl --format mesages", "messages"),
        ("tune spec.yaml --learning-rate 1e-3", "--set schedule.learning_rate=..."),
        ("tune spec.yaml --lora_r 8", "--set adapter.rank=..."),
    ],
)
def test_the_nearest_name_is_told(line: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line.split()) == 2
    err = capsys.readouterr().err
    assert f"id you mean {meant}?" in err
    assert "--help lists what is allowed" in err


@pytest.mark.parametrize("line", ["zzz", "tune spec.yaml --zzz", "tune", "tune a b", "data", "advise --devices many"])
def test_every_refusal_of_a_command_line_says_where_what_is_allowed_stands(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line.split()) == 2
    assert "--help" in capsys.readouterr().err


def test_the_commands_that_hints_name_exist() -> None:
    """A hint that says `kivnun x` must not send anybody to a command that is not there."""
    texts = [
        node.value
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    named = {name for text in texts for name in re.findall(r"(?<![\w/])kivnun ([a-z]+)\b", text)}
    prose = {"runs", "is", "does", "with", "has"}
    assert named - set(cli.commands) - prose == set()


def test_a_run_that_divides_state_without_deepspeed_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from kivnun.parts import refuse_missing_deepspeed

    compute = MultiProcessSpec(processes=2, zero_stage=3)
    refuse_missing_deepspeed(MultiProcessSpec(processes=2, zero_stage=0))
    monkeypatch.setattr("kivnun.parts.find_spec", lambda name: None)
    refuse_missing_deepspeed(MultiProcessSpec(processes=2, zero_stage=0))
    with pytest.raises(SpecError, match="zero_stage is 3, which needs DeepSpeed") as caught:
        refuse_missing_deepspeed(compute)
    assert "kivnun[deepspeed]" in str(caught.value.hint)
