"""The rules of one conversation in OpenAI's shape: roles, content, tool calls, weights.

Each check takes the value, complains in words that name places, key names and types (never content), and returns the value as
records hold it. Rules about templates are not here: which roles a template knows only the template can say. Next: `task_shapes.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from kivnun.data.jsonl import LineProblem, as_list, as_object, key_name, parse_value, type_name

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_KEYS = {
    "assistant": ("role", "content", "name", "weight", "tool_calls"),
    "tool": ("role", "content", "name", "tool_call_id"),
}
_OTHER_KEYS = ("role", "content", "name")
_ALL_KEYS = ("role", "content", "name", "weight", "tool_calls", "tool_call_id")
# Keys that OpenAI's client writes as null in every message it dumps. Null says nothing; anything else cannot be trained.
_NULL_ONLY = {
    "refusal": "put the words of the refusal in content",
    "function_call": "use tool_calls",
    "audio": "only text is trained",
    "annotations": "only text is trained",
    "reasoning_content": "put what is to be trained in content",
}
_MAY_BE_NULL = frozenset((*_ALL_KEYS, *_NULL_ONLY))
_MEDIA = {
    "image_url": "an image", "image": "an image", "input_audio": "audio", "audio": "audio", "video": "video", "file": "a file",
    "refusal": "a refusal",
}  # fmt: skip


class Complain(Protocol):
    """Takes down what is wrong with a row, in words, and the page of docs/mistakes about it, if there is one."""

    def __call__(self, message: str, page: str | None = None) -> None: ...


class Sentences(list[str]):
    """What is wrong, as sentences alone, where no page is told."""

    def __call__(self, message: str, page: str | None = None) -> None:
        self.append(message)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that `name` is most likely a slip for, or None."""
    found = difflib.get_close_matches(name[:40].lower(), list(known), n=1, cutoff=0.75)
    return found[0] if found else None


def check_keys(value: Iterable[str], allowed: Sequence[str], at: str, complain: Complain) -> None:
    """Complain of every key outside `allowed`: with the nearest allowed name where one is near, else all in one sentence."""
    unknown = [key for key in value if key not in allowed]
    far: list[str] = []
    for key in unknown:
        if (near := nearest(key, allowed)) is not None:
            complain(f"unknown key {at}{key_name(key)}; did you mean {near!r}?")
        else:
            far.append(key)
    if far:
        shown = ", ".join(key_name(key) for key in far[:6]) + (f" and {len(far) - 6} more" if len(far) > 6 else "")
        place = f" in {at.rstrip('.')}" if at else ""
        complain(f"keys that would have no effect{place}: {shown}; allowed: {', '.join(allowed)}. Remove them")


def check_messages(value: Any, complain: Complain) -> tuple[Message, ...]:
    """Return the messages of a conversation to train on: it ends with a reply, and some reply has a weight other than 0."""
    messages = _conversation(value, "messages", complain)
    check_trains(messages, complain)
    return messages


def check_trains(messages: Sequence[Message], complain: Complain) -> None:
    """Complain of a conversation that trains nothing, or goes on after its last reply; of an empty one others complain."""
    replies = [message for message in messages if message["role"] == "assistant"]
    if not messages:
        return
    if not replies:
        complain("messages hold no assistant message: there is nothing to train")
    elif messages[-1]["role"] != "assistant":
        text = f"the last message must be the assistant's, it has the role {messages[-1]['role']}"
        complain(f"{text}: what follows a reply trains nothing", "06-last-message")
    elif all(message.get("weight") == 0 for message in replies):
        complain("every assistant message has weight 0: there is nothing to train")


def check_prompt_messages(value: Any, at: str, complain: Complain) -> tuple[Message, ...]:
    """Return the messages before a preferred reply: they end with the turn that is replied to, and carry no weights."""
    messages = _conversation(value, at, complain)
    if messages and messages[-1]["role"] == "assistant":
        complain(f"{at} must end before the reply, with a user or tool message; its last message is the assistant's")
    if any("weight" in message for message in messages):
        complain(f"{at} has a weight: of a preference only the two replies are trained; remove it")
    return messages


def check_chat_messages(value: Any, at: str, complain: Complain) -> tuple[Message, ...]:
    """Return the messages of a conversation that a new one of the assistant's goes on with, whoever spoke last."""
    messages = _conversation(value, at, complain)
    if messages and messages[-1].get("tool_calls"):
        complain(f"{at} must end with tool messages that answer the calls of the last one, or leave these calls out")
    if any("weight" in message for message in messages):
        complain(f"{at} has a weight: nothing is trained here; remove it")
    return messages


def check_asked_messages(value: Any, at: str, complain: Complain) -> tuple[tuple[Message, ...], Message | None]:
    """Return the messages that a reply is to be written to, and the reply that a row made for training holds already (or None)."""
    messages = _conversation(value, at, complain)
    reply = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    asked = messages if reply is None else messages[:-1]
    if messages and not any(message["role"] in ("user", "tool") for message in asked):
        complain(f"{at} hold no user message: nothing is asked")
    return asked, reply


def check_reply(value: Any, at: str, complain: Complain) -> str | None:
    """Return the text of one side of a preference: a string, or a list of one assistant message."""
    if isinstance(value, str):
        return value
    items = as_list(value)
    if items is None:
        complain(f"{at} must be a string or a list of one assistant message, got {type_name(value)}")
        return None
    given = as_object(items[0]) if len(items) == 1 else None
    if given is None:
        complain(f"{at} must hold exactly one assistant message, got {len(items)} items")
        return None
    if given.get("role") != "assistant":
        complain(f"{at}[0].role must be 'assistant'")
        return None
    return _reply_text(given, f"{at}[0]", complain)


def check_tools(value: Any, complain: Complain, at: str = "tools") -> tuple[dict[str, Any], ...] | None:
    """Return the function schemas that a conversation may call; None where there are none."""
    if value is None:
        return None
    tools = as_list(value)
    if tools is None:
        complain(f"{at} must be a list of function schemas, got {type_name(value)}")
        return None
    for number, tool in enumerate(tools):
        _check_tool(tool, f"{at}[{number}]", complain)
    return tuple(tools) or None


def _check_tool(value: Any, at: str, complain: Complain) -> None:
    function = _function_of(value, ("type", "function"), at, complain)
    if function is None:
        return
    check_keys(function, ("name", "description", "parameters", "strict"), f"{at}.function.", complain)
    parameters = function.get("parameters", {})
    if not isinstance(parameters, dict):
        complain(f"{at}.function.parameters must be an object (a JSON schema), got {type_name(parameters)}")


def _function_of(value: Any, keys: Sequence[str], at: str, complain: Complain) -> dict[str, Any] | None:
    """Return the `function` object of a tool or a tool call, having checked what both have in common."""
    outer = as_object(value)
    if outer is None:
        complain(f"{at} must be an object, got {type_name(value)}")
        return None
    check_keys(outer, keys, f"{at}.", complain)
    if outer.get("type") != "function":
        complain(f"{at}.type must be 'function'")
    function = as_object(outer.get("function"))
    if function is None:
        complain(f"{at}.function must be an object, got {type_name(outer.get('function'))}")
    elif not isinstance(function.get("name"), str) or not function["name"]:
        complain(f"{at}.function.name must be a string that is not empty")
    return function


def _reply_text(given: Message, at: str, complain: Complain) -> str | None:
    message = _without_nulls(given, at, complain)
    check_keys(message, ("role", "content"), f"{at}.", complain)
    if "content" not in message:
        complain(f"{at}.content is missing or null; a reply is a string")
        return None
    return _content(message["content"], f"{at}.content", complain)


def _conversation(value: Any, at: str, complain: Complain) -> tuple[Message, ...]:
    items = as_list(value)
    if items is None:
        complain(f"{at} must be a list, got {type_name(value)}")
        return ()
    if not items:
        complain(f"{at} is empty")
    messages = [_message(item, f"{at}[{number}]", complain) for number, item in enumerate(items)]
    good = [message for message in messages if message is not None]
    _check_tool_answers(good, at, complain)
    # A conversation with a message left out is no conversation: the rules about its end would complain of what is not so.
    return tuple(good) if len(good) == len(messages) else ()


def _message(value: Any, at: str, complain: Complain) -> Message | None:
    """Return one message without its null keys and with its content as a string; None where it cannot be used at all."""
    given = as_object(value)
    if given is None:
        complain(f"{at} must be an object, got {type_name(value)}")
        return None
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        _complain_of_role(role, at, complain)
        return None
    message = _without_nulls(given, at, complain)
    _check_message_keys(message, role, at, complain)
    if "name" in message and not isinstance(message["name"], str):
        complain(f"{at}.name must be a string, got {type_name(message['name'])}")
    if role == "assistant":
        _check_assistant(message, at, complain)
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        complain(f"{at}.tool_call_id is missing: a tool message names the call it answers")
    if "content" in message:
        message["content"] = _content(message["content"], f"{at}.content", complain)
    elif "tool_calls" in message and role == "assistant":
        message["content"] = None  # the key is there in every message: templates read it
    else:
        what = "null (allowed with tool_calls only)" if "content" in given else "missing"
        complain(f"{at}.content is {what}; it must be a string or a list of text parts")
    return message


def _complain_of_role(role: Any, at: str, complain: Complain) -> None:
    allowed = ", ".join(ROLES)
    if role == "function":
        complain(f"{at}.role 'function' is the old form of 'tool': use the role tool with a tool_call_id")
    elif isinstance(role, str):
        near = nearest(role, ROLES)
        complain(f"{at}.role is not one of {allowed}" + (f"; did you mean {near!r}?" if near else ""), "05-wrong-role")
    else:
        complain(f"{at}.role must be one of {allowed}, got {'nothing' if role is None else type_name(role)}")


def _without_nulls(given: Message, at: str, complain: Complain) -> Message:
    """Return the message without the known keys that hold null, complaining of those that may hold nothing else."""
    message = {key: item for key, item in given.items() if item is not None or key not in _MAY_BE_NULL}
    for key in [key for key in message if key in _NULL_ONLY]:
        if message.pop(key) != []:  # annotations: [] says nothing either
            complain(f"{at}.{key} cannot be trained: {_NULL_ONLY[key]}")
    return message


def _check_message_keys(message: Message, role: str, at: str, complain: Complain) -> None:
    allowed = _KEYS.get(role, _OTHER_KEYS)
    for key in ("weight", "tool_calls", "tool_call_id"):
        if key in message and key not in allowed:
            complain(f"{at}.{key} is not allowed on messages of the role {role}")
    check_keys([key for key in message if key not in _ALL_KEYS], allowed, f"{at}.", complain)


def _check_assistant(message: Message, at: str, complain: Complain) -> None:
    if "weight" in message:
        check_weight(message["weight"], at, complain)
    if "tool_calls" not in message:
        return
    calls = as_list(message["tool_calls"])
    if not calls:
        complain(f"{at}.tool_calls must be a list that is not empty")
        return
    for number, call in enumerate(calls):
        _check_call(call, f"{at}.tool_calls[{number}]", complain)


def check_weight(weight: Any, at: str, complain: Complain) -> None:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
        complain(f"{at}.weight must be 0 (context only) or 1 (trained)")


def _check_call(value: Any, at: str, complain: Complain) -> None:
    function = _function_of(value, ("id", "type", "function"), at, complain)
    if function is None:
        return
    if not isinstance(value.get("id"), str) or not value["id"]:
        complain(f"{at}.id must be a string that is not empty")
    check_keys(function, ("name", "arguments"), f"{at}.function.", complain)
    _check_arguments(function.get("arguments"), f"{at}.function.arguments", complain)


def _check_arguments(value: Any, at: str, complain: Complain) -> None:
    if isinstance(value, str):
        try:
            value = parse_value(value)
        except LineProblem as problem:
            complain(f"{at} must spell a JSON object: {problem}")
            return
    if not isinstance(value, dict):
        complain(f"{at} must be an object, or a string that spells one; got {type_name(value)}")


def _check_tool_answers(messages: list[Message], at: str, complain: Complain) -> None:
    """Complain of a tool message that answers no earlier call, and of a call id used twice."""
    asked: set[str] = set()
    for message in messages:
        calls = as_list(message.get("tool_calls")) or []
        for identity in [call.get("id") for call in map(as_object, calls) if call is not None]:
            if isinstance(identity, str):
                if identity in asked:
                    complain(f"{at} give one tool call id twice")
                asked.add(identity)
        answered = message.get("tool_call_id")
        if isinstance(answered, str) and answered not in asked:
            complain(f"{at} hold a tool message whose tool_call_id is of no earlier tool call")


def _content(value: Any, at: str, complain: Complain) -> str:
    if isinstance(value, str):
        return value
    parts = as_list(value)
    if parts is None:
        complain(f"{at} must be a string or a list of text parts, got {type_name(value)}")
        return ""
    return "".join(_part(part, f"{at}[{number}]", complain) for number, part in enumerate(parts))


def _part(value: Any, at: str, complain: Complain) -> str:
    allowed = 'only {"type": "text", "text": "..."} parts are allowed'
    part = as_object(value)
    if part is None:
        complain(f"{at} must be an object, got {type_name(value)}; {allowed}")
        return ""
    kind = part.get("type")
    if kind != "text":
        name = _MEDIA.get(kind) if isinstance(kind, str) else None
        complain(f"{at} is {name or 'a part of another type'}, which cannot be trained; {allowed}")
        return ""
    check_keys(part, ("type", "text"), f"{at}.", complain)
    text = part.get("text")
    if not isinstance(text, str):
        complain(f"{at}.text must be a string, got {type_name(text)}")
        return ""
    return text
