"""Files of questions: an answer depends on its own row alone, and a call that was killed goes on to the same bytes."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kivnun.cli.main import run as command
from kivnun.data.asked import Asked, BadRow, read_asked
from kivnun.errors import DataError, IntegrityError, RunFolderError
from kivnun.model.generate import SamplingParams
from kivnun.model.peft_layers import peft
from kivnun.opened import OpenedRun, open_run
from kivnun.predict import PredictParams, answers_of, predict_file
from runs import Row, chats, in_child, kill_self, pairs, run_spec, write_rows, write_spec
from tiny_task import WORDS

SAMPLED = PredictParams(max_new_tokens=6, temperature=1.0, seed=3, logprob=True)


@pytest.fixture(scope="module")
def opened(base: Path, tmp_path_factory: pytest.TempPathFactory) -> OpenedRun:
    folder = tmp_path_factory.mktemp("predict")
    run_spec(write_spec(folder, base, chats()), folder / "run")
    return open_run(folder / "run")


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"id": f"q{number}", "messages": [{"role": "user", "content": " ".join([WORDS[number % 8]] * (1 + number % 5))}]}
        for number in range(24)
    ]
    return write_rows(tmp_path_factory.mktemp("questions") / "rows.jsonl", rows)


def answered(run: OpenedRun, source: Path, params: PredictParams = SAMPLED, batch_rows: int = 4) -> list[dict[str, Any]]:
    return [row for rows in answers_of(run, source, params, batch_rows=batch_rows) for row in rows]


def test_answers_come_in_the_inputs_order_with_lines_and_ids(opened: OpenedRun, questions: Path) -> None:
    rows = answered(opened, questions)
    assert [(row["line"], row["id"]) for row in rows] == [(number + 1, f"q{number}") for number in range(24)]
    assert all(set(row) == {"line", "id", "answer", "finish_reason", "tokens", "logprob"} for row in rows)
    assert all((row["tokens"] == 6) == (row["finish_reason"] == "length") for row in rows)
    assert all(row["logprob"] < 0 for row in rows if row["tokens"])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_is_the_same_alone_and_in_any_batch(
    opened: OpenedRun, questions: Path, tmp_path: Path, temperature: float
) -> None:
    params = PredictParams(max_new_tokens=6, temperature=temperature, seed=3, logprob=True)
    whole = answered(opened, questions, params, batch_rows=1)
    for batch_rows in (3, 7, 64):
        assert answered(opened, questions, params, batch_rows) == whole
    lines = questions.read_text(encoding="utf-8").splitlines()
    for at in (0, 9, 23):  # the same line among blank ones is that row alone
        alone = tmp_path / "alone.jsonl"
        alone.write_text("\n" * at + lines[at] + "\n", encoding="utf-8")
        assert answered(opened, alone, params) == [whole[at]]


def test_the_log_probability_is_that_of_the_answer(opened: OpenedRun, questions: Path) -> None:
    row = answered(opened, questions)[4]
    prompt = opened.tokenizer.prompt_ids([{"role": "user", "content": " ".join(["five"] * 5)}])
    heard: list[int] = []
    streams = [row["line"]]
    params = SamplingParams(6, opened.tokenizer.stop_ids, 1.0, 1.0, 3)
    ids = opened.tuned.sample([prompt], params, lambda _place, token: heard.append(token), streams)[0]
    assert heard == ids
    assert len(ids) == row["tokens"]
    model = AutoModelForCausalLM.from_pretrained(opened.base_folder, attn_implementation="eager")
    model = peft().PeftModel.from_pretrained(model, str(opened.folder.adapter)).eval()
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    found = torch.log_softmax(logits_TV.double(), dim=1).gather(1, torch.tensor(ids)[:, None]).sum()
    assert row["logprob"] == pytest.approx(float(found), abs=1e-4)


@pytest.mark.parametrize("writes", [1, 2, 3, 5])
def test_a_call_that_was_killed_goes_on_to_the_same_bytes(opened: OpenedRun, questions: Path, tmp_path: Path, writes: int) -> None:
    """The command, in a process of its own, dies by SIGKILL when it makes its nth write durable: the record's file and folder
    first, then the batches of answers, of which the last is on disk when it dies."""
    words = ["--max-new-tokens", "6", "--temperature", "1", "--seed", "3", "--logprob", "--batch-rows", "1", "--resume"]
    args = ["predict", str(opened.folder.path), "--input", str(questions), "--output", str(tmp_path / "killed.jsonl"), *words]

    def dying() -> None:
        left = [writes]

        def fsync(_descriptor: int) -> None:
            left[0] -= 1
            if left[0] == 0:
                kill_self()

        os.fsync = fsync  # type: ignore[assignment]
        command(args)

    assert in_child(dying) == -signal.SIGKILL
    output = tmp_path / "killed.jsonl"
    if output.exists():
        output.write_bytes(output.read_bytes() + b'{"line": 3, "ans')  # what a kill in the middle of a write leaves
    result = predict_file(opened, questions, output, SAMPLED, batch_rows=5, resume=True)
    predict_file(opened, questions, tmp_path / "whole.jsonl", SAMPLED)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert output.read_bytes() == whole
    again = predict_file(opened, questions, output, SAMPLED, resume=True)  # finished: nothing more is written
    assert (again["rows"], again["errors"], again, output.read_bytes()) == (24, 0, result, whole)


def test_a_file_cut_anywhere_is_gone_on_with(opened: OpenedRun, questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    few = tmp_path / "few.jsonl"
    few.write_text("".join(questions.read_text(encoding="utf-8").splitlines(keepends=True)[:3]), encoding="utf-8")
    predict_file(opened, few, output, SAMPLED)
    whole = output.read_bytes()
    for size in range(0, len(whole), 31):
        output.write_bytes(whole[:size])
        predict_file(opened, few, output, SAMPLED, resume=True)
        assert output.read_bytes() == whole


def test_what_was_begun_otherwise_is_not_gone_on_with(opened: OpenedRun, questions: Path, base: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    predict_file(opened, questions, output, SAMPLED)
    with pytest.raises(RunFolderError, match="exists already"):
        predict_file(opened, questions, output, SAMPLED)
    with pytest.raises(RunFolderError, match=r"params.seed was 3, is 4"):
        predict_file(opened, questions, output, _other(seed=4), resume=True)
    with pytest.raises(RunFolderError, match=r"params.base was False, is True"):
        predict_file(opened, questions, output, _other(base=True), resume=True)
    changed = shutil.copy(questions, tmp_path / "rows.jsonl")
    Path(changed).write_text(questions.read_text(encoding="utf-8").replace("one", "uno"), encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"input.sha256 was"):
        predict_file(opened, Path(changed), output, SAMPLED, resume=True)
    run_spec(write_spec(tmp_path / "other", base, chats(), seed=8), tmp_path / "other" / "run")
    with pytest.raises(RunFolderError, match=r"spec_hash was .* tuned_hash was"):
        predict_file(open_run(tmp_path / "other" / "run"), questions, output, SAMPLED, resume=True)
    output.write_text('{"line": 2, "answer": "?"}\n', encoding="utf-8")
    with pytest.raises(IntegrityError, match="no answer to line 1"):
        predict_file(opened, questions, output, SAMPLED, resume=True)
    (tmp_path / "mine.jsonl").write_text("mine\n", encoding="utf-8")
    with pytest.raises(RunFolderError, match="not begun by predict"):
        predict_file(opened, questions, tmp_path / "mine.jsonl", SAMPLED, resume=True)
    assert (tmp_path / "mine.jsonl").read_text(encoding="utf-8") == "mine\n"


def _other(**changes: Any) -> PredictParams:
    return PredictParams(**{"max_new_tokens": 6, "temperature": 1.0, "seed": 3, "logprob": True, **changes})


SHAPES: list[tuple[Row, str | None]] = [
    ({"messages": [{"role": "user", "content": "one"}]}, None),
    ({"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "אחת"}]}, "אחת"),
    ({"prompt": "one"}, None),
    ({"prompt": "one", "completion": " two"}, " two"),
    ({"prompt": [{"role": "user", "content": "one"}]}, None),
    (pairs(1)[0], pairs(1)[0]["chosen"]),
    (
        {
            "input": {"messages": [{"role": "user", "content": "one"}]},
            "preferred_output": [{"role": "assistant", "content": "a"}],
            "non_preferred_output": [{"role": "assistant", "content": "b"}],
        },
        "a",
    ),
]


def test_the_reply_of_a_training_row_is_kept_and_not_shown_to_the_model(opened: OpenedRun, tmp_path: Path) -> None:
    rows = read_asked(write_rows(tmp_path / "rows.jsonl", [row for row, _ in SHAPES]))
    assert [row.reference for row in rows if isinstance(row, Asked)] == [reference for _, reference in SHAPES]
    asked = {"messages": [{"role": "user", "content": "one two"}]}
    told = {"messages": [*asked["messages"], {"role": "assistant", "content": "seven"}]}
    # Line 1 of both, so that draws are the same.
    with_reply = answered(opened, write_rows(tmp_path / "told.jsonl", [told]))
    without = answered(opened, write_rows(tmp_path / "asked.jsonl", [asked]))
    assert with_reply == [{"line": 1, "reference": "seven", **without[0]}]


BAD: list[tuple[Row, str]] = [
    ({"text": "running"}, "nothing in it is asked"),
    ({"question": "?"}, "'question'"),
    ({"prompt": ""}, "prompt is empty"),
    ({"messages": []}, "messages is empty"),
    ({"messages": [{"role": "system", "content": "be brief"}]}, "no user message"),
    ({"messages": [{"role": "user", "content": "a"}], "temperature": 1}, "temperature"),
    ({"prompt": "a", "id": 1.5}, "id must be"),
    ({"prompt": "a", "completion": 3}, "completion must be a string"),
    ({"prompt": "word " * 300}, "the base takes 256 in all"),
]


def test_bad_rows_are_all_listed_with_their_lines_and_skipped_only_when_asked(opened: OpenedRun, tmp_path: Path) -> None:
    good = {"prompt": "one"}
    source = write_rows(tmp_path / "rows.jsonl", [good, *(row for row, _ in BAD), good])
    with pytest.raises(DataError, match=f"{len(BAD)} of {len(BAD) + 2} rows") as caught:
        predict_file(opened, source, tmp_path / "out.jsonl", SAMPLED)
    assert [problem.line for problem in caught.value.problems] == list(range(2, len(BAD) + 2))
    assert not (tmp_path / "out.jsonl").exists()
    for problem, (_, said) in zip(caught.value.problems, BAD, strict=True):
        assert said in problem.message
    result = predict_file(opened, source, tmp_path / "out.jsonl", SAMPLED, skip_bad=True)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["line"] for row in written] == list(range(1, len(BAD) + 3))
    assert ["error" in row for row in written] == [False, *[True] * len(BAD), False]
    assert (result["answered"], result["errors"]) == (2, len(BAD))


def test_a_line_that_is_no_json_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n\n{broken\n', encoding="utf-8")
    good, bad = read_asked(tmp_path / "rows.jsonl")
    assert isinstance(good, Asked)
    assert isinstance(bad, BadRow)
    assert bad.line == 3


def test_an_answer_ends_where_the_bases_context_does(opened: OpenedRun, tmp_path: Path) -> None:
    prompt = "word " * 50
    room = 256 - len(opened.tokenizer.encode(prompt))
    (row,) = answered(opened, write_rows(tmp_path / "rows.jsonl", [{"prompt": prompt}]), PredictParams(max_new_tokens=1000))
    assert row["tokens"] == room or row["finish_reason"] == "stop"


def test_the_command_answers_as_chat_does(opened: OpenedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "three 2"}]}])
    run, output = str(opened.folder.path), tmp_path / "out.jsonl"
    words = ["predict", run, "--input", str(source), "--max-new-tokens", "8"]
    for which in ([], ["--base"]):
        assert command(["chat", run, "--once", "three 2", "--max-new-tokens", "8", "--json", *which]) == 0
        said = json.loads(capsys.readouterr().out)
        assert command([*words, "--output", str(output), "--json", *which]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        row = json.loads(output.read_text(encoding="utf-8"))
        assert (row["answer"], row["tokens"], row["finish_reason"]) == (said["reply"], said["tokens"], said["finish_reason"])
        assert result == {
            "output": str(output), "rows": 1, "answered": 1, "errors": 0, "tokens": row["tokens"],
            "finish_reasons": {"stop": 0, "length": 0} | {row["finish_reason"]: 1},
        }  # fmt: skip
        assert command([*words, "--output", "-", *which]) == 0
        assert json.loads(capsys.readouterr().out) == row
        for path in tmp_path.glob("out.jsonl*"):
            path.unlink()
    assert command([*words, "--output", "-", "--resume"]) == 2


def test_the_command_reads_stdin_and_names_it(
    opened: OpenedRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["predict", str(opened.folder.path), "--input", "-", "--output", "-", "--max-new-tokens", "3"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO('{"prompt": "שלוש"}\n'.encode())))
    assert command(words) == 0
    assert json.loads(capsys.readouterr().out)["line"] == 1
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a"}\n')))
    assert command(words) == 3
    assert "stdin:1: is running text" in capsys.readouterr().err
