"""The list of all options, read from the models: what messages, overrides, the reference page and the count are made from."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Union, cast, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from kivnun.spec.section import Allowed, Section, Why, as_list
from kivnun.spec.tune import TuneSpec
from kivnun.spec.yaml_text import write_scalar

Model = type[Section]

DEFAULT_KINDS = ("lora", "adamw", "local")
"""Members of tagged unions that a mapping without `kind` stands for."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option. `path` is dotted; an option of one member of a tagged union appears once per member, which `kinds` names."""

    path: str
    kind: str | None
    allowed: str
    required: bool
    default: str
    description: str
    why: str


def fields_of(model: Model) -> Mapping[str, FieldInfo]:
    return model.model_fields


def models_in(annotation: object) -> tuple[Model, ...]:
    """Return the sections that a field's type names: none for a plain option, several for a tagged union."""
    if isinstance(annotation, type):
        return (annotation,) if issubclass(annotation, Section) else ()
    return tuple(model for part in _parts(annotation) for model in models_in(part))


def kind_of(model: Model) -> str | None:
    """Return the tag of a member of a tagged union, or None for a section of its own."""
    field = fields_of(model).get("kind")
    return None if field is None else str(field.default)


def holds_many(annotation: object) -> bool:
    """Tell whether a field holds a list of sections."""
    return get_origin(_bare(annotation)) is tuple and bool(models_in(annotation))


def options(model: Model = TuneSpec, prefix: str = "", kind: str | None = None) -> Iterator[Option]:
    """Yield every option below `model` in the order of their declaration."""
    for name, field in fields_of(model).items():
        path = prefix + name
        inner = models_in(field.annotation)
        if not inner or holds_many(field.annotation):
            yield _option(path, kind, field)
        for member in inner:
            below = f"{path}.0." if holds_many(field.annotation) else f"{path}."
            yield from options(member, below, kind_of(member))


def count_options() -> int:
    """Return how many options a user has: distinct dotted paths that take a value."""
    return len({option.path for option in options()})


def _option(path: str, kind: str | None, field: FieldInfo) -> Option:
    required = field.is_required() or (path.endswith(".kind") and kind not in DEFAULT_KINDS)
    default = "" if required else default_text(field)
    return Option(path, kind, allowed_text(field), required, default, field.description or "", why_of(field))


def default_text(field: FieldInfo) -> str:
    """Return an option's default as it would be written in a spec."""
    value = cast("object", field.default)
    items = as_list(value)
    return write_scalar(value if items is None else items)


def why_of(field: FieldInfo) -> str:
    """Return the reason for the default; empty for a required option."""
    return next((item.reason for item in cast("list[object]", field.metadata) if isinstance(item, Why)), "")


def allowed_text(field: FieldInfo) -> str:
    """Return in words what a field takes, from its type and range: "a whole number from 1 to 1024, or null"."""
    return _describe(field.annotation, cast("list[object]", field.metadata))


def _describe(annotation: object, metadata: list[object]) -> str:
    for item in reversed(metadata):  # what is said nearest to the option comes last
        if isinstance(item, Allowed):
            return item.text if not _takes_null(annotation) or "null" in item.text else f"{item.text}, or null"
    if get_origin(annotation) is Annotated:
        bare, *inner = cast("tuple[object, ...]", get_args(annotation))
        return _describe(bare, [*metadata, *inner])
    if _takes_null(annotation):
        others = [part for part in _parts(annotation) if part is not types.NoneType]
        return f"{_describe(others[0], metadata)}, or null"
    if get_origin(annotation) is Literal:
        values = [write_scalar(value) for value in cast("tuple[object, ...]", get_args(annotation))]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    words = {bool: "true or false", str: "text", Path: "a path", int: "a whole number", float: "a number"}
    if isinstance(annotation, type) and annotation in words:
        return words[annotation] + _range(metadata)
    members = models_in(annotation)
    assert members, f"no words for {annotation}"
    kinds = [kind for kind in map(kind_of, members) if kind is not None]
    return f"a mapping with kind: {' or '.join(kinds)}" if kinds else f"a mapping with the keys {', '.join(fields_of(members[0]))}"


def _range(metadata: list[object]) -> str:
    """Return the range of a number in words, with a leading space, or nothing."""
    low = high = ""
    for item in metadata:
        if isinstance(item, annotated_types.Ge):
            low = f"of at least {item.ge}"
        elif isinstance(item, annotated_types.Gt):
            low = f"above {item.gt}"
        elif isinstance(item, annotated_types.Le):
            high = f"at most {item.le}"
        elif isinstance(item, annotated_types.Lt):
            high = f"below {'2^63' if item.lt == 2**63 else item.lt}"
    if low.startswith("of at least") and high.startswith("at most"):
        return f" from {low.removeprefix('of at least ')} to {high.removeprefix('at most ')}"
    text = " and ".join(part for part in (low, high) if part)
    return f" {text}" if text else ""


def _takes_null(annotation: object) -> bool:
    return types.NoneType in _parts(annotation)


def _bare(annotation: object) -> object:
    """Return a type without `Annotated` and without null."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    parts = [part for part in _parts(annotation) if part is not types.NoneType]
    return _bare(parts[0]) if len(parts) == 1 and _takes_null(annotation) else annotation


def _parts(annotation: object) -> tuple[object, ...]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return (cast("object", get_args(annotation)[0]),)
    if origin in (Union, types.UnionType, tuple):
        return tuple(part for part in cast("tuple[object, ...]", get_args(annotation)) if part is not Ellipsis)
    return ()
