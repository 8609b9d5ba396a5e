"""Comparing runs: rows are paired by what they hold, what cannot be paired has no difference, and the page shows it all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kivnun.cli.main import run
from kivnun.errors import IntegrityError, RunFolderError
from kivnun.evaluate.compare import UNRELATED, Comparison, Difference, compare_runs, flat, in_a_sentence, short_hash
from kivnun.evaluate.compare_page import COLOURS, render, style_of
from kivnun.evaluate.evaluation import load_evaluation
from kivnun.evaluate.intervals import difference_interval
from kivnun.events import StepDone
from runs import at_step, chats, killed, run_spec, write_rows, write_spec
from tiny_task import make_base

EVALUATION = {
    "samples": 1,
    "bootstrap": 200,
    "forgetting": "builtin",
    "metrics": ["exact_match", "chrf"],
    "generate_rows": 12,
    "max_new_tokens": 4,
}
ROWS = chats(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of finished runs: three on the same held-out rows, one on these in another order, one on others."""
    place = tmp_path_factory.mktemp("runs")
    base = make_base(place / "base")
    write_rows(place / "held.jsonl", ROWS[:24])
    spec = write_spec(place, base, ROWS[24:], data={"validation": "held.jsonl"}, evaluation=EVALUATION)
    run_spec(spec, place / "first")
    run_spec(spec, place / "second", "adapter.rank=2", "schedule.learning_rate=0.05")
    run_spec(spec, place / "short", "schedule={steps: 1, learning_rate: 1e-9, batch_rows: 4}")
    write_rows(place / "turned.jsonl", [*ROWS[12:24], *ROWS[:12]])
    run_spec(spec, place / "turned", "data.validation=turned.jsonl")
    write_rows(place / "others.jsonl", ROWS[6:30])
    run_spec(spec, place / "others", "data.validation=others.jsonl", "schedule.epochs=1")
    killed(spec, place / "unfinished", at_step(3))
    return place


def compared(folder: Path, *names: str) -> Comparison:
    return compare_runs([folder / name for name in names])


def difference(found: Comparison, run: str, measure: str = "nll") -> Difference:
    return next(one for one in found.differences if (one.run, one.measure) == (run, measure))


def test_differences_are_those_of_the_same_rows(folder: Path) -> None:
    found = compared(folder, "first", "second")
    first, second = (load_evaluation(folder / name / "evaluation" / "tuned.json") for name in ("first", "second"))
    for measure in ("nll", "exact_match", "chrf"):
        one = difference(found, "second", measure)
        assert one.value == second.measures[measure].figure - first.measures[measure].figure
        assert one.interval == difference_interval(first.measures[measure], second.measures[measure], 200, 7)
        assert one.unpaired == ""
    assert found.reference == "first"
    assert found.measures == ["nll", "exact_match", "chrf"]
    assert "first" in difference(found, "second").words


def test_rows_in_another_order_are_paired_by_what_they_hold(folder: Path) -> None:
    one = difference(compared(folder, "first", "turned"), "turned")
    assert one.value == pytest.approx(0.0, abs=1e-6)
    assert one.interval is not None
    # The same training on the same rows: every row is paired with itself, so that no draw tells the runs apart.
    assert np.abs(one.interval).max() < 1e-6
    first, turned = (load_evaluation(folder / name / "evaluation" / "tuned.json") for name in ("first", "turned"))
    assert first.keys["rows"] != turned.keys["rows"]
    by_number = difference_interval(first.measures["nll"], turned.measures["nll"], 200, 7)
    assert by_number is not None
    assert np.abs(by_number).max() > 1e-3


def test_other_held_out_rows_have_no_difference(folder: Path) -> None:
    found = compared(folder, "first", "others")
    for measure in ("nll", "exact_match", "chrf"):
        one = difference(found, "others", measure)
        assert (one.value, one.interval, one.verdict) == (None, None, None)
    assert difference(found, "others").unpaired == "the rows differ: 18 of 24 and 24 are the same"
    assert in_a_sentence(found, "others") == "others cannot be paired with first"
    assert difference(found, "others", UNRELATED).value is not None


def test_unrelated_text_is_compared_and_counts_in_no_sentence(folder: Path) -> None:
    found = compared(folder, "first", "second")
    unrelated = difference(found, "second", UNRELATED)
    first, second = found.runs
    assert unrelated.value == second.forgetting["nll"] - first.forgetting["nll"]
    assert first.forgetting["base_nll"] == second.forgetting["base_nll"]
    told = [one.verdict for one in found.differences if one.measure != UNRELATED]
    sentence = in_a_sentence(found, "second")
    assert ("better" in sentence) == ("better" in told)
    assert ("worse" in sentence) == ("worse" in told)


@pytest.mark.parametrize(
    ("verdicts", "sentence"),
    [
        (["better", "better"], "b is better than a"),
        (["better", "no detectable difference"], "b is better than a on 1 of 2 measures"),
        (["worse", "too few rows"], "b is worse than a"),
        (["better", "worse"], "b is better than a on 1 of 2 measures and worse on 1"),
        (["no detectable difference"], "b shows no detectable difference from a"),
        (["too few rows"], "b cannot be told from a: too few rows"),
        ([None], "b cannot be paired with a"),
    ],
)
def test_the_sentence_follows_from_the_verdicts(verdicts: list[Any], sentence: str) -> None:
    differences = [Difference(f"m{at}", "b", "a", 0.1, None, verdict, "", "") for at, verdict in enumerate(verdicts)]
    differences.append(Difference(UNRELATED, "b", "a", 0.1, None, "worse", "", ""))
    assert in_a_sentence(Comparison(1, "a", [], [], differences, {}, {}), "b") == sentence


def test_only_what_differs_of_the_specs_is_told(folder: Path) -> None:
    found = compared(folder, "first", "second", "short")
    assert set(found.spec) == {
        "adapter.rank", "adapter.alpha", "schedule.learning_rate", "schedule.epochs", "schedule.steps",
    }  # fmt: skip
    assert found.spec["adapter.rank"] == ["4", "2", "4"]
    assert found.spec["schedule.steps"] == ["null", "null", "1"]
    assert found.record == {}
    assert "data_hash" in compared(folder, "first", "others").record


def test_what_each_took_is_told(folder: Path) -> None:
    first, short = compared(folder, "first", "short").runs
    steps = [json.loads(line) for line in (folder / "first" / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert first.steps == sum(line["name"] == StepDone.name for line in steps) > short.steps == 1
    assert first.trained_parameters == short.trained_parameters > 0
    assert first.seconds > 0
    assert first.peak_bytes > 0
    assert first.held_out_rows == 24
    assert first.curve is not None
    assert len(first.held_out) >= 2


def without_keys(folder: Path, name: str, more: Callable[[dict[str, Any]], None] = lambda record: None) -> None:
    path = folder / name / "evaluation" / "tuned.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["row_keys"]
    more(record)
    path.write_text(json.dumps(record), encoding="utf-8")


def test_runs_from_before_rows_were_named_are_paired_on_the_same_data(folder: Path, tmp_path: Path) -> None:
    for name in ("first", "second", "others"):
        shutil.copytree(folder / name, tmp_path / name)
    without_keys(tmp_path, "second")
    old = difference(compared(tmp_path, "first", "second"), "second", "chrf")
    assert old == difference(compared(folder, "first", "second"), "second", "chrf")
    without_keys(tmp_path, "others", lambda record: record.update(forgetting={}))
    found = compared(tmp_path, "first", "others")
    assert "from before rows were named" in difference(found, "others").unpaired
    assert [one for one in found.differences if one.measure == UNRELATED] == []


def test_a_measure_that_one_run_lacks_is_not_paired(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "second", tmp_path / "second")
    without_keys(tmp_path, "second", lambda record: record["per_row"].pop("chrf"))
    found = compare_runs([folder / "first", tmp_path / "second"])
    assert difference(found, "second", "chrf").unpaired == "second did not measure it"


def test_folders_of_the_same_name_are_told_apart(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "first", tmp_path / "first")
    names = [one.name for one in compare_runs([folder / "first", tmp_path / "first"]).runs]
    assert names == [f"{folder.name}/first", f"{tmp_path.name}/first"]


@pytest.mark.parametrize(
    ("name", "said"), [("unfinished", "has not come to its end"), ("nowhere", "is no folder"), ("base", "it has no resolved.yaml")]
)
def test_a_folder_without_a_finished_run_is_refused(folder: Path, name: str, said: str) -> None:
    with pytest.raises(RunFolderError, match=said) as caught:
        compared(folder, "first", name)
    assert caught.value.hint is not None


def test_a_damaged_evaluation_is_told(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "second", tmp_path / "second")
    (tmp_path / "second" / "evaluation" / "tuned.json").write_text("{", encoding="utf-8")
    with pytest.raises(IntegrityError, match="is not a saved evaluation"):
        compare_runs([folder / "first", tmp_path / "second"])


# --- the command and the page ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["first"], "compare takes two runs or more, got 1"),
        (["first", "first"], "is named twice"),
        (["first"] * 13, "12 runs at most, got 13"),
        (["first", "second", "--output", "page.txt"], "must end in .html"),
        (["first", "second", "--output", "nowhere/page.html"], "does not exist"),
        ([], "Missing argument"),
    ],
)
def test_a_line_that_makes_no_comparison_is_refused(
    folder: Path, args: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert run(["compare", *args]) == 2
    assert said in capsys.readouterr().err


def test_the_terminal_shows_figures_differences_and_specs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", str(folder / "first"), str(folder / "second"), str(folder / "others")]) == 0
    out = capsys.readouterr().out
    found = compared(folder, "first", "second", "others")
    value = difference(found, "second").value
    assert value is not None
    for text in (
        f"{value:+.4f}",
        f"{found.runs[0].scores['nll'].tuned:.4f} [",
        "not paired: the rows differ: 18 of 24 and 24 are the same",
        "unrelated text",
        "trained parameters",
        "adapter.rank",
        f"{in_a_sentence(found, 'second')}.",
    ):
        assert text in out


def test_json_is_one_object_that_holds_everything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", str(folder / "first"), str(folder / "short"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"version", "reference", "runs", "measures", "differences", "spec", "record"}
    assert [one["name"] for one in found["runs"]] == ["first", "short"]
    assert found["differences"][0]["measure"] == "nll"
    assert found["runs"][0]["scores"]["nll"]["base"] == found["runs"][1]["scores"]["nll"]["base"]


class Checker(HTMLParser):
    """Requires that tags close in order and that nothing is loaded or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.classes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "img", "link", "iframe")
        assert not {name for name, _ in attrs} & {"src", "href"}
        self.classes += [value or "" for name, value in attrs if name == "class"]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.classes += [value or "" for name, value in attrs if name == "class"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_one_file_with_every_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = tmp_path / "<b>&first"
    shutil.copytree(folder / "first", named)
    page = tmp_path / "compare.html"
    assert run(["compare", str(named), str(folder / "second"), str(folder / "others"), "--output", str(page)]) == 0
    assert str(page) in capsys.readouterr().err
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert "<b>&first" in checker.text
    for said in ("Held-out loss", "chrF", "against its own base", "the rows differ: 18 of 24", "adapter.rank", "Learning rate"):
        assert said in checker.text
    assert {f"line r{number}" for number in range(3)} <= set(checker.classes)


def test_the_page_of_two_runs_begins_with_the_verdict(folder: Path) -> None:
    found = compared(folder, "first", "second")
    assert f'<p class="headline">{in_a_sentence(found, "second")}</p>' in render(found)


def test_runs_beyond_the_colours_are_dashed() -> None:
    assert len({style_of(number) for number in range(2 * COLOURS)}) == 2 * COLOURS
    assert style_of(COLOURS) == "r0 dashed"


def test_leaves_are_named_by_their_paths() -> None:
    tree = {"a": {"b": 1, "c": []}, "d": [{"path": "x", "share": None}], "e": ["q", "v"], "f": "text", "g": {}}
    assert flat(tree) == {"a.b": "1", "a.c": "[]", "d.0.path": "x", "d.0.share": "null", "e": '["q", "v"]', "f": "text", "g": "{}"}


def test_hashes_are_cut_and_nothing_else() -> None:
    assert short_hash("ab" * 32) == "abababababab…"
    assert short_hash("ab" * 31) == "ab" * 31
