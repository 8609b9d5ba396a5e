"""Schemas made to cost: each becomes a grammar within a bound of time and memory, or is refused with the limit that it breaks."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLTokenizer

from kivnun.errors import DataError
from kivnun.serve.base_tokens import BaseTokens
from kivnun.serve.constraints import MAX_MULTIPLE, MAX_SCHEMA_TEXT, call_grammar, schema_grammar
from kivnun.serve.masks import GrammarForm
from kivnun.serve.parameters import Refusal

LONGEST_S = 10.0  # each takes a second at most; without a bound they take minutes, or all memory
MOST_BYTES = 300 << 20
LARGE, TEXT, MULTIPLE = "at most 4000 values, 24 levels", "more than 8,192 letters", "must be at most 25,000"
LONG = "longer than 65536"
OWN = (LARGE, TEXT, MULTIPLE, LONG)  # refused by ourselves, before the library


def text(**more: Any) -> dict[str, Any]:
    return {"type": "string", **more}


def whole(**more: Any) -> dict[str, Any]:
    return {"type": "integer", **more}


def nested(depth: int) -> dict[str, Any]:
    schema = whole()
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def doubling(of: str, depth: int, last: dict[str, Any]) -> dict[str, Any]:
    """Return a schema whose parts each name the next one twice."""
    parts: dict[str, Any] = {str(at): {of: [{"$ref": f"#/$defs/{at + 1}"}] * 2} for at in range(depth)}
    return {"$ref": "#/$defs/0", "$defs": {**parts, str(depth): last}}


# A schema and what its refusal says; None where it is kept to.
HOSTILE: dict[str, tuple[dict[str, Any], str | None]] = {
    "as deep as may be": (nested(23), None),
    "too deep": (nested(24), LARGE),
    "very deep": (nested(50_000), LARGE),
    "ten thousand properties": ({"type": "object", "properties": {f"p{at}": whole() for at in range(10_000)}}, LARGE),
    "thousands of properties": ({"type": "object", "properties": {f"p{at}": True for at in range(3_000)}}, "max is 2000"),
    "a huge enum": ({"enum": list(range(100_000))}, LARGE),
    "a large enum": ({"enum": [f"value {at}" for at in range(3_000)]}, None),
    "an enum of lists": ({"enum": [{"a": {"b": [at]}} for at in range(800)]}, None),
    "long in all": ({"enum": ["a" * 8_000] * 9}, LONG),
    "a long constant": ({"const": "a" * 60_000}, TEXT),
    "a long constant within one": ({"const": {"a": ["b" * (MAX_SCHEMA_TEXT + 1)]}}, TEXT),
    "a long name": ({"type": "object", "properties": {"k" * 20_000: whole()}}, TEXT),
    "a long pattern": (text(pattern="a" * 60_000), TEXT),
    "a text as long as may be": ({"const": "a" * MAX_SCHEMA_TEXT}, None),
    "alternatives": (text(pattern="^((a|aa)+)+b$"), None),
    "repeats of repeats": (text(pattern="^(((a{1,50}){1,50}){1,50})$"), None),
    "a million letters": (text(minLength=10**6), None),
    "a billion letters": (text(minLength=10**9, maxLength=10**9), None),
    "a choice at every letter": (text(pattern="^(a|b)*a(a|b){200}$", minLength=300), "Unable to determine"),
    "optional letters": (text(pattern="^" + "(a?)" * 2_000 + "a{2000}$"), "too many expressions"),
    "brackets": (text(pattern="^" + "(" * 2_000 + "a" + ")*" * 2_000 + "$"), "regex parse error"),
    "letters anywhere": ({"allOf": [text(pattern=f".*a.{{{at}}}b.*") for at in range(5, 13)]}, "Unable to determine"),
    "named by itself": ({"$ref": "#"}, "NoExtension"),
    "named in a circle": ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "NoExtension"),
    "a tree without end": ({"type": "object", "properties": {"a": {"$ref": "#"}, "b": {"$ref": "#"}}}, None),
    "doubled forty times by allOf": (doubling("allOf", 40, whole()), None),
    "doubled forty times by anyOf": (doubling("anyOf", 40, {"anyOf": [whole(), text()]}), None),
    "choices multiplied": ({"allOf": [{"anyOf": [text(minLength=at), text(maxLength=at + 100)]} for at in range(20)]}, "too large"),
    "lists of lists": ({"type": "array", "minItems": 10**6, "items": {"type": "array", "minItems": 10**9}}, None),
    "a prime step": (whole(multipleOf=999_983), MULTIPLE),
    "a huge step": (whole(multipleOf=100_000_007), MULTIPLE),
    "a step of floats": ({"type": "number", "multipleOf": 0.99991}, MULTIPLE),
    "a step by powers": ({"type": "number", "multipleOf": 1e300}, MULTIPLE),
    "steps multiplied": ({"allOf": [whole(multipleOf=prime) for prime in (7, 11, 13, 17, 19, 23, 29)]}, MULTIPLE),
    "steps apart": ({"type": "array", "prefixItems": [whole(multipleOf=prime) for prime in (211, 223)]}, MULTIPLE),
    "a step in what is named": ({"$ref": "#/const/a", "const": {"a": whole(multipleOf=999_983)}}, MULTIPLE),
    "a step as large as may be": (whole(multipleOf=MAX_MULTIPLE), None),
    "usual steps": ({"type": "array", "prefixItems": [whole(multipleOf=by) for by in (0.01, 0.25, 5, 60, 100, 7)]}, None),
    "no step": (whole(multipleOf="7"), "multipleOf"),
    "beyond 64 bits": (whole(minimum=-(2**64)), "beyond 64 bits"),
    "the widest range": ({"type": "number", "minimum": -1e308, "maximum": 1e308}, "float range"),
}  # fmt: skip


@pytest.fixture(scope="module")
def spelling(base: Path) -> LLTokenizer:
    return BaseTokens(base).spelling


def kept(grammar: str, spelling: LLTokenizer) -> None:
    """Begin an answer of a grammar, and go on with it. Raises DataError where that costs too much."""
    form = GrammarForm.of(spelling, grammar)
    for _ in range(20):
        allowed_V = form.allowed_V(spelling.vocab_size)
        if form.take(int(allowed_V.nonzero()[0][-1])):
            return


def outcome(grammar: Callable[[], str], spelling: LLTokenizer) -> tuple[str, Refusal | None]:
    """Return why answers of a grammar are refused ("": they are not), and the refusal where that was before any answer. Fails where
    finding out takes too long, or too much."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    why, refused = "", None
    try:
        kept(grammar(), spelling)
    except Refusal as refusal:
        why, refused = refusal.message, refusal
    except DataError as error:
        why = error.message
    assert time.monotonic() - began < LONGEST_S
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MOST_BYTES
    return why, refused


@pytest.mark.parametrize(("schema", "why"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_costly_schema_is_kept_within_a_bound_or_refused_with_the_limit(
    schema: dict[str, Any], why: str | None, spelling: LLTokenizer
) -> None:
    said, refused = outcome(lambda: schema_grammar(schema, "s"), spelling)
    assert why in said if why else not said
    if why in OWN:
        assert refused is not None
    if refused is not None:
        assert (refused.status, refused.param, refused.code) == (400, "s", "invalid_json_schema")


@pytest.mark.parametrize(("schema", "why"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_costly_function_is_called_within_a_bound_or_refused_with_the_limit(
    schema: dict[str, Any], why: str | None, spelling: LLTokenizer
) -> None:
    parameters = {"type": "object", "properties": {"a": schema}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    said, refused = outcome(lambda: call_grammar(tools, None, False, many=True), spelling)
    if why in OWN:
        assert refused is not None
        assert str(why) in said or LARGE in said  # it is deeper here
    if refused is not None:
        assert (refused.status, refused.param, refused.code) == (400, "tools", "invalid_json_schema")


def test_what_is_read_lets_other_threads_go_on(spelling: LLTokenizer) -> None:
    grammar = schema_grammar({"enum": [{"a": {"b": [at]}} for at in range(800)]}, "s")
    reading = threading.Thread(target=lambda: GrammarForm.of(spelling, grammar))
    turns = 0
    reading.start()
    while reading.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 10  # 1 where Python is held
