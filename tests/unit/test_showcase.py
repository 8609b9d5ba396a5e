"""The showcase's figures and page: computed again from what every model gave to every answer, in words that follow from them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import Checker

from kivnun.artifacts import atomic_write
from kivnun.data.scenarios.multiple_choice.questions import KINDS, VARIATIONS, Question, questions
from kivnun.evaluate.evaluation import Evaluation, save_evaluation
from kivnun.evaluate.metrics import Measure
from kivnun.randomness import generator
from kivnun.showcase.bars import Bar, Group, grouped_bars
from kivnun.showcase.documentation import docstrings
from kivnun.showcase.figures import MEASURES, figure, of_questions
from kivnun.showcase.page import conclusions, headline, render
from kivnun.showcase.published import NOT_KNOWN, PUBLISHED
from kivnun.showcase.run import ARMS, FULL, QUICK, SEED, Size, _near, _record, bars, by_kind, spec_text
from kivnun.showcase.scores import Scores, kept_scores, scores_from_json
from kivnun.spec import load_spec

SIZE = Size("quick", 45, 45, 12, 12, 2, 1, 1, 16)
TRAIN, TEST = questions("train", SIZE.train_questions, SEED), questions("test", SIZE.test_questions, SEED)
# How far the best answer is above the false ones, in nats, on the average: what each made-up model knows.
KNOWS = {"base": 0.0, "tuned": 5.0, "shuffled": -1.0, "contaminated": 20.0}


def made_up(name: str) -> Scores:
    """Return scores of a model that likes the best answer as much as KNOWS says."""
    rng = generator(3, "test.showcase", name)
    more = KNOWS[name.split("-")[0]]

    def liked(count: int) -> tuple[float, ...]:
        values = rng.normal(-20.0, 2.0, count)
        values[0] += more
        return tuple(round(value, 3) for value in values.tolist())

    return Scores(
        tuple(liked(len(q.true) + len(q.false)) for q in TEST),
        tuple(tuple(liked(4) for _ in range(VARIATIONS)) for _ in TEST),
        tuple((float(round(30 + rng.normal(), 3)), 10.0) for _ in range(SIZE.texts)),
    )


NAMES = ["base", *(f"{arm.name}-{seed}" for arm in ARMS for seed in (1, 2))]
SCORES = {name: made_up(name) for name in NAMES}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("showcase")
    for name in NAMES[1:]:
        place = folder / "runs" / name / "evaluation"
        place.mkdir(parents=True)
        for which, hits in (("base", 6), ("tuned", 2)):
            rows = np.array([[float(n < hits), 1.0] for n in range(SIZE.unrelated_rows)])
            loss = np.array([[2.0 + (which == "tuned"), 4.0]] * SIZE.unrelated_rows)
            measures = {"exact_match": Measure("exact_match", rows), "nll": Measure("nll", loss)}
            save_evaluation(Evaluation(SIZE.unrelated_rows, measures, {}, ()), place / f"{which}.json")
    found = _record(folder, SIZE, TRAIN, TEST, SCORES, _near(TRAIN, TEST)) | {"seconds": 61.0, "resumed": False}
    return json.loads(json.dumps(found))


def test_every_bar_can_be_computed_again_from_the_record(record: dict[str, Any]) -> None:
    scores = {name: scores_from_json(one) for name, one in record["log_probs"].items()}
    assert json.loads(json.dumps(bars(TEST, scores, record["seeds"]))) == record["figures"]
    assert by_kind(TEST, scores, record["seeds"]) == record["by_kind"]
    for arm in ARMS:
        for seed in (1, 2):
            openly = scores[f"{arm.name}-{seed}"].open
            hits = [
                answers[0] > max(answers[len(question["true"]) :])
                for answers, question in zip(openly, record["questions"], strict=True)
            ]
            assert record["figures"][arm.name]["mc1"]["seeds"][seed - 1] == pytest.approx(sum(hits) / len(hits))


def test_robust_wants_every_variation_and_mc_does_not_hang_on_the_order(record: dict[str, Any]) -> None:
    question = TEST[0]
    false = len(question.false)
    right, wrong = (0.0, -1.0, -1.0, -1.0), (-1.0, 0.0, -1.0, -1.0)
    answers = (-1.0,) * len(question.true) + (-2.0,) * false
    one = of_questions([question], Scores((answers,), ((right,) * 4,), ()))
    other = of_questions([question], Scores((answers,), ((right, right, wrong, right),), ()))
    assert (one["robust"][0], other["robust"][0], other["listed"][0]) == (1.0, 0.0, 0.75)
    assert one["mc1"][0] == 1.0


def test_a_difference_is_paired_and_a_bigger_sample_is_surer() -> None:
    rng = generator(5, "test.figure")
    base = (rng.random(200) < 0.5).astype(float)
    same = figure(np.stack([base, base]), base)
    assert (same.difference, same.difference_interval, same.verdict) == (0.0, (0.0, 0.0), "no detectable difference")
    better = np.maximum(base, (rng.random((3, 200)) < 0.5).astype(float))
    found = figure(better, base)
    assert found.verdict == "better"
    assert found.value == pytest.approx(better.mean())
    assert found.seeds == pytest.approx(better.mean(axis=1))
    few = figure(better[:, :20], base[:20])
    assert np.ptp(few.interval) > np.ptp(found.interval)
    assert figure(1 - better, 1 - base).verdict == "worse"
    assert figure(better, base, higher=False).verdict == "worse"


def test_the_interval_grows_with_the_distance_of_the_seeds() -> None:
    values = np.full((3, 400), 0.5)
    apart = values + np.array([[-0.3], [0.0], [0.3]])
    assert np.ptp(figure(values).interval) == pytest.approx(0.0, abs=1e-9)
    assert np.ptp(figure(apart).interval) > 0.3


def test_a_weighted_figure_is_the_ratio_of_the_sums() -> None:
    sums, tokens = np.array([2.0, 9.0, 4.0]), np.array([1.0, 3.0, 4.0])
    assert figure((sums / tokens)[None], sums / tokens, tokens).value == pytest.approx(15 / 8)


def test_the_page_holds_every_figure_of_the_record(record: dict[str, Any]) -> None:
    page = render(record)
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.addresses == []
    assert not {"script", "img", "link", "iframe"} & set(checker.tags)
    for arm, figures in record["figures"].items():
        for name in MEASURES:
            assert f"{100 * figures[name]['value']:.1f}" in checker.text, (arm, name)
            if arm != "base":
                assert f"{100 * figures[name]['difference']:+.1f} points".replace("-", "−") in checker.text
    for one in PUBLISHED:
        assert one.model in checker.text
        assert all(f"{value:.1f}" in checker.text for pair in (one.robust, one.mc1, one.mc2) for value in pair)
    assert all(line in checker.text for line in NOT_KNOWN)
    assert all(kind.name in checker.text for kind in KINDS)
    assert f"{record['forgetting']['base']['text_nll']['value']:.3f}" in checker.text
    assert "50.0 %" in checker.text
    assert record["near_duplicates"]["closest"]["train"].split("\n")[0] in " ".join(checker.text.split("\n"))
    assert re.sub(r"\s+", " ", headline(record["figures"])) in re.sub(r"\s+", " ", checker.text)


def test_what_is_concluded_follows_from_the_verdicts(record: dict[str, Any]) -> None:
    said = " ".join(conclusions(record))
    assert record["figures"]["tuned"]["mc1"]["verdict"] == "better"
    assert "Tuning helped where the test was kept apart" in said
    assert "did not improve" in said
    assert "from 50.0 % exact replies to 16.7 %" in said
    worse = json.loads(json.dumps(record))
    worse["figures"]["tuned"]["mc1"]["verdict"] = "no detectable difference"
    worse["figures"]["shuffled"]["mc1"]["verdict"] = worse["figures"]["shuffled"]["robust"]["verdict"] = "better"
    said = " ".join(conclusions(worse))
    assert "Tuning made no detectable difference" in said
    assert "part of the gain is form, not truth" in said
    assert "Robust accuracy needs care" in said


def test_the_record_says_how_near_the_sides_are(record: dict[str, Any]) -> None:
    near = record["near_duplicates"]
    assert (near["equal"], near["topics_shared"]) == (0, 0)
    assert 0 < near["closest"]["likeness"] < 1
    assert list(near["above"].values()) == sorted(near["above"].values(), reverse=True)


def test_a_bar_stands_as_high_as_its_value() -> None:
    svg = grouped_bars([Group("MC1", [Bar("base", "base", 25.0), Bar("tuned", "tuned", 75.0, (70.0, 80.0))])], "a & b")
    heights = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', svg)]
    assert heights[1] == pytest.approx(3 * heights[0], abs=0.2)
    assert "a &amp; b. MC1: base 25.0, tuned 75.0" in svg
    assert "tuned: 75.0 [70.0 to 80.0]" in svg
    assert svg.count('class="span"') == 1


def test_scores_are_computed_once_and_again_when_they_are_of_something_else(tmp_path: Path) -> None:
    calls: list[str] = []

    def compute() -> Scores:
        calls.append("once")
        return SCORES["base"]

    path = tmp_path / "base.json"
    assert kept_scores(path, "a", compute) == kept_scores(path, "a", compute) == SCORES["base"]
    assert len(calls) == 1
    kept_scores(path, "b", compute)
    atomic_write(path, "{")
    kept_scores(path, "b", compute)
    assert len(calls) == 3


@pytest.mark.parametrize("size", [FULL, QUICK], ids=["full", "quick"])
def test_the_specs_of_all_arms_differ_in_rows_epochs_and_seed_alone(tmp_path: Path, size: Size) -> None:
    specs = []
    for name in ("tuned-1", "shuffled-1", "contaminated-1", "tuned-3"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(spec_text(name, size), encoding="utf-8")
        specs.append(load_spec(path))
    first = specs[0]
    for spec in specs[1:]:
        rows = spec.data.model_copy(update={"train": first.data.train})
        schedule = spec.schedule.model_copy(update={"epochs": first.schedule.epochs})
        assert spec.model_copy(update={"data": rows, "schedule": schedule, "seed": first.seed}) == first


def test_documentation_is_of_held_out_modules_and_the_same_every_time() -> None:
    texts = docstrings(40)
    assert len(texts) == len(set(texts)) == 40
    assert docstrings(20) == texts[:20]


def test_questions_of_the_record_are_those_that_were_asked(record: dict[str, Any]) -> None:
    asked: list[Question] = questions("test", record["test_questions"], SEED)
    assert [q["topic"] for q in record["questions"]] == [q.topic for q in asked]
