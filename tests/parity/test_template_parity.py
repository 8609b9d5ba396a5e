"""Token ids of conversations against transformers' `apply_chat_template`, over all templates and kinds of tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from kivnun.data.rendering import PINNED_DATE, ChatTemplate
from kivnun.data.rows import ChatRecord, Where
from kivnun.data.template import ChatTokenizer, load_tokenizer
from template_corpus import FAMILIES, PLAIN, TOKENIZERS, Family, write_base

WHERE = Where("rows.jsonl", 1)
TOOL = {"type": "function", "function": {"name": "weather", "description": "שלום <b>&", "parameters": {"type": "object"}}}

# Replies as people write them first, then replies whose first or last characters can join what the template puts beside them.
REPLIES = ("the reply is here.", "שלום לך, מה שלומך?", "Yes.\n\n1. one\n2. two", "42")
SEAMS = (" the reply", "the reply ", "\nlines", "  two spaces  ", "", ": hello\n\n")


def conversation(reply: str, *, system: bool) -> list[dict[str, Any]]:
    turns = [{"role": "system", "content": "You are helpful."}] if system else []
    for question in ("hello world, how are you?", "and now?"):
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return turns


def whole_ids(theirs: PreTrainedTokenizerFast, messages: list[dict[str, Any]], *, prompt: bool, tools: Any = None) -> list[int]:
    return theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, return_dict=False)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[ChatTokenizer, PreTrainedTokenizerFast]]:
    root = tmp_path_factory.mktemp("bases")
    made: dict[tuple[str, str], tuple[ChatTokenizer, PreTrainedTokenizerFast]] = {}
    for kind, build in TOKENIZERS.items():
        tokenizer = build()
        for family in FAMILIES:
            folder = write_base(root / kind / family.name, tokenizer, family)
            theirs = PreTrainedTokenizerFast.from_pretrained(folder)
            # Their clock is the day's; the template is given ours instead, so that both print the same date.
            theirs.chat_template = family.source.replace("strftime_now('%d %b %Y')", f"'{PINNED_DATE:%d %b %Y}'")
            made[kind, family.name] = (load_tokenizer(folder), theirs)
    return made


def compare(ours: ChatTokenizer, theirs: PreTrainedTokenizerFast, family: Family, reply: str) -> list[bool]:
    """Return, for the prompts and the row of one conversation, whether the ids are transformers' own."""
    messages = conversation(reply, system=family.system)
    same: list[bool] = []
    if not family.prompt_extended:
        for count in range(1, len(messages) + 1):
            if messages[count - 1]["role"] == "user":
                same.append(ours.prompt_ids(messages[:count]) == whole_ids(theirs, messages[:count], prompt=True))
    if not family.per_turn and not family.prompt_extended:
        ((ids, _, _),) = ours.chat_rows(ChatRecord(tuple(messages), None, WHERE))
        same.append(ids.tolist() == whole_ids(theirs, messages, prompt=False))
    return same


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_are_those_of_apply_chat_template(
    kind: str, pairs: dict[tuple[str, str], tuple[ChatTokenizer, PreTrainedTokenizerFast]]
) -> None:
    """Where a reply meets a special token on both sides, and text that no merge crosses, ids are the same list."""
    different = [
        (family.name, reply)
        for family in FAMILIES
        for reply in REPLIES
        if not all(compare(*pairs[kind, family.name], family, reply)) and not straddles(*pairs[kind, family.name], family, reply)
    ]
    assert different == []


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_where_ids_differ_a_token_lies_over_the_edge_of_a_reply(
    kind: str, pairs: dict[tuple[str, str], tuple[ChatTokenizer, PreTrainedTokenizerFast]], record_property: Any
) -> None:
    compared = straddled = 0
    for family in FAMILIES:
        for reply in (*REPLIES, *SEAMS):
            same = compare(*pairs[kind, family.name], family, reply)
            compared += len(same)
            straddled += same.count(False)
            assert all(same) or straddles(*pairs[kind, family.name], family, reply), (family.name, reply)
    record_property("compared", compared)
    record_property("straddled", straddled)
    print(f"{kind}: {straddled} of {compared} renderings have a token over the edge of a reply")
    assert straddled < compared / 4


def straddles(ours: ChatTokenizer, theirs: PreTrainedTokenizerFast, family: Family, reply: str) -> bool:
    """Return whether transformers' encoding of the whole, or of a prompt of it, has a token over a prompt's or a marker's edge.

    Seen from outside: the ids of a prompt are no prefix of the ids of the whole, or the text around a marker is not kept.
    """
    messages = conversation(reply, system=family.system)
    text = theirs.apply_chat_template(messages, tokenize=False)
    encoding = theirs._tokenizer.encode(text, add_special_tokens=False)
    edges: set[int] = set()
    for count in range(1, len(messages)):
        if messages[count]["role"] == "assistant":
            prompt = theirs.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=True)
            end = text.find(family.marker, len(prompt) + len(family.reply(reply)))
            edges |= {len(prompt), end}
            alone = theirs._tokenizer.encode(prompt, add_special_tokens=False).ids
            if encoding.ids[: len(alone)] != alone:
                return True
    return any(begin < edge < end for begin, end in encoding.offsets for edge in edges)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.tools], ids=lambda family: family.name)
def test_tools_and_tool_calls_render_as_in_transformers(
    family: Family, pairs: dict[tuple[str, str], tuple[ChatTokenizer, PreTrainedTokenizerFast]]
) -> None:
    ours, theirs = pairs["bytes", family.name]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "חיפה", "days": [1, 2.5, None, True]}}}
    messages = [
        {"role": "system", "content": "You call tools."},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    assert ours.prompt_ids(messages[:2], [TOOL]) == whole_ids(theirs, messages[:2], prompt=True, tools=[TOOL])
    ((ids, weights, prompt_len),) = ours.chat_rows(ChatRecord(tuple(messages), (TOOL,), WHERE))
    assert ours.decode(ids.tolist()) == theirs.apply_chat_template(messages, tools=[TOOL], tokenize=False)
    trained = ours.decode(ids[weights > 0].tolist())
    assert "חיפה" in trained
    assert trained.endswith(("<|end|>", "<|im_end|>", "<|eom_id|>"))
    assert "weather?" not in trained
    assert ours.decode(ids[:prompt_len].tolist()) == ours.decode(ours.prompt_ids(messages[:2], [TOOL]))


RENDERINGS = {
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "json": "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}|{{ {'b': 1, 'a': 'é<'} | tojson(sort_keys=True) }}",
    "json separators": "{{ messages[0] | tojson(separators=(',', ':'), ensure_ascii=True) }}",
    "trimming": "  {% if true %}\n  x\n  {% endif %}\n{{ messages[0].content }}\n\n",
    "namespace": "{% set ns = namespace(a=1) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a }}",
    "dict": "{{ dict(a=1, b=[2]) }}{{ dict.fromkeys(['x']) }}",
    "generation tag": "{% for m in messages %}\n{% generation %}\n{{ m.content }}\n{% endgeneration %}\n{% endfor %}",
    "generation scope": "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}",
    "tools and documents": "{{ tools is none }}{{ documents is none }}{{ nothing is defined }}{{ bos_token }}{{ eos_token }}",
    "null fields": "{% for m in messages %}{{ m.name is defined }}{{ m.content }}{{ m.weight is defined }}{% endfor %}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}",
}


@pytest.mark.parametrize("name", RENDERINGS)
def test_the_environment_renders_as_transformers_does(name: str, tmp_path: Path) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(write_base(tmp_path, TOKENIZERS["bytes"](), PLAIN))
    messages = [
        {"role": "user", "content": "שלום <&>", "name": None},
        {"role": "assistant", "content": "yes", "reasoning": "because"},
    ]
    expected = theirs.apply_chat_template(messages, chat_template=RENDERINGS[name], tokenize=False)
    template = ChatTemplate(RENDERINGS[name], {"bos_token": "<s>", "eos_token": "<|endoftext|>"})
    assert template.render(messages, None, add_generation_prompt=False) == expected


def _config(folder: Path, **fields: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


CONFIGS: dict[str, dict[str, Any]] = {
    "nothing more": {},
    "bos wanted": {"add_bos_token": True},
    "bos refused": {"add_bos_token": False},
    "a token that only the config lists": {
        "added_tokens_decoder": {
            "5000": {
                "content": "<|extra|>", "lstrip": False, "rstrip": True, "normalized": False, "single_word": False, "special": True
            }
        }
    },
    "objects for tokens": {"eos_token": {"content": "</s>", "__type": "AddedToken", "lstrip": False, "rstrip": False}},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_plain_text_is_encoded_as_transformers_does(kind: str, name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]()
    folder = write_base(tmp_path, tokenizer, PLAIN)
    fields = json.loads(json.dumps(CONFIGS[name]))
    listed = fields.get("added_tokens_decoder", {})
    if listed:
        fields["added_tokens_decoder"] = {str(tokenizer.get_vocab_size()): listed["5000"]}
    _config(folder, **fields)
    ours, theirs = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ("hello world", " שלום <|extra|> x<|end|> y", "a\n\n b", ""):
        assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.eos_id == theirs.eos_token_id


def test_older_folders_give_special_tokens_and_lists_of_templates(tmp_path: Path) -> None:
    folder = write_base(tmp_path, TOKENIZERS["bytes"](), PLAIN)
    (folder / "chat_template.jinja").unlink()
    templates = [
        {"name": "default", "template": PLAIN.source},
        {"name": "tool_use", "template": "{{ tools | tojson }}" + PLAIN.source},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates, "eos_token": "</s>"}))
    named = {"eos_token": {"content": "<|endoftext|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    ours, theirs = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.eos_id == theirs.eos_token_id
    messages = conversation("yes", system=True)
    for tools in (None, [TOOL]):
        assert ours.prompt_ids(messages[:2], tools) == whole_ids(theirs, messages[:2], prompt=True, tools=tools)


def test_a_post_processor_that_ends_texts_gives_no_second_eos(tmp_path: Path) -> None:
    tokenizer: Tokenizer = TOKENIZERS["bytes"]()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    ids = [(text, tokenizer.token_to_id(text)) for text in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    folder = write_base(tmp_path, tokenizer, PLAIN)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)("hello")["input_ids"]
    assert load_tokenizer(folder).encode("hello") == theirs[:-1]
