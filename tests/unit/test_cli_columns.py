"""Two answers on a terminal: each in its column whatever its script, whole when done, and one after the other elsewhere."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from kivnun.cli.columns import END, FIRST_STRONG, GAP, columns, shown

HEBREW = "שלום לכולם, זה משפט ארוך למדי שאינו נכנס בשורה אחת"
ENGLISH = "a sentence of some length that does not fit on one line of a column"


def visible(line: str) -> str:
    return line.replace(FIRST_STRONG, "").replace(END, "")


def test_each_text_keeps_its_column_and_loses_nothing() -> None:
    lines = columns({"base": ENGLISH, "tuned": HEBREW}, 61)
    halves = [visible(line).split(GAP.rstrip()) for line in lines]
    assert all(cell_len(left) == 29 for left, _ in halves)
    assert " ".join(left.strip() for left, _ in halves).strip() == f"base {ENGLISH}"
    assert " ".join(right.strip() for _, right in halves).strip() == f"tuned {HEBREW}"


def test_right_to_left_text_stands_at_the_right_and_every_line_is_isolated() -> None:
    lines = columns({"base": HEBREW, "tuned": ENGLISH}, 61)[1:]
    for line in lines:
        left, right = (half.removeprefix(" ") for half in line.split(GAP.rstrip()))
        if visible(left).strip():
            assert left.endswith(END)  # no space after it
            assert left.lstrip(" ").startswith(FIRST_STRONG)
        if visible(right).strip():
            assert right.startswith(FIRST_STRONG)
        assert line.count(FIRST_STRONG) == line.count(END)


def test_wide_characters_and_line_breaks_count_as_they_are_shown() -> None:
    lines = columns({"base": "漢字" * 20, "tuned": "one\n\ntwo"}, 43)
    assert all(cell_len(visible(line).split(GAP.rstrip())[0]) == 20 for line in lines)
    assert [visible(line).split(GAP.rstrip())[1].strip() for line in lines[1:]] == ["one", "", "two", ""]


@pytest.mark.parametrize(("terminal", "width"), [(False, 200), (True, 99)])
def test_a_narrow_terminal_or_a_file_gets_one_after_the_other(
    terminal: bool, width: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with shown(("base", "tuned"), Console(file=io.StringIO(), force_terminal=terminal, width=width)) as show:
        show("base", "on")
        show("base", "e")
        show("tuned", "two")
    assert capsys.readouterr().out == "base: one\ntuned: two\n"


def test_one_speaker_is_not_named(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(("tuned",), Console(file=io.StringIO(), force_terminal=True, width=200)) as show:
        show("tuned", "two")
    assert capsys.readouterr().out == "two\n"


def test_on_a_wide_terminal_both_stay_side_by_side() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=110, height=5, legacy_windows=False)
    long = " ".join(f"word{number}" for number in range(80))  # more lines than the terminal has
    with shown(("base", "tuned"), console) as show:
        for word in long.split(" "):
            show("base", word + " ")
        show("tuned", HEBREW)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    last = plain[plain.rindex("base") :]
    assert all(f"word{number}" in last for number in range(80))
    assert HEBREW.split()[0] in visible(last)
    assert GAP in last
