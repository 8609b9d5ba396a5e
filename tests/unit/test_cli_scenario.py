"""`kivnun scenario`: lists, writes and converts without torch; wrong input is told with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli_light import loaded_by

from kivnun.cli.main import run
from kivnun.data.scenarios import SCENARIOS


def test_the_list_names_every_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["scenario", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [found["name"] for found in listed] == [scenario.name for scenario in SCENARIOS]
    assert listed[0]["main_metric"] == "perplexity"
    assert run(["scenario", "list"]) == 0
    assert "melodies" in capsys.readouterr().out


def test_writing_shows_the_overlap_and_loads_no_torch(tmp_path: Path) -> None:
    command = ["scenario", "write", "translation", "--output", str(tmp_path / "new"), "--json"]
    status, loaded, out = loaded_by(command, ("torch", "transformers", "matplotlib"))
    assert (status, loaded) == (0, [])
    told = json.loads(out)
    assert told["overlap"] == json.loads((tmp_path / "new/overlap.json").read_text(encoding="utf-8"))
    assert told["overlap"]["topics"]["date"][2] == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "overlap.json",
        "spec.yaml",
        "train.jsonl",
        "validation.jsonl",
    ]


def test_for_people_the_overlap_is_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["scenario", "write", "chat", "--output", str(tmp_path), "--shuffled"]) == 0
    shown = capsys.readouterr()
    assert "topics: persona" in shown.out
    assert "kivnun tune" in shown.err


def test_an_unknown_name_is_a_spec_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["scenario", "write", "poems", "--output", str(tmp_path), "--json"]) == 2
    assert "there is no scenario 'poems'" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_published_spans_are_converted_and_wrong_lines_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"text": "Dana came.", "entities": [{"start": 0, "end": 4, "label": "person"}]}
    source, out = tmp_path / "spans.jsonl", tmp_path / "rows.jsonl"
    source.write_text(json.dumps(good) + "\n", encoding="utf-8")
    assert run(["scenario", "convert", "entities", str(source), "--output", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"scenario": "entities", "rows": 1, "output": str(out)}
    assert json.loads(out.read_text(encoding="utf-8"))["messages"][1]["content"] == "person: Dana"
    source.write_text(json.dumps(good) + "\n" + json.dumps({"text": "Dana"}) + "\nnot json\n", encoding="utf-8")
    assert run(["scenario", "convert", "entities", str(source), "--output", str(tmp_path / "none.jsonl")]) == 3
    told = capsys.readouterr().err
    assert "spans.jsonl:2: entities must be a list" in told
    assert "spans.jsonl:3:" in told
    assert not (tmp_path / "none.jsonl").exists()
