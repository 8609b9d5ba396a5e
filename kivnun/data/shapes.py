"""The shapes that rows may have: which keys say a shape, which it takes, and who reads it.

Order matters: a row with keys of two shapes is meant in the first.
Next: `chat_shape.py` and `task_shapes.py` (the rules of each), `formats.py` (files).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kivnun.data import task_shapes
from kivnun.data.chat_shape import Complain, check_keys, check_messages, check_prompt_messages, check_reply, check_tools
from kivnun.data.jsonl import as_list, as_object, type_name
from kivnun.data.rows import ChatRecord, PreferenceRecord, PromptRecord, Record, TextRecord, Where
from kivnun.data.task_shapes import string_at

Row = dict[str, Any]
PARALLEL = "parallel_tool_calls"


@dataclass(frozen=True, slots=True)
class Variant:
    """One set of keys of a shape: those it needs, and those it may have."""

    needs: tuple[str, ...]
    may: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.needs, *self.may)


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape. A row that holds one of `signs` is meant in it, whatever else it holds; of a table, the first variant that has all
    it needs. `spelled` are the keys whose lists and objects a table may spell as JSON; `asks` is true where `data.instruction` is
    put before a row's text. `silent` keys may stand in a row although nothing is trained from them; no column is one."""

    name: str
    example: str
    signs: tuple[str, ...]
    variants: tuple[Variant, ...]
    parse: Callable[[Row, Where, Complain, str | None], Record | None]
    spelled: tuple[str, ...] = ()
    asks: bool = False
    silent: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key for variant in self.variants for key in variant.keys))

    def check_keys(self, row: Row, complain: Complain) -> None:
        """Complain of keys that would have no effect, beside those of the last variant of which the row has a key of its own."""
        chosen = self.variants[0]
        known = set[str](chosen.keys)
        for variant in self.variants[1:]:
            if any(key in row and key not in known for key in variant.keys):
                chosen = variant
            known.update(variant.keys)
        check_keys([key for key in row if key not in self.silent], chosen.keys, "", complain)


def _messages(row: Row, where: Where, complain: Complain, _: str | None) -> Record | None:
    messages = check_messages(row["messages"], complain)
    check_parallel(row, "", complain)
    return ChatRecord(messages, check_tools(row.get("tools"), complain), where)


def _prompt_completion(row: Row, where: Where, complain: Complain, _: str | None) -> Record | None:
    prompt = string_at(row, "prompt", complain)
    completion = string_at(row, "completion", complain)
    if prompt == "":
        complain("prompt is empty: nothing would predict the first token; use the text format for text without a prompt")
    return PromptRecord(prompt, completion, where)


def _text(row: Row, where: Where, complain: Complain, _: str | None) -> Record | None:
    text = string_at(row, "text", complain)
    if text == "":
        complain("text is empty: there is nothing to train")
    return TextRecord(text, where)


def _preference(row: Row, where: Where, complain: Complain, _: str | None) -> Record | None:
    hosted = any(key in row for key in ("input", "preferred_output", "non_preferred_output"))
    before = "input" if hosted else "prompt"
    better, worse = ("preferred_output", "non_preferred_output") if hosted else ("chosen", "rejected")
    missing = [key for key in (before, better, worse) if key not in row]
    for key in missing:
        complain(f"the key {key!r} is missing")
    if missing:
        return None
    prompt = _hosted_prompt(row["input"], where, complain) if hosted else _plain_prompt(row, where, complain)
    chosen = check_reply(row[better], better, complain)
    rejected = check_reply(row[worse], worse, complain)
    if chosen is None or rejected is None or prompt is None:
        return None
    if chosen == rejected:
        complain(f"{better} and {worse} are the same: the pair says nothing about which is better")
    return PreferenceRecord(prompt, chosen, rejected, where)


def _hosted_prompt(value: Any, where: Where, complain: Complain) -> ChatRecord | None:
    given = as_object(value)
    if given is None:
        complain(f"input must be an object with messages, got {type_name(value)}")
        return None
    check_keys([key for key in given if key != PARALLEL], ("messages", "tools"), "input.", complain)
    check_parallel(given, "input.", complain)
    if "messages" not in given:
        complain("the key 'input.messages' is missing")
        return None
    messages = check_prompt_messages(given["messages"], "input.messages", complain)
    return ChatRecord(messages, check_tools(given.get("tools"), complain, "input.tools"), where)


def check_parallel(given: Row, at: str, complain: Complain) -> None:
    """Check what OpenAI's files say of calls at once. The replies show it themselves: nothing is trained from it."""
    if not isinstance(given.get(PARALLEL, True), bool):
        complain(f"{at}{PARALLEL} must be true or false, got {type_name(given[PARALLEL])}")


def _plain_prompt(row: Row, where: Where, complain: Complain) -> ChatRecord | str | None:
    prompt = row["prompt"]
    if as_list(prompt) is not None:
        messages = check_prompt_messages(prompt, "prompt", complain)
        return ChatRecord(messages, check_tools(row.get("tools"), complain), where)
    if not isinstance(prompt, str):
        complain(f"prompt must be a string or a list of messages, got {type_name(prompt)}")
        return None
    if "tools" in row:
        complain("tools need a prompt of messages; this prompt is plain text")
    if prompt == "":
        complain("prompt is empty: nothing would predict the first token of the replies")
    return prompt


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "messages",
            '{"messages": [...]}',
            ("messages",),
            (Variant(("messages",), ("tools",)),),
            _messages,
            ("messages", "tools"),
            silent=(PARALLEL,),
        ),
        Shape(
            "sharegpt",
            '{"conversations": [...]}',
            ("conversations",),
            (Variant(("conversations",), ("id", "system")),),
            task_shapes.sharegpt,
            ("conversations",),
        ),
        Shape(
            "preference",
            '{"prompt": ..., "chosen": ..., "rejected": ...}, '
            '{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}',
            ("chosen", "rejected", "preferred_output", "non_preferred_output"),
            (Variant(("prompt", "chosen", "rejected"), ("tools",)), Variant(("input", "preferred_output", "non_preferred_output"))),
            _preference,
            ("tools", "input", "preferred_output", "non_preferred_output"),
        ),
        Shape(
            "prompt_completion",
            '{"prompt": ..., "completion": ...}',
            ("completion",),
            (Variant(("prompt", "completion")),),
            _prompt_completion,
        ),
        Shape(
            "prompt_response",
            '{"prompt": ..., "response": ...}',
            ("response",),
            (Variant(("prompt", "response"), ("system",)),),
            task_shapes.prompt_response,
        ),
        Shape(
            "instruction",
            '{"instruction": ..., "input": ..., "output": ...}',
            ("instruction", "output"),
            (Variant(("instruction", "output"), ("input", "system")),),
            task_shapes.instruction,
        ),
        Shape(
            "multiple_choice",
            '{"question": ..., "choices": [...], "answer": ...}',
            ("choices", "answerKey"),
            (Variant(("question", "choices", "answer")), Variant(("question", "choices", "answerKey"))),
            task_shapes.multiple_choice,
            ("choices",),
            asks=True,
        ),
        Shape(
            "entities",
            '{"tokens": [...], "tags": [...]}, {"text": ..., "entities": [...]}',
            ("tokens", "tags", "entities"),
            (Variant(("tokens", "tags"), ("labels",)), Variant(("text", "entities"), ("labels",))),
            task_shapes.entities,
            ("tokens", "tags", "entities", "labels"),
            asks=True,
        ),
        Shape(
            "classification",
            '{"text": ..., "label": ...}',
            ("label", "text1", "text2"),
            (Variant(("text", "label"), ("text2",)), Variant(("text1", "label"), ("text2",))),
            task_shapes.classification,
            asks=True,
        ),
        Shape("text", '{"text": ...}', ("text",), (Variant(("text",)),), _text),
    )
}
"""Every shape by its name, the name of its format."""

ALL_KEYS = tuple(dict.fromkeys(key for shape in SHAPES.values() for key in shape.keys))
EXAMPLES = " or ".join(shape.example for shape in SHAPES.values())
