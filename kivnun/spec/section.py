"""What every part of a spec is made of: a frozen model, a reason for each default, and paths that know their folder.

An option is declared once, with its type, range, default, description and `Why`; the messages, `docs/reference/spec.md`, the JSON
Schema and the comments of `resolved.yaml` are all read from that declaration. Next: `tune.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, StringConstraints, ValidationInfo, WithJsonSchema
from pydantic_core import PydanticCustomError

FOLDER = "folder"
"""Key of the validation context: the folder that relative paths start from."""


class Section(BaseModel, frozen=True):
    """A group of options. Values are never coerced: no text read as a number, no true read as 1, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=False, protected_namespaces=())


@dataclass(frozen=True, slots=True)
class Why:
    """The reason for an option's default: annotation metadata, shown wherever the default is."""

    reason: str


@dataclass(frozen=True, slots=True)
class Allowed:
    """What an option takes, in words, where its type and range do not say it well: annotation metadata."""

    text: str


def broken_rule(text: str, hint: str | None = None) -> PydanticCustomError:
    """Return the error for a rule between fields; `text` continues a sentence that starts with the option's path."""
    return PydanticCustomError("rule", "{text}", {"text": text, "hint": hint})


def wrong_value(hint: str | None = None, page: str | None = None) -> PydanticCustomError:
    """Return the error for a value outside what the option allows; the message is made from the option's declaration. `page` is the
    page of docs/mistakes about it, where that is not the one about wrong values."""
    return PydanticCustomError("wrong_value", "wrong value", {"hint": hint, "page": page})


def as_mapping(value: object) -> dict[str, object] | None:
    """Return `value` as a new dict with text keys, or None where it is not a mapping."""
    if not isinstance(value, Mapping):
        return None
    items = cast("Mapping[object, object]", value)
    return {str(key): item for key, item in items.items()}


def as_list(value: object) -> list[object] | None:
    """Return the items of a list or tuple, or None where `value` is neither."""
    return list(cast("list[object] | tuple[object, ...]", value)) if isinstance(value, list | tuple) else None


def kind_chooser(default: str | None) -> Callable[[object], str | None]:
    """Return the function that tells pydantic which member of a tagged union a value is; a mapping without `kind` is `default`."""

    def kind_of(value: object) -> str | None:
        if isinstance(value, Section):
            found = cast("object", getattr(value, "kind", None))
        else:
            mapping = as_mapping(value)
            found = None if mapping is None else mapping.get("kind", default)
        return found if isinstance(found, str) else None

    return kind_of


def spec_folder(info: ValidationInfo) -> Path | None:
    """Return the folder of the spec being read, or None when it is built in Python."""
    context = cast("object", info.context)
    folder = None if context is None else (as_mapping(context) or {}).get(FOLDER)
    return folder if isinstance(folder, Path) else None


def absolute(path: str, folder: Path) -> Path:
    """Return `path` made absolute from `folder`, with `~` expanded and `..` folded, links left as they are."""
    return Path(os.path.normpath(folder.absolute() / Path(path).expanduser()))


def path_from(value: object, info: ValidationInfo) -> object:
    """Return text as a path, made absolute when the spec has a folder."""
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise wrong_value("an empty path names no file")
    folder = spec_folder(info)
    try:
        return Path(value) if folder is None else absolute(value, folder)
    except RuntimeError:
        raise wrong_value("the home folder that `~` stands for is unknown") from None


def tuple_from_list(value: object) -> object:
    """Return a list as a tuple: YAML has lists, a frozen spec holds tuples."""
    items = as_list(value)
    return value if items is None else tuple(items)


SpecPath = Annotated[Path, BeforeValidator(path_from), Allowed("a path"), WithJsonSchema({"type": "string", "minLength": 1})]
Name = Annotated[str, StringConstraints(min_length=1), Allowed("a name")]
Precision = Literal["auto", "fp32", "bf16"]
