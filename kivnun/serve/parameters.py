"""One parameter of a request at a time, read and checked; what is wrong is a `Refusal` that names it.

Knows neither HTTP nor a model. Next: `wire.py` (the requests of one run), `question.py` (those of the hosted service).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from kivnun.data.jsonl import LineProblem, as_list, as_object, parse_value

MAX_STOPS = 4
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's own, for /v1/completions
Endpoint = Literal["chat.completion", "text_completion"]


class Refusal(Exception):
    """An answer other than 200, in OpenAI's shape."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        return error_body(self.status, self.message, self.param, self.code)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return OpenAI's error object."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def object_in(raw: bytes) -> dict[str, Any]:
    try:
        body = as_object(parse_value(raw.decode()))
    except UnicodeDecodeError:
        raise Refusal(400, "the body is not UTF-8", code="invalid_json") from None
    except LineProblem as problem:
        raise Refusal(400, f"the body {problem}", code="invalid_json") from None
    if body is None:
        raise Refusal(400, "the body must be a JSON object", code="invalid_json")
    return {name: value for name, value in body.items() if value is not None}


def shown(value: object) -> str:
    """Return a value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"


def required(body: Mapping[str, Any], name: str) -> Any:
    if name not in body:
        raise Refusal(400, f"{name} is missing", param=name, code="missing_required_parameter")
    return body[name]


def bad(name: str, message: str, code: str = "invalid_value") -> Refusal:
    return Refusal(400, message, param=name, code=code)


def token_limits(body: Mapping[str, Any], endpoint: Endpoint, prompts: Sequence[list[int]], longest: int) -> list[int]:
    """Return the most tokens that each prompt's answers may have: what is asked for, else what the context leaves."""
    name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    if name == "max_completion_tokens" and "max_tokens" in body:
        raise bad(name, "max_tokens and max_completion_tokens say the same: give one of them")
    asked = whole(body, name, 0, 1, 2**31)
    asked = asked or (DEFAULT_COMPLETION_TOKENS if endpoint == "text_completion" else 0)
    limits: list[int] = []
    for ids in prompts:
        room = longest - len(ids)
        if room < max(asked, 1) and (room < 1 or name in body):
            raise Refusal(
                400,
                f"the context takes {longest} tokens: {len(ids)} of the prompt leave {max(room, 0)}, {max(asked, 1)} are asked for",
                param=name if name in body else "messages" if endpoint == "chat.completion" else "prompt",
                code="context_length_exceeded",
            )
        limits.append(min(asked, room) if asked else room)
    return limits


def whole(body: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = body.get(name, default)
    if name in body and (isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high):
        raise bad(name, f"{name} must be a whole number from {low} to {high}, got {shown(value)}")
    return value


def number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise bad(name, f"{name} must be a number from {low} to {high}, got {shown(value)}")
    return float(value)


def flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise bad(name, f"{name} must be true or false, got {shown(value)}")
    return value


def stops_in(body: Mapping[str, Any]) -> tuple[str, ...]:
    given = body.get("stop", [])
    stops = [given] if isinstance(given, str) else as_list(given)
    if stops is None or len(stops) > MAX_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise bad("stop", f"stop must be a string or a list of at most {MAX_STOPS} strings, none empty")
    return tuple(stops)


def include_usage_in(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    given = as_object(options)
    if not stream or given is None or set(given) - {"include_usage", "include_obfuscation"}:
        raise bad("stream_options", "stream_options takes include_usage and include_obfuscation, and with stream: true")
    return flag(given, "include_usage")
