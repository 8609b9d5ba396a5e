"""The JSON Schema of a spec, for editors: completion, descriptions and reasons while a spec is written."""

from __future__ import annotations

from typing import cast

from kivnun.spec.catalogue import DEFAULT_KINDS, Model, default_text, fields_of, kind_of, models_in, why_of
from kivnun.spec.section import as_mapping
from kivnun.spec.tune import TuneSpec

Schema = dict[str, object]


def json_schema() -> Schema:
    """Return the JSON Schema (draft 2020-12) of what a spec file may hold."""
    schema = cast("Schema", TuneSpec.model_json_schema(mode="validation"))
    definitions = cast("dict[str, Schema]", schema["$defs"])
    for model in _models(TuneSpec):
        own = schema if model is TuneSpec else definitions[model.__name__]
        _describe(own, model)
    definitions["BaseSpec"] = _with_shorthand(definitions["BaseSpec"], "model", "Shorthand for {model: ...}.")
    definitions["SourceSpec"] = _with_shorthand(definitions["SourceSpec"], "path", "Shorthand for {path: ...}.")
    train = cast("dict[str, Schema]", as_mapping(definitions["DataSpec"]["properties"]))["train"]
    many = {key: train.pop(key) for key in ("type", "items") if key in train} | {"minItems": 1}
    train["anyOf"] = [{"type": "string", "minLength": 1}, {"$ref": "#/$defs/SourceSpec"}, many]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _models(model: Model) -> list[Model]:
    """Return a model and all those below it, each once."""
    found: dict[Model, None] = {model: None}
    for field in fields_of(model).values():
        for inner in models_in(field.annotation):
            found |= dict.fromkeys(_models(inner))
    return list(found)


def _describe(schema: Schema, model: Model) -> None:
    """Add the reason of each default to its description, and require `kind` wherever it has no default in its union."""
    properties = cast("dict[str, Schema]", schema["properties"])
    for name, field in fields_of(model).items():
        reason = why_of(field)
        if field.description is not None:
            default = f" Default {default_text(field)}: {reason}." if reason and not models_in(field.annotation) else ""
            properties[name]["description"] = field.description + default
    kind = kind_of(model)
    if kind is not None and kind not in DEFAULT_KINDS:
        schema["required"] = ["kind", *cast("list[str]", schema.get("required", []))]


def _with_shorthand(schema: Schema, field: str, description: str) -> Schema:
    """Return the schema of a section that may also be written as the text of one of its fields."""
    assert field in cast("Schema", schema["properties"])
    return {"title": schema["title"], "anyOf": [{"type": "string", "minLength": 1, "description": description}, schema]}
