"""`kivnun data check`: what is in files before a run, as a table, as JSON and as a page that is one file and escapes everything."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_data_loader import ByteTokenizer, chat, spec_of, texts, write

from kivnun.cli.main import run
from kivnun.data import problems
from kivnun.data.checks import Check, check_files, describe_check, histogram
from kivnun.data.loader import load_dataset
from kivnun.errors import DataError, RowProblem
from kivnun.evaluate.data_page import MAX_TEXT, render


class Tags(HTMLParser):
    """Gathers a page's tags, its words, and the `dir` of the elements that hold text of rows."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def labelled(*labels: str) -> list[dict[str, str]]:
    return [{"text": f"row {at} says {'so ' * at}", "label": label} for at, label in enumerate(labels)]


def test_files_are_counted_together_and_the_held_out_file_apart(tmp_path: Path) -> None:
    first, second = write(tmp_path, texts("a", "b", "long text one", "a"), "a.jsonl"), write(tmp_path, texts("b", "c"), "b.jsonl")
    held = write(tmp_path, texts("c", "d", "long text ONE"), "held.jsonl")
    found = check_files([first, second], held)
    assert (found.train.rows, found.train.characters, found.train.path) == (6, 18, f"{first}, {second}")
    assert found.held_out is not None
    assert (found.held_out.rows, found.held_out.characters) == (3, 15)
    assert (found.train.duplicates, found.found.overlap, found.found.near_overlap) == (2, 1, 1)
    assert [(Path(p.row.path).name, p.row.line, p.other.line) for p in found.found.pairs["duplicates"]] == [
        ("a.jsonl", 4, 1), ("b.jsonl", 1, 2),
    ]  # fmt: skip
    assert found.lengths == ((4, 5, 2), (6, 0, 0), (8, 0, 0), (12, 0, 0), (16, 1, 1))
    table = dict(describe_check(found))
    assert (table["held-out rows also trained on"], table["held-out rows nearly trained on"]) == ("1", "1")
    assert "tokens" not in table


def test_with_a_base_lengths_are_tokens_and_the_templates_refusals_are_problems(tmp_path: Path) -> None:
    system = {"messages": [{"role": "system", "content": "s"}, *chat("a", "b")["messages"]]}
    path = write(tmp_path, [chat("a", "b"), system, chat("a", "b" * 20)])
    found = check_files([path], tokenizer=ByteTokenizer(), longest_row=10)
    assert [problem.line for problem in found.problems] == [2]
    assert (found.unit, found.total, found.longest, found.over_long) == ("tokens", 7 + 26, 26, 1)
    assert dict(describe_check(found))["tokens"] == "33, 26 in the longest row"


def test_a_check_and_a_run_count_the_same(tmp_path: Path) -> None:
    rows = texts("a", "b", "a", "a longer text that is here", "a longer text that is HERE", "c")
    path, held = write(tmp_path, rows), write(tmp_path, texts("a", "x", "a Longer text that is here"), "held.jsonl")
    report = load_dataset(spec_of(path, validation=held), ByteTokenizer(), 0, 100).report
    found = check_files([path], held, tokenizer=ByteTokenizer())
    told = report.findings()
    assert told["lengths"] == [list(step) for step in found.lengths]
    counts = {name: told[name] for name in ("duplicates", "near_duplicates", "overlap", "near_overlap")}
    assert counts == {name: getattr(found.found, name) for name in counts}
    assert counts == {"duplicates": 1, "near_duplicates": 1, "overlap": 1, "near_overlap": 1}


def test_a_histogram_counts_every_row_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 3000, 500)
    steps = histogram(lengths[:400], lengths[400:])
    assert (sum(train for _, train, _ in steps), sum(held for _, _, held in steps)) == (400, 100)
    below = 0
    for most, train, held in steps:
        assert train + held == int(((lengths > below) & (lengths <= most)).sum())
        below = most
    assert steps[-1][1] + steps[-1][2] > 0
    assert histogram(lengths[:0], lengths[:0]) == ()


def test_labels_are_shown_where_few_replies_come_again_and_again(tmp_path: Path) -> None:
    path = write(tmp_path, labelled("yes", "no", "yes", "no", "yes"))
    held = write(tmp_path, labelled("no", "maybe"), "held.jsonl")
    assert check_files([path], held).labels == {"yes": (3, 0), "no": (2, 1), "maybe": (0, 1)}
    assert check_files([write(tmp_path, labelled("one", "two", "three"), "b.jsonl")]).labels == {}
    assert check_files([write(tmp_path, texts("a", "a", "a"), "c.jsonl")]).labels == {}
    many = [chat("q", f"reply {at % 70}") for at in range(700)]
    assert check_files([write(tmp_path, many, "d.jsonl")]).labels == {}


def test_problems_beyond_those_kept_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "KEPT", 3)
    path = write(tmp_path, [*texts("a"), *["{"] * 7, {"text": 1}])
    found = check_files([path])
    assert (found.bad_rows, len(found.problems), sum(found.train.reasons.values())) == (8, 3, 8)
    with pytest.raises(DataError, match=r"8 of 9 rows cannot be used \(the first 3 problems are listed, 5 more are not\)"):
        load_dataset(spec_of(path), ByteTokenizer(), 0, 100)


def test_a_row_with_two_problems_of_one_kind_counts_once() -> None:
    gathered = problems.Problems()
    for line, message in ((1, "messages[0] is bad"), (1, "messages[3] is bad"), (2, "it's not what the row's key says")):
        gathered.add(RowProblem("a", line, message))
    assert gathered.rows == 2
    assert gathered.reasons == {"it's not what the row's key says": 1, "messages[] is bad": 1}


# --- the page ----------------------------------------------------------------------------------------------------------------


def hostile(tmp_path: Path) -> Check:
    rows: list[Any] = [
        chat("<script>alert(1)</script>", "</dd><img src=x onerror=alert(2)>"),
        chat("שלום", "<b>כן</b>"),
        chat("x" * (MAX_TEXT + 5), ""),
        chat("שלום", "<b>כן</b>"),
    ]
    return check_files(
        [write(tmp_path, [*rows, *["{"] * 30, {"<i>": 1}], "<u>rows.jsonl")], write(tmp_path, rows[:2], "held.jsonl")
    )


def test_the_page_is_one_file_without_script_and_escapes_what_rows_say(tmp_path: Path) -> None:
    page = render(hostile(tmp_path))
    tags = Tags(page)
    assert {"script", "img", "link", "iframe", "object", "b", "u", "i"}.isdisjoint(tag for tag, _ in tags.tags)
    assert not re.search(r"(src|href|action)=|url\(|@import|https?://", re.sub(r"&lt;.*?&gt;", "", page))
    assert [attrs for tag, attrs in tags.tags if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"]
    assert "<script>alert(1)</script>" in tags.words
    texts_of_rows = [attrs for tag, attrs in tags.tags if tag == "dd" and "dir" in attrs]
    assert len(texts_of_rows) == 6
    assert {attrs["dir"] for attrs in texts_of_rows} == {"auto"}
    assert "… (5 more characters)" in tags.words
    assert "(nothing)" in tags.words


def test_the_page_lists_every_problem_and_where_rows_repeat(tmp_path: Path) -> None:
    found = hostile(tmp_path)
    words = Tags(render(found)).words
    assert "31 of 37 rows cannot be used" in words
    for problem in found.problems:
        assert f"{problem.path}:{problem.line}{problem.message}" in words
    assert "Exact duplicates: 1" in words
    assert "Held-out rows also trained on: 2" in words
    assert "held-out, drawn to a scale of its own" in words
    alone = Tags(render(check_files([write(tmp_path, texts("a", "b"))]))).words
    assert "2 rows to train on" in alone
    assert "cannot be used" not in alone
    assert "held" not in alone.partition("2 rows to train on")[2].partition("Kivnun")[2]


# --- the command -------------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, texts("a", "b", "a"))
    write(tmp_path, texts("b"), "held.jsonl")
    assert run(["data", "check", "rows.jsonl", "--held-out", "held.jsonl"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"exact duplicates +1", out)
    assert re.search(r"held-out rows also trained on +1", out)
    assert err == "report: data_report.html\n"
    assert "3 rows to train on, 1 held out" in (tmp_path / "data_report.html").read_text(encoding="utf-8")


def test_bad_rows_end_with_status_3_and_the_page_holds_them_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, [*texts("a"), *["{"] * 30])
    assert run(["data", "check", "rows.jsonl", "--report", "page.html"]) == 3
    err = capsys.readouterr().err
    assert err.startswith("report: page.html\ndata_invalid: rows.jsonl: 30 of 31 rows cannot be used\n")
    assert "and 10 more" in err
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("not valid JSON at column 2") == 30
    assert not (tmp_path / "data_report.html").exists()


@pytest.mark.parametrize("flag", ["--json", "--no-report"])
def test_no_page_is_written_where_none_is_wanted(tmp_path: Path, flag: str) -> None:
    write(tmp_path, texts("a"))
    assert run(["data", "check", "rows.jsonl", flag]) == 0
    assert not (tmp_path / "data_report.html").exists()


def test_json_is_one_object_with_the_training_files_report_on_top(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, texts("a", "b", "a"))
    assert run(["data", "check", "rows.jsonl", "--held-out", "rows.jsonl", "--json", "--report", "page.html"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["duplicates"], told["found"]["overlap"], told["held_out"]["rows"]) == (3, 1, 3, 3)
    assert told["found"]["pairs"]["duplicates"][0]["row"] == {"path": "rows.jsonl", "line": 3}
    assert "samples" not in told
    assert (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_is_told_after_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, texts("a"))
    write(tmp_path, ["{"], "bad.jsonl")
    assert run(["data", "check", "rows.jsonl", "--report", "bad.jsonl/page.html"]) == 6
    out, err = capsys.readouterr()
    assert re.search(r"rows +1", out)
    assert "give --no-report" in err
    assert run(["data", "check", "bad.jsonl", "--report", "bad.jsonl/page.html"]) == 3
    assert "cannot write bad.jsonl" in capsys.readouterr().err


def test_a_base_counts_tokens_and_columns_name_what_a_table_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table.csv").write_text("q,kind,id\nis it,yes,1\nwas it,no,2\n", encoding="utf-8")
    asked = ["table.csv", "--columns", "text=q", "--columns", "label=kind", "--instruction", "Which?", "--base", "kivnun/tiny-phi"]
    assert run(["data", "check", *asked]) == 0
    out = capsys.readouterr().out
    assert re.search(r"format +classification", out)
    assert re.search(r"tokens +\d+, \d+ in the longest row", out)
    assert "columns not used: id" in out
    assert "Which? is it" in (tmp_path / "data_report.html").read_text(encoding="utf-8")
    assert run(["data", "check", "table.csv", "--columns", "text"]) == 2
    assert run(["data", "check", "table.csv", "--report", "a.html", "--no-report"]) == 2
