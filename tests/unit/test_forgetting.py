"""The forgetting probe: which text is scored, how the pair is judged, and that it stays apart from the task's measures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kivnun.data.template import ChatTokenizer, load_tokenizer
from kivnun.errors import DataError, IntegrityError, SpecError
from kivnun.evaluate.evaluation import load_evaluation
from kivnun.evaluate.forgetting import (
    BUILTIN_FILE,
    Forgetting,
    Probe,
    check_same_text,
    forgetting_fields,
    forgetting_verdict,
    from_record,
    open_probe,
    score_probe,
    to_record,
)
from kivnun.evaluate.heldout import Scorer
from kivnun.evaluate.intervals import Interval
from kivnun.events import CheckpointSaved, Evaluated, StepDone, read_events
from kivnun.model.families import find_base
from kivnun.model.load import load_base
from kivnun.opened import open_run
from kivnun.pipeline import score_base, tune
from kivnun.spec import load_spec, parse_spec
from kivnun.train.engine import TorchEngine
from runs import chats, killed, pairs, run_spec, write_rows, write_spec
from tiny_task import make_base

TEXTS = [{"text": f"The {word} lay on the table, and nobody had seen who brought it there."} for word in "abcdefghijkl"]
PROBED = {"samples": 0, "bootstrap": 100, "forgetting": "builtin"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ChatTokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    return TorchEngine(load_base(folder, "fp32")).base_model()


def opened(setting: str | Path | None, tokenizer: ChatTokenizer, longest: int = 256) -> Probe:
    probe = open_probe(setting, tokenizer, longest)
    assert probe is not None
    return probe


def test_the_text_that_comes_along_is_short_and_of_many_kinds() -> None:
    probe = opened("builtin", load_tokenizer(find_base("kivnun/tiny-phi", None)), 2048)
    assert len(probe.rows) == 48
    assert {"English", "Hebrew", "Arabic", "Russian", "Python"} < set(probe.kinds)
    assert sum(row.length for row in probe.rows) < 4_000
    assert probe.truncated == 0
    texts = [json.loads(line)["text"] for line in BUILTIN_FILE.read_text(encoding="utf-8").splitlines()]
    assert len(set(texts)) == 48


def test_every_token_of_a_text_is_scored_but_the_first_and_no_end(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    probe = opened(write_rows(tmp_path / "texts.jsonl", TEXTS), tokenizer)
    assert (probe.source, len(probe.rows), set(probe.kinds)) == ("texts.jsonl", 12, {""})
    for row, text in zip(probe.rows, TEXTS, strict=True):
        assert row.ids.tolist() == tokenizer.encode(text["text"])
        assert row.weights.tolist() == [0.0, *[1.0] * (row.length - 1)]


def test_of_conversations_the_replies_are_scored(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    probe = opened(write_rows(tmp_path / "chats.jsonl", chats(3)), tokenizer)
    assert all(row.prompt_len > 0 and not row.weights[: row.prompt_len].any() for row in probe.rows)


def test_long_rows_are_cut_and_counted(tokenizer: ChatTokenizer) -> None:
    probe = opened("builtin", tokenizer, 40)
    assert max(row.length for row in probe.rows) == 40
    assert probe.truncated == sum(row.length > 40 for row in opened("builtin", tokenizer, 10_000).rows) > 0


def test_nothing_is_read_where_none_is_wanted(tokenizer: ChatTokenizer) -> None:
    assert open_probe(None, tokenizer, 256) is None


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a whole sentence"}, {"text": 7}], "1 rows of .* cannot be used"),
        ([{"text": "a"}], "fewer than two tokens"),
        (pairs(2), "holds rows in the format preference"),
    ],
)
def test_a_file_that_cannot_be_scored_is_refused(rows: list[Any], said: str, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"evaluation\.forgetting") as caught:
        open_probe(write_rows(tmp_path / "mine.jsonl", rows), tokenizer, 256)
    assert caught.match(said)


def test_the_same_model_has_forgotten_nothing(scorer: Scorer, tokenizer: ChatTokenizer) -> None:
    probe = opened("builtin", tokenizer)
    base = score_probe(scorer, probe, 512, 100, 7)
    again = score_probe(scorer, probe, 4096, 100, 7, base)
    assert base.verdict is None
    assert again.nll == pytest.approx(base.nll, abs=1e-6)
    by_hand = sum(base.loss.rows_ND[:, 0]) / sum(row.length - 1 for row in probe.rows)
    assert base.nll == pytest.approx(by_hand)
    fields = forgetting_fields(base)
    assert set(fields["by_kind"]) == set(probe.kinds)
    hebrew = np.array([kind == "Hebrew" for kind in probe.kinds])
    sums = base.loss.rows_ND[hebrew].sum(axis=0)
    assert fields["by_kind"]["Hebrew"] == pytest.approx(sums[0] / sums[1])


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        ((0.1, 0.2), "forgot"),
        ((-0.2, -0.1), "better there too"),
        ((-0.1, 0.1), "no detectable forgetting"),
        ((0.0, 0.1), "no detectable forgetting"),
        (None, "too few rows"),
    ],
)
def test_the_verdict_follows_from_the_side_of_zero(difference: tuple[float, float] | None, verdict: str) -> None:
    assert forgetting_verdict(difference) == verdict


def test_a_score_survives_its_file(scorer: Scorer, tokenizer: ChatTokenizer) -> None:
    probe = opened("builtin", tokenizer)
    base = score_probe(scorer, probe, 512, 100, 7)
    tuned = score_probe(scorer, probe, 512, 100, 7, replace(base, loss=replace(base.loss, rows_ND=base.loss.rows_ND * [0.9, 1.0])))
    assert tuned.verdict == "forgot"
    for scored in (base, tuned):
        back = from_record(json.loads(json.dumps(to_record(scored))))
        assert back is not None
        assert forgetting_fields(back) == forgetting_fields(scored)
        np.testing.assert_array_equal(back.loss.rows_ND, scored.loss.rows_ND)
    assert from_record({}) is None
    assert forgetting_fields(None) == {}


def test_other_text_than_the_base_had_is_refused(scorer: Scorer, tokenizer: ChatTokenizer) -> None:
    base = score_probe(scorer, opened("builtin", tokenizer), 512, 100, 7)
    with pytest.raises(IntegrityError, match="is not the one that the base was scored on"):
        check_same_text(base, opened("builtin", tokenizer, 40))


def test_a_run_scores_base_and_tuned_apart_from_the_measures(folder: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, folder, chats(), evaluation=PROBED, data={"validation": 0.3})
    result = run_spec(spec, tmp_path / "run")
    base, tuned = result["base"]["forgetting"], result["tuned"]["forgetting"]
    assert base["rows"] == tuned["rows"] == 48
    assert base["content_hash"] == tuned["content_hash"]
    assert "difference" not in base
    low, high = tuned["difference"]
    assert low < tuned["nll"] - base["nll"] < high
    assert tuned["verdict"] == forgetting_verdict((low, high))
    assert set(result["tuned"]["verdicts"]) == {"nll"}
    scored = [event for event in read_events(tmp_path / "run" / "events.jsonl") if isinstance(event, Evaluated)]
    assert [bool(event.forgetting) for event in scored] == [True, *[False] * (len(scored) - 2), True]
    assert scored[-1].forgetting == tuned
    again = open_run(tmp_path / "run").evaluate()
    assert [forgetting_fields(one.forgetting) for one in again] == [base, tuned]


@pytest.mark.parametrize("rows", [TEXTS, pairs(12)], ids=["text", "preference"])
def test_other_data_than_conversations_have_it_too(rows: list[Any], folder: Path, tmp_path: Path) -> None:
    settings = {**PROBED, "forgetting": str(write_rows(tmp_path / "mine.jsonl", TEXTS))}
    spec = write_spec(tmp_path, folder, rows, evaluation=settings, schedule={"epochs": 1})
    assert run_spec(spec, tmp_path / "run")["tuned"]["forgetting"]["source"] == "mine.jsonl"


def test_a_run_that_was_killed_pairs_with_the_base_as_it_was_scored(folder: Path, tmp_path: Path) -> None:
    own = write_rows(tmp_path / "mine.jsonl", TEXTS)
    every = {"checkpoints": {"every_steps": 2}, "evaluation": {**PROBED, "forgetting": str(own)}}
    spec = write_spec(tmp_path, folder, chats(), **every)
    whole = run_spec(spec, tmp_path / "whole")
    killed(spec, tmp_path / "run", lambda event: isinstance(event, CheckpointSaved) and event.step == 4)
    write_rows(own, TEXTS[:-1])
    with pytest.raises(IntegrityError, match=r"mine\.jsonl"):
        run_spec(spec, tmp_path / "run", resume=True)
    write_rows(own, TEXTS)
    assert run_spec(spec, tmp_path / "run", resume=True)["tuned"]["forgetting"] == whole["tuned"]["forgetting"]


def test_a_base_that_was_scored_before_there_was_a_probe_leaves_no_verdict(folder: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, folder, chats(), evaluation=PROBED)
    killed(spec, tmp_path / "run", lambda event: isinstance(event, StepDone) and event.step == 3)
    base = tmp_path / "run" / "evaluation" / "base.json"
    record = json.loads(base.read_text(encoding="utf-8"))
    del record["forgetting"], record["row_keys"]
    base.write_text(json.dumps(record), encoding="utf-8")
    result = run_spec(spec, tmp_path / "run", resume=True)
    assert "forgetting" not in result["base"]
    assert "verdict" not in result["tuned"]["forgetting"]


def test_a_known_base_must_have_been_scored_on_it(folder: Path, tmp_path: Path) -> None:
    spec = load_spec(write_spec(tmp_path, folder, chats(), evaluation=PROBED))
    known, plain = tmp_path / "known.json", tmp_path / "plain.json"
    score_base(spec, known)
    record = json.loads(known.read_text(encoding="utf-8"))
    assert tune(spec, "", tmp_path / "run", known_base=known)["base"]["forgetting"]["nll"] == record["forgetting"]["nll"]
    plain.write_text(json.dumps({**record, "forgetting": {}}), encoding="utf-8")
    with pytest.raises(IntegrityError, match="score the base again"):
        tune(spec, "", tmp_path / "other", known_base=plain)


def test_what_each_row_got_is_kept(folder: Path, tmp_path: Path) -> None:
    run_spec(write_spec(tmp_path, folder, chats(), evaluation=PROBED), tmp_path / "run")
    scored = load_evaluation(tmp_path / "run" / "evaluation" / "tuned.json")
    assert isinstance(scored.forgetting, Forgetting)
    assert isinstance(scored.forgetting.difference, Interval)
    assert scored.forgetting.loss.rows == 48
    assert len(scored.keys["rows"]) == scored.rows == len(set(scored.keys["rows"]))


def test_the_option_is_a_word_a_path_of_the_spec_or_null() -> None:
    def spec(text: str) -> str:
        return (
            f"version: 1\nbase: kivnun/tiny-phi\ndata: {{train: a.jsonl, validation: null}}\nevaluation: {{forgetting: {text}}}\n"
        )

    plain = "version: 1\nbase: kivnun/tiny-phi\ndata: {train: a.jsonl}\nevaluation: {forgetting: %s}\n"
    found = [parse_spec(plain % word, folder=Path("/specs")).evaluation.forgetting for word in ("builtin", "texts.jsonl", "null")]
    assert found == ["builtin", Path("/specs/texts.jsonl"), None]
    with pytest.raises(SpecError, match=r"evaluation\.forgetting must be builtin, a path, or null, got 3"):
        parse_spec(plain % "3", folder=Path("/specs"))
    with pytest.raises(SpecError, match=r"names a file for forgetting, but data\.validation is null"):
        parse_spec(spec("texts.jsonl"), folder=Path("/specs"))
    assert parse_spec(spec("builtin"), folder=Path("/specs")).evaluation.forgetting == "builtin"
