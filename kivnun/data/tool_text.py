"""Functions and their calls in words, for chat templates that render none.

A template that ignores `tools` would drop them without a word, in training and in answering alike. So both put them into the
conversation first: the functions at the end of the system message (or where the template reads them there, as Phi-4-mini's does),
a call as a list of JSON between two marks, and what a function gave as the user's. Templates that render functions are left to do
it. Next: `template.py` (who asks), `kivnun/serve/tools.py` (who reads calls back).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kivnun.errors import DataError

Message = Mapping[str, Any]

MARKS = (("<|tool_call|>", "<|/tool_call|>"), ("<tool_call>", "</tool_call>"))
"""What stands around a list of calls: Phi-4-mini's own tokens, and plain text for bases without them."""

_PROBE = "Qz7Kivnun0Tool7zQ"
_PROBED: dict[str, Any] = {
    "type": "function",
    "function": {"name": _PROBE, "description": "a", "parameters": {"type": "object", "properties": {}}},
}
_USER = {"role": "user", "content": "a"}
_INTRODUCTION = (
    'You may call these functions:\n{tools}\nTo call, answer with nothing but {open}[{{"name": ..., "arguments": {{...}}}}]{close}'
)


class Renders(Protocol):
    def render(self, messages: Sequence[Message], tools: Sequence[Message] | None, *, add_generation_prompt: bool) -> str: ...


@dataclass(frozen=True, slots=True)
class ToolText:
    """How functions are put in words for one template: around calls are `marks`; `in_key` says that the template reads functions
    from a system message's `tools`."""

    template: Renders
    marks: tuple[str, str]
    in_key: bool

    def conversation(self, messages: Sequence[Message], tools: Sequence[Message] | None) -> tuple[list[Message], list[Message]]:
        """Return what comes before the conversation, and the conversation, message for message."""
        spelt = [self._spelt(message) for message in messages]
        if not tools:
            return [], spelt
        shown = json.dumps([dict(tool["function"]) for tool in tools], ensure_ascii=False)
        if spelt and spelt[0].get("role") in ("system", "developer"):
            return [], [self._told(spelt[0], shown), *spelt[1:]]
        lead = self._told({"role": "system", "content": ""}, shown)
        if _rendered(self.template, [lead, _USER]) is not None:
            return [lead], spelt
        return [], [
            {**spelt[0], "content": f"{self._words(shown)}\n\n{spelt[0].get('content') or ''}"},
            *spelt[1:],
        ] if spelt else []

    def _told(self, system: Message, shown: str) -> Message:
        if self.in_key:
            return {**system, "tools": shown}
        content = system.get("content")
        return {**system, "content": f"{content}\n\n{self._words(shown)}" if content else self._words(shown)}

    def _words(self, shown: str) -> str:
        return _INTRODUCTION.format(tools=shown, open=self.marks[0], close=self.marks[1])

    def _spelt(self, message: Message) -> Message:
        if message.get("role") == "tool":
            return {"role": "user", "content": f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"}
        if not message.get("tool_calls"):
            return message
        calls = [_call(call["function"]) for call in message["tool_calls"]]
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        written = self.marks[0] + json.dumps(calls, ensure_ascii=False) + self.marks[1]
        return {**rest, "content": (message.get("content") or "") + written}


def tool_text(template: Renders, added_tokens: Mapping[str, int]) -> ToolText | None:
    """Return how functions are put in words for a template; None where it renders them itself, or refuses them."""
    system = {"role": "system", "content": "a"}
    rendered = [_rendered(template, messages, [_PROBED]) for messages in ([_USER], [system, _USER])]
    if any(text is not None and _PROBE in text for text in rendered) or all(text is None for text in rendered):
        return None
    keyed = _rendered(template, [{**system, "tools": json.dumps([_PROBED["function"]])}, _USER])
    marks = next((pair for pair in MARKS if all(mark in added_tokens for mark in pair)), MARKS[-1])
    return ToolText(template, marks, in_key=keyed is not None and _PROBE in keyed)


def uses_tools(messages: Sequence[Message], tools: Sequence[Message] | None) -> bool:
    """Return whether a conversation offers, calls or answers functions."""
    return bool(tools) or any(message.get("tool_calls") or message.get("role") == "tool" for message in messages)


def _rendered(template: Renders, messages: Sequence[Message], tools: Sequence[Message] | None = None) -> str | None:
    try:
        return template.render(messages, tools, add_generation_prompt=True)
    except DataError:
        return None


def _call(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments", {})
    return {"name": function["name"], "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments}
