"""The tokenizer of a base: files it reads, errors it gives, plain text, stop ids, streams."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from kivnun.data.rows import ChatRecord, Where
from kivnun.data.template import ChatTokenizer, load_tokenizer
from kivnun.errors import BaseModelError, DataError
from template_corpus import FAMILIES, PLAIN, TOKENIZERS, Family, write_base

BY_NAME = {family.name: family for family in FAMILIES}
USER = {"role": "user", "content": "hello"}
REPLY = {"role": "assistant", "content": "the reply"}


@pytest.fixture(scope="module")
def raw() -> dict[str, Tokenizer]:
    return {kind: build() for kind, build in TOKENIZERS.items()}


def record(*messages: dict[str, Any], tools: tuple[dict[str, Any], ...] | None = None) -> ChatRecord:
    return ChatRecord(messages, tools, Where("rows.jsonl", 7))


def base(tmp_path: Path, tokenizer: Tokenizer, family: Family | str, **config: Any) -> Path:
    folder = write_base(tmp_path / "base", tokenizer, BY_NAME[family] if isinstance(family, str) else family)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def with_template(tmp_path: Path, tokenizer: Tokenizer, source: str) -> ChatTokenizer:
    return load_tokenizer(base(tmp_path, tokenizer, Family("own", source, "<|end|>")))


def trained(tokenizer: ChatTokenizer, *messages: dict[str, Any]) -> list[str]:
    return [tokenizer.decode(ids[weights > 0].tolist()) for ids, weights, _ in tokenizer.chat_rows(record(*messages))]


# Masks


def test_the_marker_of_each_turn_is_trained_and_the_eos_after_it_is_not(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    tokenizer = load_tokenizer(base(tmp_path, raw["bytes"], "phi_3"))
    ((ids, weights, _),) = tokenizer.chat_rows(record(USER, REPLY))
    assert tokenizer.decode(ids.tolist()).endswith("<|end|>\n<|endoftext|>")
    assert tokenizer.decode(ids[weights > 0].tolist()) == "the reply<|end|>"


def test_an_eos_that_is_also_the_padding_token_keeps_its_weight(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    tokenizer = load_tokenizer(base(tmp_path, raw["bytes"], "tulu", pad_token="<|endoftext|>"))
    ((ids, weights, _),) = tokenizer.chat_rows(record(USER, REPLY, USER, REPLY))
    eos = ids == tokenizer.eos_id
    assert eos.sum() == 2
    assert weights[eos].tolist() == [1, 1]


def test_a_reply_of_weight_0_is_context(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    tokenizer = load_tokenizer(base(tmp_path, raw["bytes"], "chatml"))
    first = {"role": "assistant", "content": "not this", "weight": 0}
    ((ids, weights, prompt_len),) = tokenizer.chat_rows(record(USER, first, USER, REPLY))
    assert tokenizer.decode(ids[weights > 0].tolist()) == "the reply<|im_end|>"
    assert "not this" in tokenizer.decode(ids[:prompt_len].tolist())


def test_a_template_that_drops_earlier_thoughts_trains_each_reply_with_its_own(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    tokenizer = load_tokenizer(base(tmp_path, raw["bytes"], "qwen_3"))
    replies = [{"role": "assistant", "content": f"answer {n}", "reasoning": f"thought {n}"} for n in (1, 2)]
    rows = tokenizer.chat_rows(record(USER, replies[0], USER, replies[1]))
    texts = [tokenizer.decode(ids[weights > 0].tolist()) for ids, weights, _ in rows]
    assert texts == [f"<think>\nthought {n}\n</think>\n\nanswer {n}<|im_end|>" for n in (1, 2)]
    ids, _, prompt_len = rows[1]
    assert "thought 1" not in tokenizer.decode(ids.tolist())
    assert tokenizer.prompt_ids([USER, replies[0], USER]) == ids[:prompt_len].tolist()


def test_a_template_without_a_marker_ends_each_reply_with_eos_and_says_so(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    tokenizer = load_tokenizer(base(tmp_path, raw["bytes"], "no_marker"))
    rows = tokenizer.chat_rows(record(USER, REPLY, USER, REPLY))
    assert [row[0][-1] for row in rows] == [tokenizer.eos_id] * 2
    assert [row[1][-1] for row in rows] == [1, 1]
    assert len(tokenizer.notes) == 1
    assert "EOS is put after each" in tokenizer.notes[0]


def test_words_between_the_reply_and_eos_are_trained_since_eos_follows_them(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    tokenizer = load_tokenizer(base(tmp_path, raw["bytes"], "words_before_eos"))
    assert trained(tokenizer, USER, REPLY) == ["the reply\n## stop</s>"]


def test_a_marker_written_inside_a_reply_does_not_end_the_trained_text(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    tokenizer = load_tokenizer(base(tmp_path, raw["bytes"], "plain"))
    assert trained(tokenizer, USER, {"role": "assistant", "content": "a<|end|><|user|>b"}) == ["a<|end|><|user|>b<|end|>"]


@pytest.mark.parametrize("kind", ["bytes_strip", "spaces_prepend_strip"])
def test_spaces_of_a_reply_survive_special_tokens_that_swallow_spaces(kind: str, tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    tokenizer = load_tokenizer(base(tmp_path, raw[kind], "phi_3"))
    ((ids, weights, prompt_len),) = tokenizer.chat_rows(record(USER, {"role": "assistant", "content": "  the reply  "}))
    reply_ids = ids[weights > 0].tolist()
    assert tokenizer.text_after(ids[:prompt_len].tolist(), reply_ids) == "  the reply  <|end|>"


def test_a_template_that_skips_a_reply_is_refused_with_the_row(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    source = "{% for m in messages if m.content %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    tokenizer = with_template(tmp_path, raw["bytes"], source + "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    with pytest.raises(DataError, match=r"rows\.jsonl:7: the chat template does not render message 2"):
        tokenizer.chat_rows(record(USER, {"role": "assistant", "content": ""}))


def test_a_conversation_with_nothing_to_train_is_refused(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    tokenizer = load_tokenizer(base(tmp_path, raw["bytes"], "plain"))
    with pytest.raises(DataError, match="no assistant message to train"):
        tokenizer.chat_rows(record(USER, REPLY | {"weight": 0}))


def test_the_first_token_has_no_weight_even_where_the_prompt_is_empty(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    tokenizer = with_template(tmp_path, raw["bytes"], "{% for m in messages %}{{ m.content + '<|end|>' }}{% endfor %}")
    ((_, weights, _),) = tokenizer.chat_rows(record(REPLY))
    assert weights[0] == 0
    assert weights[1:].all()


# Files


def test_a_folder_without_tokenizer_json_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no tokenizer\.json[\s\S]*save_pretrained"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    folder = base(tmp_path, raw["bytes"], "plain")
    (folder / name).write_text('{"model": [')
    with pytest.raises(BaseModelError, match=name):
        load_tokenizer(folder)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    folder = base(tmp_path, raw["bytes"], "plain", eos_token=None)
    with pytest.raises(BaseModelError, match="names no end-of-text token"):
        load_tokenizer(folder)


def test_stop_ids_hold_eos_the_marker_and_what_the_generation_config_lists(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    folder = base(tmp_path, raw["bytes"], "plain")
    (folder / "config.json").write_text('{"eos_token_id": 3}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    tokenizer = load_tokenizer(folder)
    added = tokenizer.tokens.added_tokens
    assert tokenizer.stop_ids == (added["<|endoftext|>"], 5, 6, added["<|end|>"])
    (folder / "generation_config.json").unlink()
    assert load_tokenizer(folder).stop_ids == (added["<|endoftext|>"], 3, added["<|end|>"])


def test_a_base_without_a_template_still_encodes_text(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    folder = base(tmp_path, raw["bytes"], "plain")
    (folder / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(folder)
    assert not tokenizer.has_template
    assert tokenizer.stop_ids == (tokenizer.eos_id,)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    with pytest.raises(BaseModelError, match=r"no chat template[\s\S]*data\.template"):
        tokenizer.prompt_ids([USER])


def test_a_template_given_by_path_replaces_the_base_s(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(BY_NAME["chatml"].source)
    tokenizer = load_tokenizer(base(tmp_path, raw["bytes"], "plain"), path)
    assert trained(tokenizer, USER, REPLY) == ["the reply<|im_end|>"]
    with pytest.raises(BaseModelError, match=r"gone\.jinja cannot be read"):
        load_tokenizer(tmp_path / "base", tmp_path / "gone.jinja")


def test_the_content_hash_changes_with_whatever_changes_ids(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    folder = base(tmp_path, raw["bytes"], "plain")
    hashes = [load_tokenizer(folder).content_hash, load_tokenizer(folder).content_hash]
    (folder / "chat_template.jinja").write_text(PLAIN.source + " ")
    hashes.append(load_tokenizer(folder).content_hash)
    base(tmp_path, raw["bytes"], "plain", eos_token="</s>")
    hashes.append(load_tokenizer(folder).content_hash)
    base(tmp_path, raw["spaces"], "plain")
    hashes.append(load_tokenizer(folder).content_hash)
    base(tmp_path, raw["spaces"], "llama_3_dated")
    hashes += [load_tokenizer(folder).content_hash, load_tokenizer(folder, now=datetime(2026, 1, 2)).content_hash]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[1:])) == 6


def test_a_template_s_date_is_held_unless_another_is_given(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    folder = base(tmp_path, raw["bytes"], "llama_3_dated")
    tokenizer = load_tokenizer(folder)
    assert "26 Jul 2024" in tokenizer.decode(tokenizer.prompt_ids([USER]))
    assert "26 Jul 2024" in tokenizer.notes[0]
    later = load_tokenizer(folder, now=datetime(2026, 1, 2))
    assert "02 Jan 2026" in later.decode(later.prompt_ids([USER]))
    assert "02 Jan 2026" in later.notes[0]


# Templates that fail


def test_a_template_s_own_refusal_is_told_with_the_row(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    tokenizer = load_tokenizer(base(tmp_path, raw["bytes"], "gemma"))
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .*System role not supported") as caught:
        tokenizer.chat_rows(record({"role": "system", "content": "x"}, USER, REPLY))
    assert caught.value.problems[0].line == 7


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + 1 }}",
        "{{ messages[5].content.x }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set ns = namespace(_a=1) %}",
        "{% set ns = namespace() %}{% set ns._a = 1 %}",
    ],
)
def test_an_error_or_escape_inside_a_template_is_a_sentence(source: str, tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    tokenizer = with_template(tmp_path, raw["bytes"], source)
    with pytest.raises(DataError, match="the chat template refuses this conversation"):
        tokenizer.prompt_ids([USER])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for i in range(5000) %}{% for j in range(5000) %}{% endfor %}{% endfor %}", "counts further than 1,000,000"),
        ("{% set x = 'x' * 1000000 %}{% for i in range(1000) %}{{ x }}{% endfor %}", "writes more than"),
    ],
)
def test_a_template_without_an_end_is_refused(source: str, said: str, tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    with pytest.raises(DataError, match=said):
        with_template(tmp_path, raw["bytes"], source).prompt_ids([USER])


def test_a_template_cannot_change_the_messages_it_is_shown(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    tokenizer = with_template(tmp_path, raw["bytes"], "{% set x = messages.append(messages[0]) %}")
    with pytest.raises(DataError, match="refuses"):
        tokenizer.prompt_ids([USER])


def test_a_template_with_a_syntax_error_is_refused_with_its_line(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    with pytest.raises(BaseModelError, match="not valid Jinja: line 2"):
        with_template(tmp_path, raw["bytes"], "{{ 1 }}\n{% endfor %}")


def test_half_a_surrogate_pair_is_refused_with_the_row(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    tokenizer = load_tokenizer(base(tmp_path, raw["bytes"], "plain"))
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .*surrogate"):
        tokenizer.chat_rows(record(USER, {"role": "assistant", "content": "a\ud800"}))


# Plain text


@pytest.mark.parametrize("kind", ["spaces", "spaces_prepend"])
def test_bos_is_put_once_and_never_doubled(kind: str, tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    tokenizer = load_tokenizer(base(tmp_path, raw[kind], "llama_2"))
    bos = tokenizer.tokens.added_tokens["<s>"]
    assert tokenizer.encode("hello")[0] == bos
    assert tokenizer.encode("<s>hello").count(bos) == 1
    assert bos not in tokenizer.encode("hello", add_bos=False)
    assert tokenizer.prompt_ids([USER]).count(bos) == 1
    ((ids, _, _),) = tokenizer.chat_rows(record(USER, REPLY))
    assert (ids == bos).sum() == 1


def test_a_tokenizer_that_puts_no_bos_gets_none(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    tokenizer = load_tokenizer(base(tmp_path, raw["bytes"], "plain"))
    assert tokenizer.encode("hello") == tokenizer.encode("hello", add_bos=False)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_a_completion_decodes_to_itself_after_its_prompt(kind: str, data: st.DataObject, raw: dict[str, Tokenizer]) -> None:
    text = st.text(st.characters(codec="utf-8", exclude_characters="▁"), min_size=0, max_size=10)
    joints = st.sampled_from(["", " ", "\n", "\n\n", "  ", ": the", "A:", " yes"])
    prompt, completion = data.draw(text) + data.draw(joints), data.draw(joints) + data.draw(text)
    tokenizer = PAIRS.setdefault(kind, _shared(raw[kind]))
    ids, prompt_len = tokenizer.encode_pair(prompt, completion)
    assert ids[:prompt_len] == tokenizer.encode(prompt)
    assert tokenizer.decode(ids).removeprefix(tokenizer.decode(ids[:prompt_len])) == completion or not prompt
    assert tokenizer.text_after(ids[:prompt_len], ids[prompt_len:]) == completion


PAIRS: dict[str, ChatTokenizer] = {}


def _shared(tokenizer: Tokenizer) -> ChatTokenizer:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return load_tokenizer(write_base(Path(folder), tokenizer, PLAIN))


# Streams


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", ["שלום עולם", "a 👩‍👩‍👧 b", " leading and  double", "é̂ \n\n x", "one<|end|> two", ""])
def test_a_stream_gives_whole_characters_that_join_to_the_text(kind: str, text: str, raw: dict[str, Tokenizer]) -> None:
    tokenizer = PAIRS.setdefault(kind, _shared(raw[kind]))
    ids = tokenizer.encode(text, add_bos=False)
    stream = tokenizer.stream_decoder()
    pieces = [stream.push(token) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip_special=True)


def test_a_stream_that_ends_inside_a_character_shows_that_it_does(raw: dict[str, Tokenizer]) -> None:
    tokenizer = PAIRS.setdefault("bytes", _shared(raw["bytes"]))
    ids = tokenizer.encode("ok 👩", add_bos=False)[:-1]
    stream = tokenizer.stream_decoder()
    assert "".join(stream.push(token) for token in ids) == "ok "
    assert stream.finish() == "\ufffd"


# House


def test_the_template_needs_no_model_library() -> None:
    code = "import sys, kivnun.data.template; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_row_arrays_have_the_engine_s_types(tmp_path: Path, raw: dict[str, Tokenizer]) -> None:
    ((ids, weights, prompt_len),) = load_tokenizer(base(tmp_path, raw["bytes"], "plain")).chat_rows(record(USER, REPLY))
    assert (ids.dtype, weights.dtype, type(prompt_len)) == (np.int32, np.float32, int)
    assert len(ids) == len(weights)
