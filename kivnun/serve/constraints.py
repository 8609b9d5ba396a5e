"""Answers held to a form: what a request asks for becomes a grammar, or a refusal with the reason, before anything is queued.

llguidance turns a JSON schema into which tokens may come next; regular expressions in it are matched in linear time. What a schema
may cost is capped there in states and steps, and here where that does not reach: size, depth, the length of a text (the rest of one
is gone over at every token) and `multipleOf`, which takes a state for each remainder, made before any limit is looked at.
Loads no model. Next: `masks.py` (the grammar at work).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from kivnun.data.jsonl import as_object
from kivnun.serve.parameters import bad, shown

MAX_SCHEMA_BYTES = 64 << 10
MAX_SCHEMA_DEPTH = 24
MAX_SCHEMA_NODES = 4000
MAX_SCHEMA_TEXT = 8192  # letters of one key, pattern, constant or description
MAX_MULTIPLE = 25_000  # the least common one of all `multipleOf`, their decimal points left out
MAX_CALLS = 8
_OPEN = frozenset(("additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref", "if"))
# Room to lay a document out, and none to fill an answer with blanks.
WRITING: dict[str, Any] = {"whitespace_pattern": r"[\x20\x0A]{0,16}"}
# As training writes calls.
CALLING: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def parser_limits() -> LLParserLimits:
    """Return what a grammar may cost when it is read and at each token."""
    return LLParserLimits(
        initial_lexer_fuel=500_000, step_lexer_fuel=200_000, step_max_items=20_000, max_lexer_states=20_000,
        max_grammar_size=50_000, verbose_errors=False,
    )  # fmt: skip


def grammar_of_format(given: Any) -> str | None:
    """Return the grammar of a `response_format`; None for plain text. Raises Refusal."""
    name = "response_format"
    form = as_object(given)
    kind = None if form is None else form.get("type")
    if form is None or kind not in ("text", "json_object", "json_schema"):
        raise bad(name, f"response_format.type must be text, json_object or json_schema, got {shown(kind)}")
    if kind == "text":
        return None
    if kind == "json_object":
        return schema_grammar({"type": "object"}, name)
    wrapped = as_object(form.get("json_schema"))
    if wrapped is None or not isinstance(wrapped.get("name"), str):
        raise bad(name, "response_format.json_schema must be an object with name and schema")
    schema = wrapped.get("schema", {"type": "object"})
    return schema_grammar(schema, f"{name}.json_schema.schema")


def schema_grammar(schema: Any, param: str) -> str:
    """Return the grammar of a JSON schema. Raises Refusal with the reason for one that cannot be kept, or is too large."""
    tree = as_object(schema)
    if tree is None:
        raise bad(param, f"{param} must be a JSON schema, an object, got {shown(schema)}", "invalid_json_schema")
    _refuse_costly(tree, param)
    try:
        grammar = LLMatcher.grammar_from_json_schema(tree, overrides=WRITING)  # type: ignore[arg-type]
    except ValueError:  # a whole number beyond 64 bits: nothing else of JSON
        raise bad(param, f"{param} holds a whole number beyond 64 bits: use a smaller one", "invalid_json_schema") from None
    return checked_grammar(grammar, param)


def checked_grammar(grammar: str, param: str) -> str:
    """Return a grammar that the library takes. Raises Refusal with its reason."""
    reason = LLMatcher.validate_grammar(grammar, limits=parser_limits())
    if reason and not reason.startswith("WARNING"):
        raise bad(param, f"{param} cannot be kept to: {' '.join(reason.split())[:300]}", "invalid_json_schema")
    return grammar


def call_grammar(tools: Sequence[Mapping[str, Any]], marks: tuple[str, str] | None, special: bool, *, many: bool) -> str:
    """Return the grammar of calls: a list of `{"name", "arguments"}`, of one call or of several, each as its function's schema
    says, between marks where there are any (`special`: tokens of their own). Raises Refusal."""
    param = "tools"
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["function"]["name"]}, "arguments": {"$ref": f"#/$defs/{number}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for number, tool in enumerate(tools)
    ]
    schema = {
        "x-guidance": CALLING,
        "$defs": {str(number): _parameters_of(tool, f"#/$defs/{number}") for number, tool in enumerate(tools)},
        "type": "array",
        "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
        "minItems": 1,
        "maxItems": MAX_CALLS if many else 1,
    }
    _refuse_costly(schema, param)
    opening, closing = ("", "") if marks is None else marks if special else (f'"{marks[0]}"', f'"{marks[1]}"')
    lark = f"start: {opening} calls {closing}\ncalls: %json {json.dumps(schema)}\n"
    return checked_grammar(LLMatcher.grammar_from_lark(lark), param)


def _parameters_of(tool: Mapping[str, Any], place: str) -> Any:
    """Return a function's schema as a part of another one: what it says of itself (`#/...`) is at `place` then."""
    given = as_object(tool["function"].get("parameters")) or {}
    _refuse_costly(given, "tools")
    return _moved({"type": "object", **given}, place)


def _moved(value: Any, place: str) -> Any:
    """Return a part of a schema at its new place. Objects that do not say so take no other properties than they list: a schema
    that allows any would let a weak model write for ever."""
    if isinstance(value, Mapping):
        moved = {
            key: place + item[1:] if key == "$ref" and isinstance(item, str) and item.startswith("#") else _moved(item, place)
            for key, item in value.items()
        }
        closed = isinstance(value.get("properties"), Mapping) and value.get("type") == "object" and not _OPEN.intersection(value)
        return {**moved, "additionalProperties": False} if closed else moved
    return [_moved(item, place) for item in value] if isinstance(value, list) else value


def _refuse_costly(schema: Mapping[str, Any], param: str) -> None:
    """Refuse what would cost too much, before anything goes through it by recursion. Raises Refusal, which names the limit."""
    multiple = 1
    for node in _nodes(schema, param):
        texts = [node] if isinstance(node, str) else node if isinstance(node, Mapping) else ()
        if any(len(text) > MAX_SCHEMA_TEXT for text in texts):
            raise bad(param, f"{param} holds a text of more than {MAX_SCHEMA_TEXT:,} letters: shorten it", "invalid_json_schema")
        if isinstance(node, Mapping) and "multipleOf" in node:
            multiple = math.lcm(multiple, _digits(node["multipleOf"]))
        if multiple > MAX_MULTIPLE:
            said = f"the least common multiple of all multipleOf, decimal points left out, must be at most {MAX_MULTIPLE:,}"
            hint = "use smaller ones, or check these numbers yourself"
            raise bad(param, f"{param}: {said}, got {shown(multiple)}; {hint}", "invalid_json_schema")
    if len(json.dumps(schema)) > MAX_SCHEMA_BYTES:
        raise bad(param, f"{param} is longer than {MAX_SCHEMA_BYTES} bytes", "invalid_json_schema")


def _nodes(schema: Mapping[str, Any], param: str) -> Iterator[Any]:
    """Yield every value of a schema, without recursion: depth is what is being measured. Raises Refusal."""
    nodes, level = 0, [schema]
    for depth in range(MAX_SCHEMA_DEPTH + 1):
        if not level:
            break
        nodes += len(level)
        children: list[Any] = []
        for node in level:
            children += node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
        if nodes > MAX_SCHEMA_NODES or (children and depth == MAX_SCHEMA_DEPTH):
            most = f"{MAX_SCHEMA_NODES} values, {MAX_SCHEMA_DEPTH} levels deep"
            raise bad(param, f"{param} is too large: at most {most}", "invalid_json_schema")
        yield from level
        level = children


def _digits(multiple: Any) -> int:
    """Return a `multipleOf` as a whole number of its last digit; 1 for what is none, which the library refuses."""
    if isinstance(multiple, bool) or not isinstance(multiple, int | float) or not math.isfinite(multiple) or not multiple:
        return 1
    exact = Decimal(repr(multiple)).as_tuple()
    return int("".join(map(str, exact.digits))) * 10 ** max(int(exact.exponent), 0)
