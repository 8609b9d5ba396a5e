"""The report: read from the run folder alone, one file, everything escaped, verdicts in words."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kivnun.artifacts import write_manifest
from kivnun.errors import RunFolderError
from kivnun.evaluate.charts import Line, line_chart, short_number, ticks_between
from kivnun.evaluate.report import CURVE_POINTS, read_report, write_report
from kivnun.events import (
    AdapterOpened,
    BaseLoaded,
    CheckpointSaved,
    DataLoaded,
    Evaluated,
    Event,
    EventLog,
    Planned,
    Resumed,
    RunFailed,
    RunFinished,
    RunInterrupted,
    RunStarted,
    StepDone,
    Warned,
)

Intervals = dict[str, tuple[float, float]]

SAMPLES_BASE: list[dict[str, object]] = [
    {"prompt": "Translate to Hebrew: 3 August 2024", "reference": "3 באוגוסט 2024", "reply": "The date is the"},
    {"prompt": "Translate to Hebrew: 17 hours", "reference": "17 שעות", "reply": ""},
    {"prompt": "<script>alert('x')</script> & \"quotes\"", "reference": "</pre><b>bold", "reply": "<img src=x onerror=alert(1)>"},
]
SAMPLES_TUNED: list[dict[str, object]] = [
    {**SAMPLES_BASE[0], "reply": "3 באוגוסט 2024"},
    {**SAMPLES_BASE[1], "reply": "17 שעות"},
    {**SAMPLES_BASE[2], "reply": "</dd></dl>"},
]
TUNED_INTERVALS: Intervals = {
    "nll": (0.171, 0.214),
    "exact_match": (0.84, 0.93),
    "chrf": (93.1, 97.0),
    "nll_difference": (-2.35, -2.19),
    "exact_match_difference": (0.83, 0.93),
    "chrf_difference": (81.0, 86.2),
}


def evaluated(which: str, step: int, nll: float, intervals: Intervals, **scores: float) -> Evaluated:
    assert which in ("base", "tuned")
    samples = SAMPLES_BASE if which == "base" else SAMPLES_TUNED
    return Evaluated("base" if which == "base" else "tuned", step, nll, 300, scores, intervals, samples)


def step_done(step: int, steps: int) -> StepDone:
    loss = 0.19 + 2.3 * math.exp(-step / 60) + 0.05 * math.sin(step * 1.7)
    rate = 4e-3 * min(step / 11, (steps - step) / (steps - 11))
    return StepDone(step, steps, step // 90, loss, 0.8 + 0.2 * math.cos(step), rate, 32, 1210, 305, 1210, 0.11)


def whole_run(steps: int = 360) -> list[Event]:
    base: Intervals = {"nll": (2.38, 2.55), "exact_match": (0.0, 0.012), "chrf": (9.9, 12.6)}
    return [
        RunStarted("demo", "5f" * 32),
        DataLoaded("messages", 2880, 300, 89_310, 27_002, 0, 0),
        BaseLoaded("kivnun/tiny-phi", 3_803_136, "fp32", "ab" * 32, 0.2),
        AdapterOpened("lora", 475_136, {"qkv_proj": 4, "o_proj": 4, "gate_up_proj": 4, "down_proj": 4}, 16),
        evaluated("base", 0, 2.461, base, exact_match=0.003, chrf=11.2),
        *(step_done(step, steps) for step in range(1, steps // 2 + 1)),
        evaluated("tuned", steps // 2, 0.31, {"nll": (0.28, 0.34)}),
        Warned("2 rows of the held-out file also stand in the training file (lines 17 and 40)"),
        *(step_done(step, steps) for step in range(steps // 2 + 1, steps + 1)),
        evaluated("tuned", steps, 0.192, TUNED_INTERVALS, exact_match=0.887, chrf=95.3),
        RunFinished("succeeded", steps, 108_008, 52.4, 512 * 2**20),
    ]


def write_run(folder: Path, events: Sequence[Event]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "resolved.yaml").write_text("version: 1\nbase: kivnun/tiny-phi  # <the built-in base>\nseed: 7\n", encoding="utf-8")
    with EventLog(folder / "events.jsonl", lambda: datetime(2026, 11, 24, 8, 0, tzinfo=UTC)) as log:
        for event in events:
            log.append(event)
    environment = {"python": "3.11.2", "version.torch": "2.13.0+cpu", "threads": 2}
    write_manifest(folder, {"spec_hash": "5f" * 32, "environment": environment}, files=["resolved.yaml"])
    return folder


class Checker(HTMLParser):
    """Collects tags, addresses and visible text, and requires that tags close in order."""

    VOID = ("meta", "br", "img", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "action", "data") or name.startswith("on")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked_page(folder: Path) -> Checker:
    checker = Checker()
    checker.feed(write_report(folder).read_text(encoding="utf-8"))
    assert checker.open == []
    return checker


def test_page_is_one_file_with_every_value_escaped(tmp_path: Path) -> None:
    page = checked_page(write_run(tmp_path / "run", whole_run()))
    assert page.addresses == []
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    for text in ("<script>alert('x')</script> & \"quotes\"", "<img src=x onerror=alert(1)>", "</dd></dl>", "# <the built-in base>"):
        assert text in page.text


def test_page_tells_verdict_figures_and_samples(tmp_path: Path) -> None:
    page = checked_page(write_run(tmp_path / "demo", whole_run()))
    for text in (
        "Better than the base",
        "On 300 held-out rows every measure improved",
        "88.7 %",
        "up by 88.4 points; the 95 % interval of the difference, 83.0 to 93.0, is above zero, the good side.",
        "[84.0 % to 93.0 %]",
        "down by 2.269; the 95 % interval of the difference, −2.350 to −2.190, is below zero, the good side.",
        "Gradient norm",
        "3 באוגוסט 2024",
        "(nothing)",
        "27,002 (30.23 %)",
        "512 MiB",
        "2.13.0+cpu",
        "5f" * 32,
        "(lines 17 and 40)",
    ):
        assert text in page.text


def test_page_tells_what_was_computed_once(tmp_path: Path) -> None:
    shared = [replace(event, computed_tokens=847) if isinstance(event, StepDone) else event for event in whole_run()]
    page = checked_page(write_run(tmp_path / "shared", shared))
    assert "435,600" in page.text
    assert "304,920 (70.00 %): what rows begin with once" in page.text
    assert "of them computed" not in checked_page(write_run(tmp_path / "plain", whole_run())).text


def test_report_json_holds_what_the_page_shows(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo", whole_run())
    write_report(folder)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert (report["version"], report["run"], report["status"]) == (2, "demo", "succeeded")
    assert [figure["name"] for figure in report["figures"]] == ["nll", "exact_match", "chrf"]
    assert {figure["verdict"] for figure in report["figures"]} == {"better"}
    assert report["held_out"] == [[0, 2.461], [180, 0.31], [360, 0.192]]
    assert report["curve"]["step"][-1] == 360
    assert len(report["samples"]) == 3


@pytest.mark.parametrize(
    ("nll", "exact_match", "headline"),
    [
        ((-0.2, -0.1), (0.1, 0.2), "Better than the base"),
        ((0.1, 0.2), (-0.2, -0.1), "Worse than the base"),
        ((-0.1, 0.1), (-0.2, 0.1), "No detectable difference"),
        ((-0.2, -0.1), (-0.2, 0.1), "Better on 1 of 2 measures"),
        ((0.1, 0.2), (-0.2, 0.1), "Worse on 1 of 2 measures"),
        ((-0.2, -0.1), (-0.2, -0.1), "A mixed result"),
        (None, None, "Too few rows for a verdict"),
    ],
)
def test_headline_follows_from_the_paired_intervals(
    tmp_path: Path, nll: tuple[float, float] | None, exact_match: tuple[float, float] | None, headline: str
) -> None:
    found = {"nll_difference": nll, "exact_match_difference": exact_match}
    intervals = {name: interval for name, interval in found.items() if interval is not None}
    events = [evaluated("base", 0, 2.0, {}, exact_match=0.5), evaluated("tuned", 5, 2.0, intervals, exact_match=0.5)]
    assert read_report(write_run(tmp_path / "run", events)).headline == headline


def test_failed_run_without_evaluation_or_manifest_still_has_a_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [RunStarted("run", "00"), RunFailed("non_finite_loss", "the loss of step 3 is nan")])
    (folder / "manifest.json").unlink()
    page = checked_page(folder)
    assert "No verdict" in page.text
    assert "the loss of step 3 is nan" in page.text


UNRELATED: dict[str, object] = {
    "source": "builtin", "rows": 48, "truncated": 0, "content_hash": "cd" * 32, "nll": 5.0, "interval": [4.6, 5.4],
    "by_kind": {"Hebrew": 4.5, "Python": 3.25},
}  # fmt: skip


def with_forgetting(difference: tuple[float, float] | None, verdict: str, change: float = 0.25) -> list[Event]:
    """Return the whole run, base and tuned scored on unrelated text."""
    events: list[Event] = []
    for event in whole_run():
        if isinstance(event, Evaluated) and event.which == "base":
            event = replace(event, forgetting=UNRELATED)
        elif isinstance(event, Evaluated) and event.metrics:
            told = {**UNRELATED, "nll": 5.0 + change, "by_kind": {"Hebrew": 4.75, "Python": 3.0}, "verdict": verdict}
            event = replace(event, forgetting=told if difference is None else {**told, "difference": list(difference)})
        events.append(event)
    return events


@pytest.mark.parametrize(
    ("difference", "change", "verdict", "said", "in_detail"),
    [
        (
            (0.2, 0.3),
            0.25,
            "forgot",
            "5.000 to 5.250 nats per token, +0.250 [0.200 to 0.300], perplexity up 28.4 %",
            True,
        ),
        ((-0.3, -0.2), -0.25, "better there too", "became likelier too: 5.000 to 4.750 nats per token, −0.250", False),
        ((-0.1, 0.6), 0.25, "no detectable forgetting", "is as likely as before, as far as these rows tell", False),
        (None, 0.25, "too few rows", "Fewer than ten rows cannot say whether anything was forgotten", False),
    ],
)
def test_forgetting_is_told_apart_from_the_measures(
    tmp_path: Path, difference: tuple[float, float] | None, change: float, verdict: str, said: str, in_detail: bool
) -> None:
    folder = write_run(tmp_path / "run", with_forgetting(difference, verdict, change))
    report = read_report(folder)
    assert report.headline == "Better than the base"
    assert report.detail.startswith("On 300 held-out rows every measure improved")
    assert ("But it forgot" in report.detail) is in_detail
    assert report.forgetting is not None
    assert report.forgetting.verdict == verdict
    assert report.forgetting.by_kind == [("Hebrew", 4.5, 4.75), ("Python", 3.25, 3.0)]
    page = checked_page(folder)
    assert said in page.text
    assert verdict in page.text


def test_run_without_a_probe_has_no_part_on_forgetting(tmp_path: Path) -> None:
    assert "Forgetting" not in checked_page(write_run(tmp_path / "run", whole_run())).text


def test_base_that_was_not_scored_on_the_text_leaves_no_verdict(tmp_path: Path) -> None:
    events = [replace(event, forgetting={}) if isinstance(event, Evaluated) and event.which == "base" else event
              for event in with_forgetting((0.2, 0.3), "forgot")]  # fmt: skip
    folder = write_run(tmp_path / "run", events)
    report = read_report(folder)
    assert report.forgetting is not None
    assert report.forgetting.verdict is None
    assert "forgot" not in report.detail
    assert "The base was not scored on it" in checked_page(folder).text


FOUND: dict[str, object] = {
    "duplicates": 3,
    "near_duplicates": 0,
    "overlap": 1,
    "near_overlap": 12,
    "problems": 4,
    "reasons": {"the reply is empty": 4},
    "lengths": [[16, 400, 40], [32, 2400, 250], [64, 80, 10]],
}
PARTS = {"process": 200 * 2**20, "weights": 15 * 2**20, "adapter": 2**20, "activations": 184 * 2**20}


def with_plan(seconds: float = 40.0) -> list[Event]:
    events = [replace(event, findings=FOUND) if isinstance(event, DataLoaded) else event for event in whole_run()]
    events.insert(2, Planned(400 * 2**20, PARTS, seconds, 360))
    return events


def test_page_tells_what_the_data_hold(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", with_plan())
    report = read_report(folder)
    assert report.findings is not None
    assert report.findings.counts["held-out rows nearly equal to a training row"] == 12
    assert report.findings.lengths == [(16, 400, 40), (32, 2400, 250), (64, 80, 10)]
    page = checked_page(folder)
    assert report.findings.counts["of them: the reply is empty"] == 4
    for text in (
        "training rows equal to an earlier one",
        "of them: the reply is empty",
        "Lengths of rows",
        "up to 32 tokens: 2,400 training rows, 250 held out",
    ):
        assert text in page.text
    assert page.tags.count("rect") == 6
    older = checked_page(write_run(tmp_path / "older", whole_run()))
    assert "Lengths of rows" not in older.text
    assert "equal to an earlier one" not in older.text


def test_page_holds_the_plan_against_what_was_taken(tmp_path: Path) -> None:
    page = checked_page(write_run(tmp_path / "run", with_plan()))
    for text in ("1.28 × the plan", "1.31 × the plan", "400 MiB", "512 MiB", "184 MiB", "40.0 s", "52.4 s", "360 of 360"):
        assert text in page.text
    assert "The plan" not in checked_page(write_run(tmp_path / "older", whole_run())).text


def test_parts_of_the_plan_take_their_share_of_the_bar(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", with_plan())
    text = write_report(folder).read_text(encoding="utf-8")
    assert 'style="width:39.06%" title="process: 200 MiB"' in text  # of 512 MiB, which were taken
    assert 'style="width:35.94%" title="activations: 184 MiB"' in text


def test_time_that_could_not_be_planned_is_not_known(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", with_plan(math.nan))
    assert "not known" in checked_page(folder).text
    assert json.loads((folder / "report.json").read_text(encoding="utf-8"))["plan"]["seconds"] is None


def test_spec_is_shown_as_given_and_as_resolved(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", whole_run())
    (folder / "spec.yaml").write_text("base: kivnun/tiny-phi  # mine & no other\n", encoding="utf-8")
    page = checked_page(folder)
    assert "# mine & no other" in page.text
    assert "# <the built-in base>" in page.text


def test_run_that_was_interrupted_says_so_and_gives_no_verdict(tmp_path: Path) -> None:
    """Scores on the way through training are not held against the base's: they are no `too few rows`."""
    events = [event for event in whole_run(20) if not isinstance(event, RunFinished)][:-1]
    folder = write_run(tmp_path / "run", [*events, RunInterrupted(20)])
    report = read_report(folder)
    assert report.headline == "No verdict"
    assert report.detail == "Base and tuned model were not compared: the run was interrupted."
    assert "Interrupted by the user after step 20." in report.stopped
    assert [figure.verdict for figure in report.figures] == [None, None, None]
    assert "--resume" in checked_page(folder).text


def test_resumed_run_draws_each_step_once(tmp_path: Path) -> None:
    first = [step_done(step, 10) for step in range(1, 8)]
    again = [step_done(step, 10) for step in range(5, 11)]
    saved = CheckpointSaved(4, "checkpoints/step-000004", 0.1)
    report = read_report(write_run(tmp_path / "run", [*first[:4], saved, *first[4:], Resumed(4, saved.path), *again]))
    assert report.curve is not None
    assert report.curve.step == list(range(1, 11))
    assert report.notes == ["Resumed at step 4."]


def test_long_curve_is_thinned_and_keeps_its_mean(tmp_path: Path) -> None:
    events: list[Event] = [step_done(step, 1001) for step in range(1, 1002)]
    curve = read_report(write_run(tmp_path / "run", events)).curve
    assert curve is not None
    assert curve.steps_per_point == 3
    assert len(curve.loss) == 334 <= CURVE_POINTS
    assert curve.step[-1] == 1001


def test_page_of_a_one_step_run_is_drawn(tmp_path: Path) -> None:
    assert "svg" in checked_page(write_run(tmp_path / "run", [step_done(1, 1)])).tags


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="does not exist"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 0.9, [0, 0.2, 0.4, 0.6, 0.8]),
        (1, 360, [50, 100, 150, 200, 250, 300, 350]),
    ],
)
def test_ticks_are_round_numbers_inside_the_range(low: float, high: float, ticks: list[float]) -> None:
    assert ticks_between(low, high) == pytest.approx(ticks)


def test_ticks_are_written_shortly() -> None:
    assert [short_number(value) for value in (0, 0.25, 2000, 4e-4, 2.5e-5, 1e8)] == ["0", "0.25", "2,000", "4e-4", "2.5e-5", "1e8"]


def test_chart_keeps_every_point_inside_its_frame() -> None:
    svg = line_chart([Line("train", [(1, 5.0), (2, -1.0), (3, 2.5)], dots=True)], "step", "loss", "a <chart>")
    heights = [float(part.split('"')[0]) for part in svg.split('cy="')[1:]]
    assert len(heights) == 3
    assert all(12 <= height <= 210 for height in heights)
    assert "a &lt;chart&gt;" in svg
