"""The table and the samples at the end of a run."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from kivnun.cli import result
from kivnun.events import Evaluated, EventLog

BASE = {
    "nll": 4.25,
    "rows": 200,
    "exact_match": 0.01,
    "chrf": 12.5,
    "intervals": {"nll": [4.1, 4.4], "exact_match": [0.0, 0.025]},
}
TUNED = {
    "nll": 0.25,
    "rows": 200,
    "exact_match": 0.985,
    "chrf": 97.1,
    "intervals": {"nll": [0.2, 0.31], "nll_difference": [-4.15, -3.85], "exact_match_difference": [0.95, 0.995]},
    "verdicts": {"nll": "better", "exact_match": "better"},
}
HEBREW = "‏3 בינואר 2024, 5.00 ₪"


def console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, markup=False, highlight=False, soft_wrap=True), text


def test_the_table_holds_base_tuned_and_difference_with_their_intervals() -> None:
    where, text = console()
    result.show_comparison(where, BASE, TUNED)
    lines = text.getvalue().splitlines()
    nll = next(line for line in lines if line.startswith("nll")).split("  ")
    assert [cell.strip() for cell in nll if cell.strip()] == [
        "nll",
        "4.2500 [4.1000, 4.4000]",
        "0.2500 [0.2000, 0.3100]",
        "-4.0000 [-4.1500, -3.8500]",
        "better",
    ]
    assert any("1.0 % [0.0 %, 2.5 %]" in line and "+97.5 % [95.0 %, 99.5 %]" in line for line in lines)
    assert any(line.startswith("chrf") and "12.5" in line and "97.1" in line for line in lines)


def test_a_metric_that_only_the_tuned_model_has_is_shown() -> None:
    where, text = console()
    result.show_comparison(where, {"nll": 1.0, "rows": 3, "intervals": {}}, {"nll": 0.5, "rows": 3, "chrf": 50.0, "intervals": {}})
    assert any(line.split() == ["chrf", "-", "50.0"] for line in text.getvalue().splitlines())


def test_samples_pair_the_same_prompt_and_keep_every_character(tmp_path: Path) -> None:
    base = [{"prompt": "Jan 3", "reference": HEBREW, "reply": "?"}, {"prompt": "only base", "reference": "r", "reply": "x"}]
    tuned = [{"prompt": "Jan 3", "reference": HEBREW, "reply": HEBREW}]
    with EventLog(tmp_path / "events.jsonl", lambda: datetime(2026, 1, 1, tzinfo=UTC)) as log:
        log.append(Evaluated("base", 0, 4.0, 2, {}, {}, base))
        log.append(Evaluated("tuned", 5, 1.0, 2, {}, {}, []))
        log.append(Evaluated("tuned", 9, 1.0, 2, {}, {}, tuned))
    pairs = result.sample_pairs(tmp_path)
    assert [(before["reply"], after["reply"]) for before, after in pairs] == [("?", HEBREW)]
    where, text = console()
    result.show_samples(where, pairs)
    lines = text.getvalue().splitlines()
    assert f"reference  {HEBREW}" in lines
    assert f"tuned      {HEBREW}" in lines


def test_brackets_and_newlines_in_samples_are_text() -> None:
    where, text = console()
    sample = {"prompt": "[bold]a[/bold]\nb", "reference": "[red]", "reply": "[/red]"}
    result.show_samples(where, [(sample, sample)])
    assert "prompt     [bold]a[/bold] ⏎ b" in text.getvalue()
    assert "tuned      [/red]" in text.getvalue()


def test_the_next_commands_name_the_run(tmp_path: Path) -> None:
    where, text = console()
    (tmp_path / "adapter").mkdir()
    result.show_next(where, tmp_path)
    assert f"kivnun chat {tmp_path}" in text.getvalue()
    assert str(tmp_path / "adapter") in text.getvalue()
