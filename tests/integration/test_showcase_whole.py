"""`kivnun showcase` from end to end: everything once in a very small form, and the quick form as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import kivnun.showcase.run
from kivnun.artifacts import hash_file
from kivnun.cli.main import run
from kivnun.showcase.run import Size

SMALL = Size("quick", 9, 10, 10, 10, 1, 1, 1, 16)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kivnun.showcase.run, "QUICK", SMALL)


@pytest.mark.usefixtures("small")
def test_a_showcase_is_made_gone_on_with_and_never_made_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "showcase"
    assert run(["showcase", "--quick", "--output", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["figures"]) == {"base", "tuned", "shuffled", "contaminated"}
    assert Path(found["page"]).read_text(encoding="utf-8").startswith("<!doctype html>")
    record = json.loads(Path(found["record"]).read_text(encoding="utf-8"))
    assert record["figures"] == found["figures"]

    kept = {path: hash_file(path) for path in sorted((folder / "runs").rglob("*")) if path.is_file()}
    times = {path: path.stat().st_mtime_ns for path in sorted((folder / "scores").iterdir())}
    assert run(["showcase", "--quick", "--output", str(folder)]) == 5
    assert "--resume" in capsys.readouterr().err
    assert run(["showcase", "--quick", "--output", str(folder), "--resume"]) == 0
    assert "answers shuffled" in capsys.readouterr().out
    assert {path: hash_file(path) for path in sorted((folder / "runs").rglob("*")) if path.is_file()} == kept
    assert {path: path.stat().st_mtime_ns for path in sorted((folder / "scores").iterdir())} == times

    assert run(["showcase", "--output", str(folder), "--resume"]) == 5  # another size: its runs are other runs
    assert "choose another --output" in capsys.readouterr().err


@pytest.mark.slow
def test_the_quick_form_shows_what_it_is_there_to_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["showcase", "--quick", "--output", str(tmp_path / "showcase"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert figures["base"]["mc1"]["value"] < 0.55
    assert figures["tuned"]["robust"]["verdict"] == "better"
    assert figures["shuffled"]["mc1"]["verdict"] != "better"
    assert figures["contaminated"]["mc1"]["value"] > 0.93
