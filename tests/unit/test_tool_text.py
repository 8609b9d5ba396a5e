"""Functions in words: what a model is asked with is what it was trained with, whatever its template knows of functions."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kivnun.data.rendering import ChatTemplate
from kivnun.data.rows import ChatRecord, Where
from kivnun.data.template import ChatTokenizer
from kivnun.data.tokenizer import Tokenizer
from kivnun.data.tool_text import tool_text
from kivnun.serve.question import Asked, read_question
from kivnun.serve.reply import Choice, Head, Stream, whole
from kivnun.serve.tools import calls_in, may_become_call, tool_use
from kivnun.serve.toy import ToyTokens
from template_corpus import FAMILIES, TOKENIZERS, write_base

TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells.", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "חיפה"}'}}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    {"role": "assistant", "content": "Sun."},
]
# Reads functions where the system message holds them, as the template that comes with Phi-4-mini does.
KEYED = (
    "{% for m in messages %}{% if m['role'] == 'system' and 'tools' in m and m['tools'] is not none %}"
    "{{ '<|system|>' + m['content'] + '<|tool|>' + m['tools'] + '<|/tool|><|end|>' }}"
    "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NO_SYSTEM = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}" + PLAIN
NATIVE = next(family for family in FAMILIES if family.name == "phi_4_mini")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tools")
    write_base(folder, TOKENIZERS["bytes"](), NATIVE)
    return Tokenizer(folder)


def chat_with(tokens: Tokenizer, template: str) -> ChatTokenizer:
    return ChatTokenizer(tokens, {"default": ChatTemplate(template, tokens.special_tokens)})


@pytest.mark.parametrize("template", [KEYED, PLAIN], ids=["keyed", "plain"])
@pytest.mark.parametrize("begin", [0, 1], ids=["with system", "without"])
def test_a_prompt_is_the_first_ids_of_the_row_that_trains_its_reply(template: str, begin: int, tokens: Tokenizer) -> None:
    chat, talk = chat_with(tokens, template), TALK[begin:]
    ((ids, weights, _),) = chat.chat_rows(ChatRecord(tuple(talk), (TOOL,), Where("train.jsonl", 1)))
    for number, message in enumerate(talk):
        if message["role"] == "assistant":
            prompt = chat.prompt_ids(talk[:number], [TOOL])
            assert ids[: len(prompt)].tolist() == prompt
            assert weights[len(prompt)] == 1
    text = chat.decode(ids.tolist())
    assert text.count("weather") == 2  # offered once, called once
    assert '<|tool_call|>[{"name": "weather", "arguments": {"place": "חיפה"}}]<|/tool_call|>' in text
    assert "sun" in text


def test_each_template_is_told_in_its_own_way(tokens: Tokenizer) -> None:
    keyed = chat_with(tokens, KEYED).prompt_text(TALK[:2], [TOOL])
    assert keyed.startswith("<|system|>Be short.<|tool|>" + json.dumps([TOOL["function"]]) + "<|/tool|>")
    assert chat_with(tokens, KEYED).prompt_text(TALK[1:2], [TOOL]).startswith("<|system|><|tool|>[{")
    plain = chat_with(tokens, PLAIN).prompt_text(TALK[:2], [TOOL])
    assert plain.startswith("<|system|>Be short.\n\nYou may call these functions:\n[{")
    without = chat_with(tokens, NO_SYSTEM).prompt_text(TALK[1:2], [TOOL])
    assert without.startswith("<|user|>You may call these functions:")
    assert without.endswith("\n\nWeather?<|end|><|assistant|>")


def test_a_template_that_renders_functions_is_left_to_do_it(tokens: Tokenizer) -> None:
    native = ChatTemplate(NATIVE.source, tokens.special_tokens)
    assert tool_text(native, tokens.added_tokens) is None
    chat = chat_with(tokens, NATIVE.source)
    assert chat.call_marks() is None
    assert chat.prompt_text(TALK[:2], [TOOL]) == native.render(TALK[:2], [TOOL], add_generation_prompt=True)


def test_a_conversation_without_functions_is_as_it_was(tokens: Tokenizer) -> None:
    plain, talk = ChatTemplate(PLAIN, tokens.special_tokens), TALK[:2]
    assert chat_with(tokens, PLAIN).prompt_text(talk) == plain.render(talk, None, add_generation_prompt=True)


class NoMarks:
    def special_id(self, text: str) -> int | None:
        return None

    def call_marks(self) -> tuple[str, str] | None:
        return None


@pytest.mark.parametrize(
    ("text", "content", "arguments"),
    [
        ('<|tool_call|>[{"name": "weather", "arguments": {"a": 1}}]<|/tool_call|>', "", ['{"a": 1}']),
        ('Let me see. <tool_call>{"name": "weather", "parameters": {}}</tool_call>', "Let me see.", ["{}"]),
        ('[{"name": "weather", "arguments": "{\\"a\\": 2}"}, {"name": "weather", "arguments": {}}]', "", ['{"a": 2}', "{}"]),
        ('{"type": "function", "function": {"name": "weather", "arguments": {}}}', "", ["{}"]),
        ('<tool_call>[{"name": "other", "arguments": {}}]</tool_call>', None, []),
        ('<tool_call>[{"name": "weather", "arguments": 5}]</tool_call>', None, []),
        ('<tool_call>[{"name": "weather"', None, []),
        ("It is {sunny}.", None, []),
    ],
)
def test_calls_are_read_and_what_is_none_stays_text(text: str, content: str | None, arguments: list[str], tmp_path: Path) -> None:
    use = tool_use({"tools": [TOOL]}, NoMarks())
    assert use is not None
    rest, calls = calls_in(text, use)
    assert [call.arguments for call in calls] == arguments
    assert rest == (text if content is None else content)


def test_text_is_shown_as_soon_as_it_can_be_no_call() -> None:
    assert not may_become_call("It is sunny", alone=True)
    for text in ("", "  ", "{", '[{"na', "So <tool", "<|tool_call|>[", "see <tool_call>[{}]"):
        assert may_become_call(text, alone=True)
    for text in ("[1", "{", '{"name": "weather"'):  # after other text only a mark begins a call
        assert not may_become_call(text, alone=False)


PARTS = (
    "Sure: ", " ", "\n", "a < b", "[1]", "{x}", '{"name": "weather", "arguments": {}}',
    '[{"name": "weather", "arguments": {"a": 1}}]',
    '<tool_call>{"name": "weather"}</tool_call>', "<tool_call>", "</tool_call>", "<|tool_call|>", "<|/tool_call|>",
    '{"name": "no"}', "<tool",
)  # fmt: skip


def seen(parts: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]], str]:
    """Return what an answer's messages or deltas say: the text, the functions called, and why it ended."""
    said = [part.get("message") or part["delta"] for part in parts]
    calls = [call["function"] for one in said for call in one.get("tool_calls", ())]
    return "".join(one.get("content") or "" for one in said), calls, parts[-1]["finish_reason"]


def test_an_answer_is_the_same_streamed_and_whole_however_it_is_cut() -> None:
    body = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "tools": [TOOL]}
    asked = read_question(body, "chat.completion", Asked("toy", ToyTokens(), 8192))
    head, random, called = Head("chatcmpl-1", 1, asked, ToyTokens(), "f", {}), Random(6), 0
    for _ in range(3000):
        text = "".join(random.choices(PARTS, k=random.randint(0, 6)))
        cuts = sorted(random.sample(range(len(text) + 1), min(len(text), random.randint(0, 6))))
        pieces = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
        stream, reason = Stream(head, None), random.choice(["stop", "length"])
        chunks = [chunk for piece in pieces for chunk in stream.piece(0, piece, [])] + list(stream.end(0, reason))
        streamed = seen([chunk["choices"][0] for chunk in chunks])
        assert streamed == seen(whole(head, [Choice(text, [], reason)], 1, None)["choices"]), pieces
        called += bool(streamed[1])
    assert 300 < called < 1500
