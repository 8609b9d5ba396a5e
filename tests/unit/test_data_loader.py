"""From files to numbered rows: ids, weights, what is too long, what is held out, and that every row is accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kivnun.data.checks import check_file, describe
from kivnun.data.loader import Dataset, load_dataset
from kivnun.data.rows import ChatRecord, PreferencePair, TokenRow, Trainable
from kivnun.errors import DataError, SpecError
from kivnun.randomness import permutation
from kivnun.spec import DataSpec, SourceSpec

BOS, EOS, TURN, END = 1, 2, 3, 4


class ByteTokenizer:
    """One id per byte, a BOS before every text, a chat template of two markers per turn; `per_turn` makes a row of each reply."""

    eos_id = EOS

    def __init__(self, per_turn: bool = False) -> None:
        self.per_turn = per_turn

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        return [BOS] * add_bos + [byte + 10 for byte in text.encode()]

    def encode_pair(self, prompt: str, completion: str) -> tuple[list[int], int]:
        before = self.encode(prompt)
        return before + self.encode(completion, add_bos=False), len(before)

    def chat_rows(self, record: ChatRecord) -> list[tuple[np.ndarray, np.ndarray, int]]:
        ids, weights, rows, prompt_len = [BOS], [0.0], [], 0
        for message in record.messages:
            if message["role"] == "system":
                raise DataError("the chat template refuses this conversation: no system role")
            reply = self.encode(message["content"], add_bos=False)
            trained = message["role"] == "assistant" and message.get("weight") != 0
            if message["role"] == "assistant":
                prompt_len = len(ids) + 1
            before = [0.0] * len(weights) if self.per_turn else weights
            ids = [*ids, TURN, *reply, END]
            weights = [*before, 0.0, *([float(trained)] * (len(reply) + 1))]
            if trained:
                rows.append((np.asarray(ids, np.int32), np.asarray(weights, np.float32), prompt_len))
        return rows if self.per_turn else rows[-1:]


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def spec_of(*paths: Path, shares: tuple[float, ...] = (), **fields: Any) -> DataSpec:
    train = [SourceSpec(path=path, share=shares[at] if shares else None) for at, path in enumerate(paths)]
    return DataSpec.model_validate({"train": train, "validation": None, **fields})


def load(*paths: Path, max_seq_len: int = 100, tokenizer: ByteTokenizer | None = None, seed: int = 0, **fields: Any) -> Dataset:
    return load_dataset(spec_of(*paths, **fields), tokenizer or ByteTokenizer(), seed, max_seq_len)


def texts(*words: str) -> list[dict[str, str]]:
    return [{"text": word} for word in words]


def chat(*contents: str, **last: Any) -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]
    messages[-1] |= last
    return {"messages": messages}


def trained(row: Trainable) -> list[int]:
    assert isinstance(row, TokenRow)
    return row.ids[row.weights != 0].tolist()


def test_text_trains_every_token_after_the_first_and_one_eos(tmp_path: Path) -> None:
    row = load(write(tmp_path, texts("ab"))).train.rows[0]
    assert isinstance(row, TokenRow)
    assert (row.ids.dtype, row.weights.dtype) == (np.int32, np.float32)
    assert row.ids.tolist() == [BOS, 107, 108, EOS]
    assert row.weights.tolist() == [0, 1, 1, 1]


def test_a_completion_and_one_eos_are_trained_and_the_prompt_is_what_a_generation_gets(tmp_path: Path) -> None:
    row = load(write(tmp_path, [{"prompt": "a", "completion": "b"}])).train.rows[0]
    assert isinstance(row, TokenRow)
    assert row.ids.tolist() == [BOS, 107, 108, EOS]
    assert row.weights.tolist() == [0, 0, 1, 1]
    assert row.ids[: row.prompt_len].tolist() == ByteTokenizer().encode("a")


def test_an_empty_completion_trains_the_eos_and_is_counted(tmp_path: Path) -> None:
    dataset = load(write(tmp_path, [{"prompt": "a", "completion": ""}]))
    assert trained(dataset.train.rows[0]) == [EOS]
    assert dataset.report.empty_replies == 1


def test_a_template_may_make_several_rows_of_one_record(tmp_path: Path) -> None:
    path = write(tmp_path, [chat("a", "b", "c", "d"), chat("e", "f")])
    dataset = load(path, tokenizer=ByteTokenizer(per_turn=True))
    assert [row.row for row in dataset.train.rows] == [0, 1, 2]
    assert [row.where.line for row in dataset.train.rows] == [1, 1, 2]
    assert [trained(row) for row in dataset.train.rows] == [[108, END], [110, END], [112, END]]
    assert dataset.report.train_rows == 3


def test_a_row_that_the_template_refuses_is_a_problem_of_its_line(tmp_path: Path) -> None:
    system = {"messages": [{"role": "system", "content": "s"}, *chat("a", "b")["messages"]]}
    with pytest.raises(DataError) as caught:
        load(write(tmp_path, [chat("a", "b"), system]))
    assert [problem.line for problem in caught.value.problems] == [2]


@pytest.mark.parametrize("prompt", ["a", [{"role": "user", "content": "a"}]])
def test_a_preference_is_a_pair_of_rows_on_one_prompt(tmp_path: Path, prompt: Any) -> None:
    rows = [{"prompt": prompt, "chosen": "b", "rejected": "cd"}, {"prompt": prompt, "chosen": "b", "rejected": ""}]
    dataset = load(write(tmp_path, rows))
    first, second = dataset.train.rows
    assert isinstance(first, PreferencePair)
    assert isinstance(second, PreferencePair)
    end = EOS if prompt == "a" else END
    assert trained(first.chosen) == [108, end]
    assert trained(first.rejected) == [109, 110, end]
    assert trained(second.rejected) == [end]
    length = first.chosen.prompt_len
    assert first.chosen.ids[:length].tolist() == first.rejected.ids[:length].tolist()
    assert [(pair.row, pair.chosen.row, pair.rejected.row) for pair in (first, second)] == [(0, 0, 1), (1, 2, 3)]
    assert dataset.report.trained_tokens == 2 + 3 + 2 + 1


def test_only_the_last_reply_of_a_preference_is_trained(tmp_path: Path) -> None:
    prompt = chat("a", "b", "c")["messages"]
    pair = load(write(tmp_path, [{"prompt": prompt, "chosen": "d", "rejected": "e"}])).train.rows[0]
    assert isinstance(pair, PreferencePair)
    assert trained(pair.chosen) == [110, END]


def test_over_long_rows_are_refused_with_their_lines_and_what_to_do(tmp_path: Path) -> None:
    path = write(tmp_path, [*texts("a", "long" * 5), "{", *texts("longer" * 5)])
    with pytest.raises(DataError, match="3 of 4 rows cannot be used") as caught:
        load(path, max_seq_len=10)
    assert [problem.line for problem in caught.value.problems] == [2, 3, 4]
    assert caught.value.problems[0].message == "has 22 tokens, max_seq_len is 10"
    assert caught.value.hint is not None
    assert "data.over_long" in caught.value.hint
    assert "data.bad_rows" in caught.value.hint


def test_over_long_rows_may_be_skipped_and_are_listed(tmp_path: Path) -> None:
    dataset = load(write(tmp_path, texts("a", "long" * 5, "b")), max_seq_len=10, over_long="skip")
    assert [row.where.line for row in dataset.train.rows] == [1, 3]
    assert [row.row for row in dataset.train.rows] == [0, 1]
    assert dataset.report.skipped == 1
    assert [problem.line for problem in dataset.report.problems] == [2]


def test_skipping_bad_rows_still_refuses_over_long_ones(tmp_path: Path) -> None:
    path = write(tmp_path, ["{", *texts("a", "long" * 5)])
    with pytest.raises(DataError) as caught:
        load(path, max_seq_len=10, bad_rows="skip")
    assert [problem.line for problem in caught.value.problems] == [3]


def test_truncated_text_loses_its_end_and_the_report_says_so(tmp_path: Path) -> None:
    dataset = load(write(tmp_path, texts("abcdef", "a")), max_seq_len=4, over_long="truncate")
    first = dataset.train.rows[0]
    assert isinstance(first, TokenRow)
    assert first.ids.tolist() == [BOS, 107, 108, 109]
    assert trained(dataset.train.rows[0]) == [107, 108, 109]
    assert trained(dataset.train.rows[1]) == [107, EOS]
    assert (dataset.report.truncated, dataset.report.cut_tokens) == (1, 4)
    assert any("end-of-text token of these rows is not trained" in note for note in dataset.report.notes)


@pytest.mark.parametrize("bad_rows", ["refuse", "skip"])
def test_a_row_that_truncation_leaves_without_labels_is_a_problem(tmp_path: Path, bad_rows: str) -> None:
    path = write(tmp_path, [chat("long" * 5, "b"), chat("a", "long" * 5)])
    if bad_rows == "refuse":
        with pytest.raises(DataError, match="nothing to train"):
            load(path, max_seq_len=8, over_long="truncate")
        return
    dataset = load(path, max_seq_len=8, over_long="truncate", bad_rows="skip")
    assert [row.where.line for row in dataset.train.rows] == [2]
    assert (dataset.report.skipped, dataset.report.truncated) == (1, 1)
    assert dataset.report.train_tokens == 8


def test_of_a_record_with_several_rows_truncation_keeps_those_that_train(tmp_path: Path) -> None:
    path = write(tmp_path, [chat("a", "b", "long" * 5, "d")])
    dataset = load(path, max_seq_len=8, over_long="truncate", tokenizer=ByteTokenizer(per_turn=True))
    assert [trained(row) for row in dataset.train.rows] == [[108, END]]
    assert (dataset.report.truncated, dataset.report.cut_tokens) == (1, 32)


def test_preferences_cannot_be_truncated(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(SpecError, match="truncate cannot be used with preferences"):
        load(path, over_long="truncate")
    with pytest.raises(DataError, match="has 4 tokens"):
        load(path, max_seq_len=3)


def test_bad_rows_may_be_skipped_and_are_counted_by_reason(tmp_path: Path) -> None:
    path = write(tmp_path, [*texts("a"), {"text": 3}, {"text": None}, {"text": 4}, chat("a", "b"), "[]"])
    report = load(path, bad_rows="skip").report
    assert (report.train_rows, report.skipped) == (1, 5)
    assert next(iter(report.reasons.items())) == ("text must be a string, got a number", 2)
    assert sum(report.reasons.values()) == 5
    assert report.warnings[0] == f"2 rows skipped: text must be a string, got a number ({path}:2, {path}:4)"
    assert len(report.warnings) == len(report.reasons)


def test_the_first_problems_are_shown_and_all_are_kept(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(write(tmp_path, [*texts("a"), *["{"] * 30]))
    assert len(caught.value.problems) == 30
    assert "and 10 more" in str(caught.value)


def test_problems_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    first, second = write(tmp_path, [*texts("a"), "{"], "a.jsonl"), write(tmp_path, ["{", *texts("b")], "b.jsonl")
    held_out = write(tmp_path, [*texts("c"), *texts("long" * 40)], "c.jsonl")
    with pytest.raises(DataError) as caught:
        load(first, second, validation=held_out)
    assert [(Path(p.path).name, p.line) for p in caught.value.problems] == [("a.jsonl", 2), ("b.jsonl", 1), ("c.jsonl", 2)]


def test_rows_are_numbered_over_all_sources(tmp_path: Path) -> None:
    first, second = write(tmp_path, texts("a", "b"), "a.jsonl"), write(tmp_path, texts("c"), "b.jsonl")
    train = load(first, second, shares=(3, 1)).train
    assert [row.row for row in train.rows] == [0, 1, 2]
    assert (train.sizes, train.shares, train.lengths.tolist()) == ((2, 1), (3.0, 1.0), [3, 3, 3])
    assert [source.path for source in train.files] == [str(first), str(second)]
    assert load(first, second).train.shares is None


def test_files_of_different_formats_are_refused(tmp_path: Path) -> None:
    first, second = write(tmp_path, texts("a"), "a.jsonl"), write(tmp_path, [chat("a", "b")], "b.jsonl")
    with pytest.raises(DataError, match=r"different formats: text .* and messages"):
        load(first, second)


@pytest.mark.parametrize(("count", "share", "held_out"), [(10, 0.2, 2), (2, 0.01, 1), (2, 0.99, 1), (7, 0.5, 4), (40, 0.1, 4)])
def test_a_share_is_held_out_by_the_seed(tmp_path: Path, count: int, share: float, held_out: int) -> None:
    path = write(tmp_path, texts(*map(str, range(count))))
    dataset = load(path, validation=share, seed=7)
    chosen = sorted(permutation(count, 7, "validation")[:held_out] + 1)
    assert [row.where.line for row in dataset.validation] == chosen
    assert [row.where.line for row in dataset.train.rows] == sorted(set(range(1, count + 1)) - set(chosen))
    assert [row.row for row in dataset.validation] == list(range(held_out))
    assert any(f"{held_out} of {count} records are held out" in note for note in dataset.report.notes)


def test_rows_of_one_record_are_held_out_together(tmp_path: Path) -> None:
    path = write(tmp_path, [chat("a", str(at), "c", "d") for at in range(6)])
    dataset = load(path, validation=0.5, tokenizer=ByteTokenizer(per_turn=True))
    assert len(dataset.validation) == len(dataset.train.rows) == 6
    assert {row.where.line for row in dataset.validation}.isdisjoint(row.where.line for row in dataset.train.rows)


def test_one_row_is_too_few_to_hold_one_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few"):
        load(write(tmp_path, texts("a")), validation=0.1)


def test_nothing_left_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, ["{"])
    with pytest.raises(DataError, match="no training row is left"):
        load(path, bad_rows="skip")
    with pytest.raises(DataError, match="no held-out row is left"):
        load(write(tmp_path, texts("a"), "a.jsonl"), validation=path, bad_rows="skip")


def test_a_held_out_file_is_its_own_data_set_and_overlap_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, texts("a", "b", "a"), "a.jsonl")
    dataset = load(path, validation=write(tmp_path, texts("a", "c"), "b.jsonl"))
    assert [row.row for row in dataset.validation] == [0, 1]
    assert (dataset.report.duplicates, dataset.report.overlap) == (1, 1)
    assert "1 of 2 held-out records are also training records" in dataset.report.warnings[0]
    assert load(path, validation=write(tmp_path, texts("c"), "b.jsonl")).report.warnings == ()


def test_equal_files_give_equal_hashes_and_any_change_another(tmp_path: Path) -> None:
    path = write(tmp_path, texts("a", "b", "c", "d"))
    first = load(path, validation=0.5)
    assert load(path, validation=0.5).content_hash == first.content_hash
    assert load(path, validation=0.5, seed=1).content_hash != first.content_hash
    other = write(tmp_path, texts("a", "b", "c", "e"), "other.jsonl")
    assert load(other, validation=0.5).content_hash != first.content_hash
    assert load(other, other.with_name("rows.jsonl"), shares=(1, 2)).content_hash != load(other, path).content_hash


def test_counts_add_up(tmp_path: Path) -> None:
    rows = [chat("a", "bc"), chat("a", ""), chat("d", "e", "f", "g")]
    rows[2]["messages"][1]["weight"] = 0
    report = load(write(tmp_path, rows)).report
    assert (report.train_rows, report.train_tokens, report.trained_tokens) == (3, 8 + 6 + 13, 3 + 1 + 2)
    assert report.longest_row == 1 + 4 * 3
    assert report.empty_replies == 1


def test_check_file_counts_without_a_tokenizer(tmp_path: Path) -> None:
    rows = [chat("a", "bc"), chat("a", "bc"), chat("a", ""), chat("a", "b", "c", "d"), {"messages": []}]
    rows[3]["messages"][1]["weight"] = 0
    report = check_file(write(tmp_path, rows))
    assert (report.format, report.rows, report.bad_rows, len(report.problems)) == ("messages", 4, 1, 1)
    assert report.roles == {"user": 5, "assistant": 5}
    assert (report.trained_replies, report.context_replies, report.empty_replies, report.duplicates) == (4, 1, 1, 1)
    assert report.characters == 3 + 3 + 1 + 4
    table = dict(describe(report))
    assert table["messages by role"] == "user 5, assistant 5"
    assert table["replies"] == "4 trained, 1 context only"
    assert table["1 row"] == "messages is empty"


def test_tables_leave_out_what_says_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, texts("a"))
    assert [name for name, _ in describe(check_file(path))] == ["file", "format", "rows", "characters"]
    assert [name for name, _ in describe(load(path, format="text").report)] == [
        "format", "training rows", "training tokens", "held-out rows", "longest row",
    ]  # fmt: skip


def test_a_file_that_gives_no_row_is_told_of_and_refused_if_it_has_a_share(tmp_path: Path) -> None:
    good, bad = write(tmp_path, texts("a"), "good.jsonl"), write(tmp_path, ["{"], "bad.jsonl")
    dataset = load(bad, good, bad_rows="skip")
    assert dataset.train.sizes == (1,)
    assert any(f"{bad} gives no training row" in note for note in dataset.report.notes)
    with pytest.raises(DataError, match=r"no training row is left of .*bad\.jsonl, which has a share"):
        load(bad, good, shares=(1, 1), bad_rows="skip")


def test_a_row_whose_tokens_train_nothing_is_a_problem(tmp_path: Path) -> None:
    class Mute(ByteTokenizer):
        def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
            return []

    with pytest.raises(DataError, match="the row trains nothing"):
        load(write(tmp_path, texts("a")), tokenizer=Mute())


def test_a_template_that_renders_a_prompt_by_its_reply_makes_no_pairs(tmp_path: Path) -> None:
    class Peeking(ByteTokenizer):
        def chat_rows(self, record: ChatRecord) -> list[tuple[np.ndarray, np.ndarray, int]]:
            [(ids, weights, prompt_len)] = super().chat_rows(record)
            ids[0] = len(ids)
            return [(ids, weights, prompt_len)]

    rows = [{"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "cd"}]
    with pytest.raises(DataError, match="renders the prompt differently"):
        load(write(tmp_path, rows), tokenizer=Peeking())


@pytest.mark.parametrize(
    ("row", "characters", "empty"),
    [
        ({"prompt": "abc", "completion": ""}, 3, 1),
        ({"text": "אבג"}, 3, 0),
        ({"prompt": "ab", "chosen": "", "rejected": "c"}, 3, 1),
        ({"prompt": [{"role": "user", "content": "ab"}], "chosen": "cd", "rejected": "e"}, 5, 0),
    ],
)
def test_check_file_counts_characters_and_empty_replies_of_every_format(
    tmp_path: Path, row: dict[str, Any], characters: int, empty: int
) -> None:
    report = check_file(write(tmp_path, [row, row]))
    assert (report.characters, report.empty_replies, report.duplicates) == (2 * characters, 2 * empty, 1)
