"""Functions that a model may call: which are offered, whether one must be called, and the calls in what was written.

The functions are rendered as training renders them (`data/template.py`, `data/tool_text.py`). An answer that must be a call is held
by a grammar to a list of `{"name", "arguments"}`, between the marks of training, so that its arguments are JSON of the function's
schema whatever the model is. Otherwise what it wrote is read: between marks, or where all of it is a call.
Next: `constraints.py`, `question.py`, `reply.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from kivnun.data.chat_shape import Sentences, check_tools
from kivnun.data.jsonl import LineProblem, as_list, as_object, parse_value
from kivnun.data.tool_text import MARKS
from kivnun.serve.constraints import call_grammar
from kivnun.serve.parameters import bad, flag, shown

MAX_TOOLS = 128


class CallTokens(Protocol):
    def special_id(self, text: str) -> int | None: ...
    def call_marks(self) -> tuple[str, str] | None:
        """Return what stands around calls in training's rows; None where the template alone knows."""
        ...


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The functions of a request. With `grammar` every answer is a list of calls; `many` says whether it may hold more than one.
    `spelt` are the special tokens by which calls are told."""

    offered: tuple[dict[str, Any], ...]
    many: bool
    grammar: str | None
    spelt: tuple[int, ...]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool["function"]["name"] for tool in self.offered)


@dataclass(frozen=True, slots=True)
class Call:
    """A call: the function's name and its arguments as JSON."""

    name: str
    arguments: str


def tool_use(body: Mapping[str, Any], tokens: CallTokens) -> ToolUse | None:
    """Return how functions are to be used; None where there are none, or none may be. Raises Refusal."""
    tools = _offered(body)
    choice = body.get("tool_choice", "auto" if tools else "none")
    if choice not in ("none", "auto") and not tools:
        raise bad("tool_choice", "tool_choice needs tools")
    if choice == "none" or not tools:
        return None
    many = flag(body, "parallel_tool_calls") if "parallel_tool_calls" in body else True
    spelt = tuple(found for pair in MARKS for mark in pair if (found := tokens.special_id(mark)) is not None)
    if choice == "auto":
        return ToolUse(tools, many, None, spelt)
    if "response_format" in body and body["response_format"] != {"type": "text"}:
        raise bad(
            "response_format", "an answer cannot be a call and of this format as well: set tool_choice to auto, or leave one out"
        )
    chosen = tools if choice == "required" else tuple(tool for tool in tools if tool["function"]["name"] == _named(choice))
    if not chosen:
        raise bad("tool_choice", f"tool_choice names {shown(_named(choice))}, which is not among tools")
    one = choice != "required" or not many
    marks = tokens.call_marks()
    special = marks is not None and tokens.special_id(marks[0]) is not None
    return ToolUse(tools, not one, call_grammar(chosen, marks, special, many=not one), spelt)


def _offered(body: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    problems = Sentences()
    tools = check_tools(_without_nulls(body.get("tools")), problems) or ()
    if not problems and len({tool["function"]["name"] for tool in tools}) < len(tools):
        problems("tools: two functions have one name")
    if not problems and len(tools) > MAX_TOOLS:
        problems(f"tools: at most {MAX_TOOLS}, got {len(tools)}")
    if problems:
        raise bad("tools", "; ".join(problems[:20]))
    return tools


def _without_nulls(tools: Any) -> Any:
    """Return functions without what is null in them: a client that dumps its models says nothing by it."""
    items = as_list(tools)
    return tools if items is None else [_said_of(item) for item in items]


def _said_of(tool: Any) -> Any:
    given = as_object(tool)
    function = None if given is None else as_object(given.get("function"))
    if given is None or function is None:
        return tool
    return {**given, "function": {name: value for name, value in function.items() if value is not None}}


def _named(choice: Any) -> str:
    given = as_object(choice)
    function = None if given is None or given.get("type") != "function" else as_object(given.get("function"))
    name = None if function is None else function.get("name")
    if not isinstance(name, str):
        allowed = 'none, auto, required or {"type": "function", "function": {"name": ...}}'
        raise bad("tool_choice", f"tool_choice must be {allowed}, got {shown(choice)}")
    return name


def calls_in(text: str, use: ToolUse, alone: bool = True) -> tuple[str, list[Call]]:
    """Return what an answer says beside its calls, and the calls. What looks like a call and is none stays text.

    `alone` says that nothing of the answer stands before this text: else only what is marked is a call."""
    if not (alone or any(opening in text for opening, _ in MARKS)):
        return text, []
    before, written, after = _marked(text)
    calls = _calls(written, use)
    return ((before + after).rstrip(), calls) if calls else (text, [])


def may_become_call(text: str, alone: bool) -> bool:
    """Return whether the text so far holds a mark, or could be the beginning of a call: then it is not shown yet.

    Nor are blanks at its end, which are left out before a call. `alone` as in `calls_in`."""
    return (
        not text
        or text[-1].isspace()
        or (alone and text.lstrip()[0] in "[{")
        or any(opening in text or any(text.endswith(opening[:size]) for size in range(1, len(opening))) for opening, _ in MARKS)
    )


def _marked(text: str) -> tuple[str, str, str]:
    """Return the text before, between and after the marks of a call; all of it is between where there are none."""
    for opening, closing in MARKS:
        before, found, rest = text.partition(opening)
        if found:
            inside, _, after = rest.partition(closing)
            return before, inside, after
    return "", text, ""


def _calls(written: str, use: ToolUse) -> list[Call]:
    try:
        value = parse_value(written.strip())
    except LineProblem:
        return []
    items = as_list(value)
    items = [value] if items is None else items
    found = [_call(item, use.names) for item in items[: None if use.many else 1]]
    calls = [call for call in found if call is not None]
    return calls if len(calls) == len(found) else []


def _call(item: Any, names: frozenset[str]) -> Call | None:
    given = as_object(item)
    given = as_object(given["function"]) if given is not None and "function" in given else given
    if given is None or given.get("name") not in names:
        return None
    arguments = given.get("arguments", given.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = parse_value(arguments)
        except LineProblem:
            return None
    return Call(given["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
