"""A user's own file, all the way to rows, with real tokenizers and templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kivnun.data.loader import Dataset, load_dataset
from kivnun.data.rows import PreferencePair, TokenRow
from kivnun.data.template import ChatTokenizer, load_tokenizer
from kivnun.errors import DataError
from kivnun.spec import DataSpec
from template_corpus import FAMILIES, TOKENIZERS, write_base

KINDS = [("phi_3", "spaces_prepend_strip"), ("phi_3_5", "bytes_strip"), ("plain", "bytes_any_merge"), ("plain", "spaces")]
FAMILY = {family.name: family for family in FAMILIES}
PER_TURN = next(family for family in FAMILIES if family.per_turn)


@pytest.fixture(params=KINDS, ids="-".join)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> ChatTokenizer:
    family, kind = request.param
    return load_tokenizer(write_base(tmp_path / "base", TOKENIZERS[kind](), FAMILY[family]))


def conversation(number: int) -> dict[str, Any]:
    """One to three turns, of which earlier replies are sometimes context only."""
    messages: list[dict[str, Any]] = []
    for turn in range(1 + number % 3):
        messages.append({"role": "user", "content": f"the question {number}.{turn}\n"})
        messages.append({"role": "assistant", "content": f" שלום {number}, the reply {turn}", "weight": 1})
        if turn < number % 3 and number % 2:
            messages[-1]["weight"] = 0
    return {"messages": messages}


def write(folder: Path, lines: list[str]) -> Path:
    path = folder / "own.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    return path


def load(path: Path, tokenizer: ChatTokenizer, max_seq_len: int = 1000, **fields: Any) -> Dataset:
    spec = DataSpec.model_validate({"train": str(path), "validation": None, **fields}, context={"folder": path.parent})
    return load_dataset(spec, tokenizer, 7, max_seq_len)


def trained_text(row: TokenRow, tokenizer: ChatTokenizer) -> str:
    """Return what is trained, span by span, each decoded after what stands before it."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.weights != 0, [0]]).astype(int)))
    ids = row.ids.tolist()
    return "".join(tokenizer.text_after(ids[:begin], ids[begin:end]) for begin, end in edges.reshape(-1, 2))


def test_forty_rows_with_one_malformed_line_are_refused_by_its_number_and_load_when_mended(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    lines = [json.dumps(conversation(number), ensure_ascii=bool(number % 2)) for number in range(40)]
    whole = lines[16]
    lines[16] = whole[:-2]
    with pytest.raises(DataError, match="1 of 40 rows cannot be used") as caught:
        load(write(tmp_path, lines), tokenizer, validation=0.2)
    assert [problem.line for problem in caught.value.problems] == [17]
    lines[16] = whole
    dataset = load(write(tmp_path, lines), tokenizer, validation=0.2)
    assert (dataset.report.train_rows, dataset.report.validation_rows) == (32, 8)
    marker = "<|end|>"
    for row in (*dataset.train.rows, *dataset.validation):
        assert isinstance(row, TokenRow)
        messages = conversation(row.where.line - 1)["messages"]
        replies = [message["content"] for message in messages if message.get("weight") == 1]
        assert trained_text(row, tokenizer) == "".join(reply + marker for reply in replies)
        assert row.ids[: row.prompt_len].tolist() == tokenizer.prompt_ids(messages[:-1])


def test_a_row_per_reply_where_the_template_asks_for_it(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_base(tmp_path / "base", TOKENIZERS["bytes"](), PER_TURN))
    dataset = load(write(tmp_path, [json.dumps(conversation(2)), json.dumps(conversation(0))]), tokenizer)
    assert [row.where.line for row in dataset.train.rows] == [1, 1, 1, 2]
    assert [row.row for row in dataset.train.rows] == [0, 1, 2, 3]


def test_prompts_are_the_first_ids_and_one_eos_ends_the_completion(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    given = [("the word:", " hello"), ("the wo", "rd"), ("a", "")]
    path = write(tmp_path, [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in given])
    for row, (prompt, completion) in zip(load(path, tokenizer).train.rows, given, strict=True):
        assert isinstance(row, TokenRow)
        before, after = row.ids[: row.prompt_len].tolist(), row.ids[row.prompt_len :].tolist()
        assert before == tokenizer.encode(prompt)
        assert row.ids[row.weights != 0].tolist() == after
        assert after.count(tokenizer.eos_id) == 1
        assert tokenizer.text_after(before, after[:-1]) == completion


def test_both_replies_of_a_preference_follow_the_prompt_that_chat_gives(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    before = [*conversation(0)["messages"], {"role": "user", "content": "and now?"}]
    before[1].pop("weight")
    row = {"prompt": before, "chosen": "the reply", "rejected": " no\n"}
    pair = load(write(tmp_path, [json.dumps(row)]), tokenizer).train.rows[0]
    assert isinstance(pair, PreferencePair)
    for side, reply in ((pair.chosen, "the reply"), (pair.rejected, " no\n")):
        assert trained_text(side, tokenizer) == reply + "<|end|>"
        assert side.ids[: side.prompt_len].tolist() == tokenizer.prompt_ids(before)


@pytest.mark.parametrize("over_long", ["skip", "truncate"])
def test_no_row_without_labels_and_no_row_unaccounted_for_at_any_length(tmp_path: Path, over_long: str) -> None:
    tokenizer = load_tokenizer(write_base(tmp_path / "base", TOKENIZERS["bytes"](), PER_TURN))
    path = write(tmp_path, [json.dumps(conversation(number)) for number in range(9)])
    lengths = sorted(row.length for row in load(path, tokenizer).train.rows)
    for max_seq_len in range(lengths[0], lengths[-1] + 2, 3):
        dataset = load(path, tokenizer, max_seq_len, over_long=over_long, bad_rows="skip")
        assert max(row.length for row in dataset.train.rows) <= max_seq_len
        assert all(isinstance(row, TokenRow) and row.weights.any() and row.weights[0] == 0 for row in dataset.train.rows)
        assert all(isinstance(row, TokenRow) and row.prompt_len <= row.length for row in dataset.train.rows)
        used = {row.where.line for row in dataset.train.rows}
        assert used.isdisjoint(problem.line for problem in dataset.report.problems)
        assert len(used) + dataset.report.skipped == 9
