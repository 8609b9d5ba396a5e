"""Scenarios from their files to a scored run, a few rows each: the metrics that need no reply, and the control's verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scenarios import Control, Side, sections
from kivnun.data.scenarios import find_scenario
from kivnun.pipeline import tune
from kivnun.spec import load_spec

ONE_STEP = (
    "schedule.epochs=null",
    "schedule.steps=1",
    "schedule.batch_rows=4",
    "evaluation.generate_rows=12",
    "evaluation.samples=1",
)


@pytest.mark.parametrize(("name", "metric"), [("domain", "perplexity"), ("classification", "macro_f1")])
def test_a_scenario_is_tuned_and_scored_by_its_spec(name: str, metric: str, tmp_path: Path) -> None:
    replace(find_scenario(name), train_rows=8, validation_rows=12).write(tmp_path)
    spec = load_spec(tmp_path / "spec.yaml", ONE_STEP)
    result = tune(spec, (tmp_path / "spec.yaml").read_text(encoding="utf-8"), tmp_path / "run")
    low, high = result["tuned"]["intervals"][f"{metric}_difference"]
    assert low <= result["tuned"][metric] - result["base"][metric] <= high
    assert result["tuned"]["verdicts"][metric] in ("better", "no detectable difference", "worse")
    assert metric in (tmp_path / "run" / "report.json").read_text(encoding="utf-8")
    assert "Perplexity" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8") or metric == "macro_f1"


def side(value: float, low: float, high: float, verdict: str) -> Side:
    intervals = {"macro_f1": [value, value], "macro_f1_difference": [low, high]}
    tuned = {"macro_f1": value, "nll": 1.0, "intervals": intervals, "verdicts": {"macro_f1": verdict}}
    return Side(3, 1.0, 2.0, {"macro_f1": 0.1, "nll": 2.0, "intervals": {"macro_f1": [0.1, 0.1]}}, tuned)


@pytest.mark.parametrize(
    ("full", "shuffled", "stays"),
    [
        ("better", "no detectable difference", True),
        ("better", "worse", True),
        ("better", "better", False),
        ("no detectable difference", "no detectable difference", False),
    ],
)
def test_a_task_stays_when_its_rows_beat_the_base_and_shuffled_ones_do_not(full: str, shuffled: str, stays: bool) -> None:
    overlap = {
        **{"train_rows": 8, "validation_rows": 12, "topics": {"title": [3, 2, 0]}, "equal_rows": 0, "equal_prompts": 0},
        **{"near_rows": 0, "nearest_median": 0.1, "nearest_highest": 0.2},
    }
    control = Control("made up", "macro_f1", side(0.7, 0.5, 0.7, full), side(0.1, -0.1, 0.1, shuffled), overlap, {})
    assert control.stays is stays
    decided = sections([control])[0].as_markdown()
    assert ("| yes |" if stays else "| no |") in decided
    assert "[50.0 %, 70.0 %]" in decided
