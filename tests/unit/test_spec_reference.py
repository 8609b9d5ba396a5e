"""The pages and the schema made from the spec are current, and the schema accepts what the reader accepts."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kivnun.spec import json_schema, options, parse_spec, resolve
from kivnun.spec.resolve import ResolveFacts
from kivnun.spec.yaml_text import read_yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_spec", ROOT / "scripts" / "reference_spec.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(writer: ModuleType) -> None:
    assert writer.PAGE.read_text(encoding="utf-8") == writer.page(), "run `make docs`"


def test_the_schema_is_current(writer: ModuleType) -> None:
    assert writer.SCHEMA.read_text(encoding="utf-8") == writer.schema_text(), "run `make docs`"


def test_every_option_and_reason_is_on_the_page(writer: ModuleType) -> None:
    page = writer.page()
    for option in options():
        name = option.path.rpartition(".")[2]
        assert f"`kind: {option.kind}`" in page if name == "kind" else f"| `{name}`" in page
        assert option.description in page
        assert name == "kind" or option.why in page


def test_the_spec_on_the_page_works(writer: ModuleType) -> None:
    found = re.search(r"```yaml\n(.*?)```", writer.page(), re.DOTALL)
    assert found is not None
    assert parse_spec(found.group(1), folder=Path("/specs")).seed == 7


def accepts(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """A small JSON Schema checker: the keywords our schema uses, and no others."""
    known = {
        "$ref", "$defs", "$schema", "additionalProperties", "anyOf", "const", "default", "description", "enum", "exclusiveMaximum",
        "exclusiveMinimum", "items", "maximum", "minItems", "minLength", "minimum", "oneOf", "properties", "required", "title",
        "type", "uniqueItems",
    }  # fmt: skip
    assert set(schema) <= known, set(schema) - known
    if "$ref" in schema and not accepts(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root):
        return False
    if "anyOf" in schema and not any(accepts(part, value, root) for part in schema["anyOf"]):
        return False
    if "oneOf" in schema and sum(accepts(part, value, root) for part in schema["oneOf"]) != 1:
        return False
    types = {
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
        "array": list,
        "object": dict,
    }
    if "type" in schema:
        if not isinstance(value, types[schema["type"]]):
            return False
        if isinstance(value, bool) and schema["type"] != "boolean":
            return False
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        return False
    if isinstance(value, int | float) and not isinstance(value, bool):
        in_range = (
            value >= schema.get("minimum", value)
            and value <= schema.get("maximum", value)
            and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
            and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
        )
        if not in_range:
            return False
    if isinstance(value, list):
        unique = not schema.get("uniqueItems") or len({json.dumps(item) for item in value}) == len(value)
        return (
            unique
            and len(value) >= schema.get("minItems", 0)
            and all(accepts(schema["items"], item, root) for item in value if "items" in schema)
        )
    if isinstance(value, dict) and "properties" in schema:
        known_keys = schema["properties"]
        if not set(schema.get("required", [])) <= set(value) or not set(value) <= set(known_keys):
            return False
        return all(accepts(known_keys[key], item, root) for key, item in value.items())
    return True


GOOD = [
    "version: 1\nbase: kivnun/tiny-phi\ndata: {train: train.jsonl, validation: 0.2}\nadapter: {kind: lora, rank: 8}\nseed: 7",
    "version: 1\nbase: {model: a/b, revision: v1}\ndata: {train: [a, {path: b, share: 2}, {path: c, share: 1}], validation: h}",
    "version: 1\nbase: a/b\ndata: {train: {path: a}, validation: null}\nadapter: {rank: 4, target_modules: [qkv_proj]}",
    "version: 1\nbase: a/b\ndata: {train: a}\nadapter: {kind: full}\nobjective: {kind: dpo, beta: 1}",
    "version: 1\nbase: a/b\ndata: {train: a}\nschedule: {optimizer: {kind: muon}, max_grad_norm: null}\ncompute: {threads: 1}",
]
BAD = [
    "version: 2\nbase: a/b\ndata: {train: a}",
    "version: 1\nbase: a/b\ndata: {}",
    "version: 1\nbase: a/b\ndata: {train: []}",
    "version: 1\nbase: a/b\ndata: {train: a, validation: 1}",
    "version: 1\nbase: a/b\ndata: {train: a}\nadapter: {kind: full, rank: 8}",
    "version: 1\nbase: a/b\ndata: {train: a}\nadapter: {rank: 0}",
    "version: 1\nbase: a/b\ndata: {train: a}\nadapter: {rank: true}",
    "version: 1\nbase: a/b\ndata: {train: a}\nobjective: {beta: 0.1}",
    "version: 1\nbase: a/b\ndata: {train: a}\nadapter: {target_modules: q_proj}",
    "version: 1\nbase: a/b\ndata: {train: a}\nlr: 1",
    "version: 1\nbase: 3\ndata: {train: a}",
]


@pytest.mark.parametrize("text", GOOD)
def test_the_schema_accepts_what_the_reader_accepts(text: str) -> None:
    schema = json_schema()
    if "{path: b, share: 2}" in text:
        text = text.replace("[a, ", "[{path: a, share: 1}, ")
    spec = parse_spec(text, folder=Path("/specs"))
    assert accepts(schema, read_yaml(text).value, schema)
    facts = ResolveFacts(spec.objective.kind if spec.objective else "supervised", 2048, 100, 10**6, "cpu", 1)
    for whole in (spec, resolve(spec, facts)[0]):
        assert accepts(schema, json.loads(json.dumps(whole.to_tree())), schema)


@pytest.mark.parametrize("text", BAD)
def test_the_schema_refuses_what_the_reader_refuses(text: str) -> None:
    schema = json_schema()
    with pytest.raises(ValueError, match="spec"):
        parse_spec(text, folder=Path("/specs"))
    assert not accepts(schema, read_yaml(text).value, schema)


def test_the_schema_titles_and_describes_every_option() -> None:
    schema = json_schema()
    for name, definition in [("TuneSpec", schema), *schema["$defs"].items()]:  # type: ignore[union-attr]
        bodies = [part for part in definition.get("anyOf", [definition]) if "properties" in part]
        assert bodies, name
        for field, described in bodies[0]["properties"].items():
            assert described.get("description"), (name, field)
            assert described.get("title") or "$ref" in described, (name, field)
