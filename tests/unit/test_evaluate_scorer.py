"""One evaluation from end to end, on a base of two layers: what is scored, generated, paired, kept and refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kivnun.data.rows import ChatRecord, TokenRow, Where
from kivnun.data.template import ChatTokenizer, load_tokenizer
from kivnun.errors import DataError, IntegrityError, SpecError
from kivnun.evaluate.compare import OF_ALL_ROWS
from kivnun.evaluate.evaluation import (
    Evaluation,
    evaluate_scorer,
    evaluation_fields,
    load_evaluation,
    result_fields,
    save_evaluation,
)
from kivnun.evaluate.heldout import Scorer
from kivnun.evaluate.tasks import generation_rows, reference_reply
from kivnun.events import Evaluated, from_json, to_json
from kivnun.model.load import load_base
from kivnun.spec import EvaluationSpec
from kivnun.spec.evaluation import Metric
from kivnun.train.engine import TorchEngine
from tiny_task import HEBREW, WORDS, make_base

SETTINGS = EvaluationSpec(metrics=("exact_match", "chrf"), generate_rows=12, max_new_tokens=6, samples=3, bootstrap=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ChatTokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    return TorchEngine(load_base(folder, "fp32")).base_model()


@pytest.fixture(scope="module")
def rows(tokenizer: ChatTokenizer) -> list[TokenRow]:
    rows: list[TokenRow] = []
    for number in range(24):
        turns = (
            {"role": "user", "content": f"{WORDS[number % 8]} {number}"},
            {"role": "assistant", "content": f"{HEBREW[number % 8]} {number}"},
        )
        where = Where("rows.jsonl", number + 1)
        ((ids, weights, prompt_len),) = tokenizer.chat_rows(ChatRecord(turns, None, where))
        rows.append(TokenRow(ids, weights, number, where, prompt_len))
    return rows


@pytest.fixture(scope="module")
def evaluation(scorer: Scorer, rows: list[TokenRow], tokenizer: ChatTokenizer) -> Evaluation:
    return evaluate_scorer(scorer, rows, tokenizer, SETTINGS, 7, micro_batch_tokens=256)


def test_reference_is_the_reply_alone(rows: list[TokenRow], tokenizer: ChatTokenizer) -> None:
    assert [reference_reply(row, tokenizer).strip() for row in rows[:3]] == [f"{HEBREW[number]} {number}" for number in range(3)]


def test_loss_is_over_all_rows_and_replies_over_the_asked_number(evaluation: Evaluation) -> None:
    assert evaluation.rows == 24
    assert {name: measure.rows for name, measure in evaluation.measures.items()} == {"nll": 24, "exact_match": 12, "chrf": 12}
    assert len(evaluation.samples) == 3


def test_rows_asked_are_a_choice_by_the_seed_alone(rows: list[TokenRow]) -> None:
    first = [row.row for row in generation_rows(rows, 12, seed=7)]
    assert first == [row.row for row in generation_rows(rows, 12, seed=7)] == sorted(first)
    assert first != [row.row for row in generation_rows(rows, 12, seed=8)]


def test_untrained_and_cut_off_replies_are_not_asked_for(rows: list[TokenRow]) -> None:
    row = rows[0]
    untrained = TokenRow(row.ids, np.zeros_like(row.weights), 1, row.where, row.prompt_len)
    cut = TokenRow(row.ids[: row.prompt_len], row.weights[: row.prompt_len], 2, row.where, row.prompt_len)
    text = TokenRow(row.ids, np.ones_like(row.weights), 3, row.where, 0)
    assert generation_rows([row, untrained, cut, text], 10, seed=0) == [row]


def test_same_model_is_not_told_apart_from_itself(
    scorer: Scorer, rows: list[TokenRow], tokenizer: ChatTokenizer, evaluation: Evaluation
) -> None:
    again = evaluate_scorer(scorer, rows, tokenizer, SETTINGS, 7, micro_batch_tokens=64, base=evaluation)
    assert again.nll == evaluation.nll
    assert again.intervals["nll_difference"] == (0.0, 0.0)
    assert set(result_fields(again)["verdicts"].values()) == {"no detectable difference"}


def test_fields_are_those_of_the_event_and_of_the_result(evaluation: Evaluation) -> None:
    event = Evaluated(which="base", step=0, **evaluation_fields(evaluation))
    assert from_json(to_json(event)) == event
    result = json.loads(json.dumps(result_fields(evaluation)))
    assert set(result) == {"nll", "rows", "exact_match", "chrf", "intervals"}
    low, high = result["intervals"]["nll"]
    assert low < result["nll"] < high


def test_saved_evaluation_comes_back_to_the_bit(evaluation: Evaluation, tmp_path: Path) -> None:
    save_evaluation(evaluation, tmp_path / "base.json")
    back = load_evaluation(tmp_path / "base.json")
    assert evaluation_fields(back) == evaluation_fields(evaluation)
    for name, measure in evaluation.measures.items():
        np.testing.assert_array_equal(back.measures[name].rows_ND, measure.rows_ND)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"rows": 1, "per_row": {}, "intervals": {}, "samples": [3]}'])
def test_damaged_saved_evaluation_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text(text, encoding="utf-8")
    with pytest.raises(IntegrityError, match="not a saved evaluation"):
        load_evaluation(tmp_path / "base.json")


def test_progress_tells_both_stages_to_the_end(scorer: Scorer, rows: list[TokenRow], tokenizer: ChatTokenizer) -> None:
    heard: list[tuple[str, int, int]] = []
    evaluate_scorer(scorer, rows, tokenizer, SETTINGS, 7, lambda *told: heard.append(told), micro_batch_tokens=256)
    assert heard[-1] == ("generate", 12, 12)
    assert ("score", 24, 24) in heard


def test_without_metrics_and_samples_nothing_is_generated(scorer: Scorer, rows: list[TokenRow], tokenizer: ChatTokenizer) -> None:
    heard: list[str] = []
    light = SETTINGS.model_copy(update={"metrics": (), "samples": 0})
    found = evaluate_scorer(scorer, rows, tokenizer, light, 7, lambda stage, *_: heard.append(stage), micro_batch_tokens=256)
    assert set(heard) == {"score"}
    assert set(found.measures) == {"nll"}


def test_metrics_without_replies_and_an_empty_set_are_refused(
    scorer: Scorer, rows: list[TokenRow], tokenizer: ChatTokenizer
) -> None:
    text = [TokenRow(row.ids, row.weights, row.row, row.where, 0) for row in rows]
    with pytest.raises(SpecError, match="no held-out row has a prompt and a reply"):
        evaluate_scorer(scorer, text, tokenizer, SETTINGS, 7, micro_batch_tokens=256)
    with pytest.raises(DataError, match="no held-out row"):
        evaluate_scorer(scorer, [], tokenizer, SETTINGS, 7, micro_batch_tokens=256)


@pytest.mark.parametrize("metrics", [("macro_f1",), ("macro_f1", "chrf"), ("chrf",), ("perplexity",), ()])
def test_every_measure_has_as_many_rows_as_are_named(
    metrics: tuple[Metric, ...], scorer: Scorer, rows: list[TokenRow], tokenizer: ChatTokenizer
) -> None:
    settings = SETTINGS.model_copy(update={"metrics": metrics, "generate_rows": 8})
    scored = evaluate_scorer(scorer, rows, tokenizer, settings, 7, micro_batch_tokens=512)
    for name, measure in scored.measures.items():
        assert measure.rows == len(scored.keys["rows" if name in OF_ALL_ROWS else "replies"]), name
