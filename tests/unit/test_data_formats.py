"""Records from rows: every shape that is accepted, every rule that refuses, and that refusals tell places and never content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kivnun.data.formats import read_records
from kivnun.data.rows import ChatRecord, PreferenceRecord, PromptRecord, TextRecord
from kivnun.errors import RowProblem, SpecError

USER = {"role": "user", "content": "zebrafish"}
REPLY = {"role": "assistant", "content": "pangolin"}
WORSE = {"role": "assistant", "content": "c"}
CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "zebrafish"}'}}
TOOL = {"type": "function", "function": {"name": "look_up", "description": "", "parameters": {"type": "object"}}}
SECRETS = ("zebrafish", "pangolin")


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def one(folder: Path, row: Any, format: str = "auto") -> tuple[Any, list[str]]:
    """Return the record (or None) and the problems' words of a file of one row."""
    _, records, problems = read_records(write(folder, row), format)
    assert bool(records) != bool(problems)
    for problem in problems:
        assert not any(secret in str(problem) for secret in SECRETS)
    return (records[0] if records else None), [problem.message for problem in problems]


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def calls(**changes: Any) -> dict[str, Any]:
    return REPLY | {"tool_calls": [CALL | changes]}


def test_messages_come_out_as_they_were_written(tmp_path: Path) -> None:
    system = {"role": "system", "content": "s", "name": "n"}
    row = chat(system, USER, REPLY | {"weight": 0}, {"role": "developer", "content": ""}, USER, REPLY | {"weight": 1}, tools=[TOOL])
    record, _ = one(tmp_path, row)
    assert isinstance(record, ChatRecord)
    assert list(record.messages) == row["messages"]
    assert record.tools == (TOOL,)
    assert (record.where.path, record.where.line) == (str(tmp_path / "rows.jsonl"), 1)


def test_text_parts_become_the_string_they_spell(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    record, _ = one(tmp_path, chat({"role": "user", "content": parts}, {"role": "assistant", "content": []}))
    assert [message["content"] for message in record.messages] == ["one two", ""]


def test_null_keys_of_a_dumped_message_are_left_out(tmp_path: Path) -> None:
    reply = REPLY | {"refusal": None, "audio": None, "function_call": None, "tool_calls": None, "annotations": []}
    record, _ = one(tmp_path, chat(USER | {"name": None}, reply))
    assert list(record.messages) == [USER, REPLY]


@pytest.mark.parametrize("content", [{}, {"content": None}])
@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
def test_tool_calls_may_stand_without_content(tmp_path: Path, content: dict[str, None], arguments: Any) -> None:
    call = CALL | {"function": {"name": "f", "arguments": arguments}}
    asks = {"role": "assistant", **content, "tool_calls": [call]}
    answer = {"role": "tool", "content": "found", "tool_call_id": "c1"}
    record, _ = one(tmp_path, chat(USER, asks, answer, REPLY))
    assert record.messages[1] == {"role": "assistant", "content": None, "tool_calls": [call]}
    assert record.messages[2] == answer


def test_an_empty_reply_is_a_reply(tmp_path: Path) -> None:
    record, _ = one(tmp_path, chat(USER, {"role": "assistant", "content": ""}))
    assert record.messages[1]["content"] == ""


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": "zebrafish"}, "messages must be a list, got a string"),
        (chat(), "messages is empty"),
        (chat("zebrafish", REPLY), "messages[0] must be an object, got a string"),
        (chat({"content": "zebrafish"}, REPLY), "messages[0].role must be one of system, developer, user"),
        (chat({"role": "usr", "content": "zebrafish"}, REPLY), "did you mean 'user'?"),
        (chat({"role": "zebrafish", "content": ""}, REPLY), "messages[0].role is not one of"),
        (chat({"role": "function", "content": ""}, REPLY), "old form of 'tool'"),
        (chat({"role": 3, "content": ""}, REPLY), "got a number"),
        (chat({"role": "user"}, REPLY), "messages[0].content is missing"),
        (chat({"role": "user", "content": None}, REPLY), "messages[0].content is null"),
        (chat(USER, {"role": "assistant", "content": None}), "messages[1].content is null (allowed with tool_calls only)"),
        (chat({"role": "user", "content": 3}, REPLY), "messages[0].content must be a string or a list of text parts, got a number"),
        (chat({"role": "user", "content": {"text": "zebrafish"}}, REPLY), "got an object"),
        (chat(USER), "no assistant message"),
        (chat(USER, REPLY, USER), "the last message must be the assistant's, it has the role user"),
        (chat(USER, REPLY | {"weight": 0}), "every assistant message has weight 0"),
        (chat(USER, REPLY | {"weight": 0.5}), "messages[1].weight must be 0 (context only) or 1 (trained)"),
        (chat(USER, REPLY | {"weight": True}), "messages[1].weight must be 0"),
        (chat(USER, REPLY | {"weight": "1"}), "messages[1].weight must be 0"),
        (chat(USER | {"weight": 0}, REPLY), "messages[0].weight is not allowed on messages of the role user"),
        (chat(USER, REPLY | {"tool_call_id": "x"}), "messages[1].tool_call_id is not allowed on messages of the role assistant"),
        (chat(USER, REPLY | {"wieght": 1}), "unknown key messages[1].'wieght'; did you mean 'weight'?"),
        (chat(USER, REPLY | {"id": 1, "date": 2}), "keys that would have no effect in messages[1]: 'id', 'date'; allowed: role"),
        (chat(USER, REPLY | {"refusal": "zebrafish"}), "messages[1].refusal cannot be trained"),
        (chat(USER, REPLY | {"function_call": {"name": "f"}}), "use tool_calls"),
        (chat(USER | {"name": 1}, REPLY), "messages[0].name must be a string, got a number"),
        (chat(USER, REPLY, mesages=[]), "unknown key 'mesages'; did you mean 'messages'?"),
        (chat(USER, REPLY, id="zebrafish"), "keys that would have no effect: 'id'; allowed: messages, tools"),
        (chat(USER, REPLY, parallel_tool_calls="no"), "parallel_tool_calls must be true or false, got a string"),
        (chat(USER, REPLY, tools={}), "tools must be a list of function schemas, got an object"),
        (chat(USER, REPLY, tools=[{"name": "f"}]), "tools[0].function must be an object, got null"),
        (chat(USER, REPLY, tools=[{"type": "function", "function": {}}]), "tools[0].function.name must be a string"),
        (chat(USER, REPLY, tools=[TOOL | {"function": {"name": "f", "parameters": []}}]), "parameters must be an object"),
        (chat(USER, REPLY | {"tool_calls": []}), "messages[1].tool_calls must be a list that is not empty"),
        (chat(USER, REPLY | {"tool_calls": ["zebrafish"]}), "messages[1].tool_calls[0] must be an object, got a string"),
        (chat(USER, calls(id="")), "tool_calls[0].id must be a string that is not empty"),
        (chat(USER, calls(function={"name": "f", "arguments": "zebrafish"})), "must spell a JSON object"),
        (chat(USER, calls(function={"name": "f", "arguments": "[]"})), "must be an object, or a string"),
        (chat(USER, REPLY | {"tool_calls": [CALL, CALL]}), "give one tool call id twice"),
        (chat(USER, {"role": "tool", "content": ""}, REPLY), "messages[1].tool_call_id is missing"),
        (chat(USER, {"role": "tool", "content": "", "tool_call_id": "x"}, REPLY), "of no earlier tool call"),
        (chat({"role": "user", "content": ["zebrafish"]}, REPLY), "messages[0].content[0] must be an object"),
        (chat({"role": "user", "content": [{"type": "text"}]}, REPLY), "messages[0].content[0].text must be a string, got null"),
        (chat({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, REPLY), "messages[0].content[0] is an image"),
        (chat({"role": "user", "content": [{"type": "input_audio"}]}, REPLY), 'only {"type": "text", "text": "..."} parts'),
        (chat({"role": "user", "content": [{"type": "zebrafish"}]}, REPLY), "a part of another type"),
        ({"prompt": "", "completion": "a"}, "prompt is empty"),
        ({"prompt": 3, "completion": "a"}, "prompt must be a string, got a number"),
        ({"prompt": [USER], "completion": [REPLY]}, "for conversations use the messages format"),
        ({"completion": "a"}, "the key 'prompt' is missing"),
        ({"prompt": "a", "completion": "b", "weight": 1}, "keys that would have no effect: 'weight'; allowed: prompt, completion"),
        ({"text": ""}, "text is empty"),
        ({"text": None}, "text must be a string, got null"),
        ({"text": "a", "source": "zebrafish"}, "keys that would have no effect: 'source'; allowed: text"),
        ({"prompt": "a", "chosen": "b"}, "the key 'rejected' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": [USER]}, "rejected[0].role must be 'assistant'"),
        ({"prompt": "a", "chosen": "b", "rejected": [REPLY, REPLY]}, "exactly one assistant message, got 2"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "rejected must be a string or a list of one assistant message"),
        ({"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "tool_calls": [CALL]}]}, "rejected[0]"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "prompt is empty"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "prompt must be a string or a list of messages"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": []}, "tools need a prompt of messages"),
        ({"prompt": [REPLY], "chosen": "b", "rejected": "c"}, "prompt must end before the reply"),
        ({"prompt": [REPLY | {"weight": 0}, USER], "chosen": "b", "rejected": "c"}, "prompt has a weight"),
        ({"input": [USER], "preferred_output": [REPLY], "non_preferred_output": "c"}, "input must be an object with messages"),
        ({"input": {}, "preferred_output": [REPLY], "non_preferred_output": "c"}, "the key 'input.messages' is missing"),
        ({"prompt": "a", "preferred_output": [REPLY], "non_preferred_output": "c"}, "the key 'input' is missing"),
        ({"mesages": [USER, REPLY]}, "unknown key 'mesages'; did you mean 'messages'?"),
        ({"question": "a", "reply": "b"}, "the row's keys ('question', 'reply') fit no format"),
        ({}, "the row's keys (none) fit no format"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_told_with_its_place(tmp_path: Path, row: Any, words: str) -> None:
    record, messages = one(tmp_path, row)
    assert record is None
    assert any(words in message for message in messages), messages


def test_every_problem_of_a_row_is_told_up_to_five(tmp_path: Path) -> None:
    _, messages = one(tmp_path, chat({"role": "usr"}, {"role": "user"}, 3))
    assert len(messages) == 3
    _, messages = one(tmp_path, chat(*range(1000)))
    assert len(messages) == 6
    assert messages[-1] == "and 995 more problems in this row"


def test_prompts_and_text(tmp_path: Path) -> None:
    record, _ = one(tmp_path, {"prompt": "a", "completion": ""})
    assert isinstance(record, PromptRecord)
    assert (record.prompt, record.completion) == ("a", "")
    record, _ = one(tmp_path, {"text": " "})
    assert isinstance(record, TextRecord)
    assert record.text == " "


@pytest.mark.parametrize(
    "row",
    [
        {"input": {"messages": [USER]}, "preferred_output": [REPLY], "non_preferred_output": [WORSE]},
        {"prompt": [USER], "chosen": [REPLY], "rejected": [WORSE]},
        {"prompt": [USER], "chosen": "pangolin", "rejected": "c"},
    ],
)  # fmt: skip
def test_both_shapes_of_preferences_give_the_same_record(tmp_path: Path, row: dict[str, Any]) -> None:
    record, _ = one(tmp_path, row)
    assert isinstance(record, PreferenceRecord)
    assert isinstance(record.prompt, ChatRecord)
    assert (list(record.prompt.messages), record.chosen, record.rejected) == ([USER], "pangolin", "c")


def test_a_plain_prompt_stays_plain(tmp_path: Path) -> None:
    record, _ = one(tmp_path, {"prompt": "a", "chosen": "", "rejected": "c"})
    assert (record.prompt, record.chosen) == ("a", "")


def test_the_first_good_row_decides_the_format(tmp_path: Path) -> None:
    rows = [{"text": 3}, chat(USER, REPLY), {"text": "a"}, {"completion": "a", "prompt": "b"}, chat(USER, REPLY)]
    name, records, problems = read_records(write(tmp_path, *rows))
    assert name == "messages"
    assert [record.where.line for record in records] == [2, 5]
    assert [problem.line for problem in problems] == [1, 3, 4]
    assert problems[1].message == "the row's keys are those of text, the file's format is messages; one file holds one format"


def test_without_a_good_row_the_keys_name_the_format(tmp_path: Path) -> None:
    assert read_records(write(tmp_path, {"a": 1}, {"text": 3}))[0] == "text"
    assert read_records(write(tmp_path, {"a": 1}))[0] == "unknown"


def test_a_named_format_is_held_to(tmp_path: Path) -> None:
    assert one(tmp_path, {"text": "a"}, "text")[0] is not None
    assert "the file's format is messages" in one(tmp_path, {"text": "a"}, "messages")[1][0]
    assert "did you mean 'text'?" in one(tmp_path, {"texts": "a"}, "text")[1][0]
    with pytest.raises(SpecError, match="must be one of auto, messages"):
        read_records(write(tmp_path, {"text": "a"}), "csv")


def test_a_problem_reads_as_path_line_and_words(tmp_path: Path) -> None:
    problems = read_records(write(tmp_path, {"text": "a"}, {"text": 3}))[2]
    path = tmp_path / "rows.jsonl"
    assert problems == [RowProblem(str(path), 2, "text must be a string, got a number")]
    assert str(problems[0]) == f"{path}:2: text must be a string, got a number"
