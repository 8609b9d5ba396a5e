"""What is trained of a conversation, over all templates, all kinds of tokenizers and random conversations."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kivnun.data.rows import ChatRecord, Where
from kivnun.data.template import ChatTokenizer, load_tokenizer
from template_corpus import FAMILIES, SPECIALS, TOKENIZERS, Family, write_base

WHERE = Where("rows.jsonl", 7)

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}}

NASTY = (
    "", " ", "\n", "  \n\n ", " a", "a ", "\na\n", "the reply", "שלום, מה שלומך?", "👩‍👩‍👧 é é", "<|en",
    "<|", "|>", "[INST]", "[/INST]",
    "<</SYS>>", "assistant", "user", "ASSISTANT: the end", "USER:", "### Response:\n", "### Instruction:", "{{ eos_token }}",
    "{% endfor %}", "\\n", "the  reply   is\there", "\u00a0x\u2003", "'s 're", "1234567", "\r\nwindows\r\n", "\x00",
)  # fmt: skip


@pytest.fixture(scope="session")
def tokenizers_of(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], ChatTokenizer]:
    """Every family's template with every kind of tokenizer, loaded once."""
    root = tmp_path_factory.mktemp("bases")
    made: dict[tuple[str, str], ChatTokenizer] = {}
    for kind, build in TOKENIZERS.items():
        tokenizer = build()
        for family in FAMILIES:
            made[kind, family.name] = load_tokenizer(write_base(root / kind / family.name, tokenizer, family))
    return made


def contents(kind: str) -> st.SearchStrategy[str]:
    """Message texts. Special tokens inside a text are drawn only where tokenizers can decode what is beside them."""
    wild = st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=12)
    texts = st.one_of(st.sampled_from(NASTY), wild)
    if kind in ("bytes", "bytes_any_merge"):
        texts = st.one_of(texts, st.sampled_from([f"a {token} b" for token in SPECIALS] + list(SPECIALS)))
    joined = st.lists(texts, min_size=1, max_size=2).map("".join)
    if kind in ("bytes", "bytes_any_merge"):
        return joined
    # Hypothesis draws words that stand in the tests' own code as well, and two texts may make a special token together.
    return joined.filter(lambda text: not any(token in text for token in SPECIALS))


@st.composite
def conversations(draw: st.DrawFn, family: Family, kind: str) -> ChatRecord:
    text = contents(kind)
    messages: list[dict[str, Any]] = []
    if family.system and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(text)})
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(text)})
        reply: dict[str, Any] = {"role": "assistant", "content": draw(text.filter(lambda t: "think>" not in t))}
        if draw(st.booleans()):
            reply["weight"] = draw(st.sampled_from([0, 1, 1]))
        messages.append(reply)
    if not any(m.get("weight", 1) for m in messages if m["role"] == "assistant"):
        messages[-1]["weight"] = 1
    if draw(st.integers(0, 4)) == 0:
        messages.append({"role": "user", "content": draw(text)})
    tools = (TOOL,) if family.tools and draw(st.booleans()) else None
    return ChatRecord(tuple(messages), tools, WHERE)


def trained_numbers(record: ChatRecord) -> list[int]:
    return [n for n, m in enumerate(record.messages) if m["role"] == "assistant" and m.get("weight", 1)]


def text_between(tokenizer: ChatTokenizer, ids: list[int], begin: int, end: int) -> str:
    """Return what ids[begin:end] show, from decoding the row up to either place: no code of the masks is used."""
    text = tokenizer.decode(ids[:end]).removeprefix(tokenizer.decode(ids[:begin]))
    legacy = tokenizer.decode([*tokenizer.tokens.encode_plain("<s>a")]) == "<s> a"
    follows_special = begin > 0 and ids[begin - 1] in set(tokenizer.tokens.added_tokens.values())
    return text.removeprefix(" ") if legacy and follows_special else text


def spans(weights: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], weights > 0, [0]])))
    return [(int(begin), int(end)) for begin, end in zip(edges[::2], edges[1::2], strict=True)]


def comparable(text: str, family: Family, kind: str) -> str:
    """Return a text as far as a kind of tokenizer can show it: "▁" is a space to some, and some decoders put spaces after special
    tokens, or swallow whitespace there, within the reply, which Harmony begins with special tokens."""
    text = text.replace("▁", " ") if kind.startswith("spaces") else text
    return "".join(text.split()) if family.name == "harmony" and (kind.endswith("strip") or "prepend" in kind) else text


def check_conversation(tokenizer: ChatTokenizer, family: Family, kind: str, record: ChatRecord) -> None:
    numbers = trained_numbers(record)
    expected = [family.reply(record.messages[n]["content"]) + family.marker for n in numbers]
    shown: list[str] = []
    starts: list[tuple[list[int], int]] = []
    for ids, weights, prompt_len in tokenizer.chat_rows(record):
        assert ids.dtype == np.int32
        assert weights.dtype == np.float32
        row_spans = spans(weights)
        assert prompt_len == row_spans[-1][0]
        for begin, end in row_spans:
            shown.append(text_between(tokenizer, ids.tolist(), begin, end))
            starts.append((ids.tolist(), begin))
    assert [comparable(text, family, kind) for text in shown] == [comparable(text, family, kind) for text in expected]
    for number, (ids, begin) in zip(numbers, starts, strict=True):
        assert tokenizer.prompt_ids(record.messages[:number], record.tools) == ids[:begin]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_trained_text_is_the_replies_with_their_marker_and_prompts_are_prefixes(
    family: Family, tokenizers_of: dict[tuple[str, str], ChatTokenizer]
) -> None:
    @settings(max_examples=18, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data(), st.sampled_from(sorted(TOKENIZERS)))
    def check(data: st.DataObject, kind: str) -> None:
        record = data.draw(conversations(family, kind))
        check_conversation(tokenizers_of[kind, family.name], family, kind, record)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_trained_text_is_the_replies_over_many_conversations(
    family: Family, kind: str, tokenizers_of: dict[tuple[str, str], ChatTokenizer]
) -> None:
    tokenizer = tokenizers_of[kind, family.name]

    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(conversations(family, kind))
    def check(record: ChatRecord) -> None:
        check_conversation(tokenizer, family, kind, record)

    check()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_conversation_is_one_row_unless_earlier_turns_change(
    family: Family, tokenizers_of: dict[tuple[str, str], ChatTokenizer]
) -> None:
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")]
    rows = tokenizers_of["bytes", family.name].chat_rows(ChatRecord(tuple(turns), None, WHERE))
    assert len(rows) == (3 if family.per_turn else 1)
    assert all(begin < end <= nxt for row in rows for (begin, end), (nxt, _) in pairwise(spans(row[1])))


def test_there_are_forty_templates() -> None:
    assert len({family.name for family in FAMILIES}) >= 40


def test_the_folder_fixture_is_read_back(tmp_path: Path) -> None:
    family = FAMILIES[0]
    tokenizer = load_tokenizer(write_base(tmp_path / "base", TOKENIZERS["bytes"](), family))
    assert tokenizer.has_template
    assert tokenizer.eos_id == tokenizer.tokens.added_tokens[family.eos]
