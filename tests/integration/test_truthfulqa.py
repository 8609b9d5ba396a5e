"""`kivnun truthfulqa` from end to end: a base, a run before and after, what was trained on, and what is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kivnun.cli.main import run
from tiny_task import HEBREW, WORDS, make_spec

QUESTIONS = [
    {
        "question": f"{word} 3",
        "best_answer": f"{hebrew} 3",
        "correct_answers": [f"{hebrew} 3", f"{hebrew}"],
        "incorrect_answers": [f"{HEBREW[number - 1]} 3", f"{HEBREW[number - 3]} 3"],
    }
    for number, (word, hebrew) in enumerate(zip(WORDS, HEBREW, strict=True))
]


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("task")
    assert run(["tune", str(make_spec(place, base)), "--output", str(place / "run")]) == 0
    return place / "run"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    more = [{**row, "question": f"And {row['question']}"} for row in QUESTIONS]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (*QUESTIONS, *more)), encoding="utf-8")
    return path


def test_a_run_is_scored_before_and_after_and_what_it_was_trained_on_is_told(
    tuned: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    items = tmp_path / "items.jsonl"
    assert run(["truthfulqa", str(file), "--run", str(tuned), "--no-primer", "--items", str(items), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["questions"] == 16
    assert set(found["models"]) == {"base", "tuned"}
    assert set(found["difference"]["verdicts"]) == {"mc1", "mc2"}
    low, high = found["difference"]["intervals"]["mc2"]
    assert low <= found["difference"]["mc2"] <= high
    assert "of 16 questions stand in the run's training rows" in found["warnings"][0]
    rows = [json.loads(line) for line in items.read_text(encoding="utf-8").splitlines()]
    for name in ("base", "tuned"):
        assert sum(row["models"][name]["mc1"] for row in rows) / 16 == pytest.approx(found["models"][name]["mc1"])


def test_the_base_of_a_run_gets_what_the_base_gets_alone(
    base: Path, tuned: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for option, value in (("--base", base), ("--run", tuned)):
        capsys.readouterr()
        assert run(["truthfulqa", str(file), option, str(value), "--no-primer", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["models"]["base"])
    assert found[0]["mc1"] == found[1]["mc1"]
    assert found[0]["mc2"] == pytest.approx(found[1]["mc2"], abs=1e-5)


def test_a_prompt_beyond_the_bases_length_is_told(base: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["truthfulqa", str(file), "--base", str(base)]) == 0
    shown = capsys.readouterr()
    assert "MC1" in shown.out
    assert "the base was made for 256" in shown.err


@pytest.mark.parametrize("more", [[], ["--base", "kivnun/tiny-phi", "--run", "somewhere"]])
def test_one_of_base_and_run_is_wanted(file: Path, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["truthfulqa", str(file), *more]) == 2
    assert "one of the two" in capsys.readouterr().err


def test_a_broken_file_is_told_before_a_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(QUESTIONS[0]) + '\n{"question": "?"}\n', encoding="utf-8")
    assert run(["truthfulqa", str(path), "--base", "no/such-model", "--json"]) == 3
    shown = capsys.readouterr()
    assert f"{path}:2: best_answer is missing" in shown.err
    assert json.loads(shown.out.splitlines()[-1])["error"]["problems"][0]["line"] == 2
