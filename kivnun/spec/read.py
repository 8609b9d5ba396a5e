"""From a file to a spec: read, apply overrides, validate; every problem is told at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from kivnun.errors import SpecError
from kivnun.spec.catalogue import Model, fields_of, holds_many, models_in
from kivnun.spec.problems import Problem, nearest_path, problems_of, shown, spec_error
from kivnun.spec.section import FOLDER, as_list, as_mapping
from kivnun.spec.tune import TuneSpec
from kivnun.spec.yaml_text import Document, Location, YamlError, read_json, read_yaml

MAX_BYTES = 1 << 20


def load_spec(path: Path, overrides: Sequence[str] = ()) -> TuneSpec:
    """Return the spec in `path` with `overrides` ("path=value", YAML values) laid over it.

    Relative paths, in the file and in overrides, start from the file's folder. Raises SpecError with all that is wrong.
    """
    return parse_spec(read_spec_text(path), folder=path.parent, source=path.name, overrides=overrides)


def read_spec_text(path: Path) -> str:
    """Return the text of a spec file, without a byte order mark. Raises SpecError."""
    hint = "give the path of a YAML or JSON file"
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise SpecError(f"spec {path} does not exist", hint=hint) from None
    except IsADirectoryError:
        raise SpecError(f"spec {path} is a folder", hint=hint) from None
    except OSError as error:
        raise SpecError(f"spec {path} cannot be read: {error.strerror}", hint=hint) from None
    except ValueError:
        raise SpecError(f"spec {str(path)!r} is not a path", hint=hint) from None
    if len(content) > MAX_BYTES:
        raise SpecError(f"spec {path} is larger than 1 MiB", hint="a spec is a page of text; is this a data file?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(f"spec {path} is not UTF-8 (byte {error.start})", hint="save it as UTF-8") from None


def parse_spec(text: str, *, folder: Path | None, source: str = "spec", overrides: Sequence[str] = ()) -> TuneSpec:
    """Return the spec that `text` holds; see `load_spec`. `source` is what messages call it. Without a folder, relative paths stay
    as they are written: they then start from wherever the process that reads them works."""
    try:
        document = _read_document(text, source)
    except YamlError as error:
        place = f"{source}:{error.line}" if error.line else source
        raise SpecError(f"{place}: {error.message}", hint="docs/reference/spec.md begins with a spec that can be copied") from None
    tree = as_mapping(document.value)
    if tree is None:
        received = "nothing" if document.value is None else shown(document.value)
        raise SpecError(f"{source} must hold a mapping, got {received}", hint="begin with version: 1")
    problems = [problem for problem in (_apply(tree, override) for override in overrides) if problem is not None]
    # A value that came from the command line stands on no line of the file.
    lines = document.lines | {_path_of(override.partition("=")[0]): 0 for override in overrides}
    try:
        spec = validate(tree, folder)
    except ValidationError as error:
        raise spec_error(source, [*problems, *problems_of(error, lines)]) from None
    if problems:
        raise spec_error(source, problems)
    return spec


def validate(tree: Mapping[str, object], folder: Path | None = None) -> TuneSpec:
    """Return the spec of a tree of plain values. Raises pydantic's ValidationError, which `problems_of` puts in words."""
    return TuneSpec.model_validate(tree, context={FOLDER: folder} if folder is not None else None)


def _read_document(text: str, source: str) -> Document:
    """Read JSON where the text is JSON (YAML does not hold all of it: tabs, escaped surrogate pairs), else YAML."""
    if source.endswith(".json"):
        return read_json(text)
    if text.lstrip().startswith("{"):
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return read_yaml(text)
        return read_json(text)
    return read_yaml(text)


def _apply(tree: dict[str, object], override: str) -> Problem | None:
    """Lay one override over the tree; return what is wrong with it."""
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or not name:
        return Problem(name, f"--set {override} has no value", "write --set path=value, such as --set schedule.epochs=2")
    try:
        value = read_yaml(text).value
    except YamlError as error:
        return Problem(name, f"--set {name}: {error.message}", "quote what the shell or YAML would read otherwise")
    path = _path_of(name)
    problem = _unknown_override(path)
    return problem if problem is not None else _put(tree, path, value)


def _path_of(name: str) -> Location:
    return tuple(int(step) if step.isdecimal() else step for step in name.strip().split("."))


def _unknown_override(path: Location) -> Problem | None:
    """Return the problem of a path that no spec has, or None. Whether the chosen kind has the option is for validation to say."""
    models: tuple[Model, ...] = (TuneSpec,)
    listed = False
    for depth, step in enumerate(path):
        if isinstance(step, int) and listed:
            listed = False
            continue
        fields = [fields_of(model)[str(step)] for model in models if str(step) in fields_of(model)]
        if not fields:
            name = ".".join(map(str, path))
            near = nearest_path(path[: depth + 1])
            allowed = ", ".join(dict.fromkeys(key for model in models for key in fields_of(model)))
            around = ".".join(map(str, path[:depth])) or "the spec"
            has = f"{around} allows {allowed}" if models else f"{around} has no parts"
            return Problem(name, f"--set {name}: there is no such option", f"{f'did you mean {near}? ' if near else ''}{has}")
        models = tuple(model for field in fields for model in models_in(field.annotation))
        listed = holds_many(fields[0].annotation)
    return None


def _put(tree: dict[str, object], path: Location, value: object) -> Problem | None:
    """Set the value at `path`, making sections that are not there; a shorthand is written out before a part of it is set."""
    name = ".".join(map(str, path))
    here: dict[str, object] | list[object] = tree
    for depth, step in enumerate(path):
        if isinstance(here, list) and not (isinstance(step, int) and step < len(here)):
            around = ".".join(map(str, path[:depth]))
            return Problem(name, f"--set {name}: {around} has {len(here)} entries, counted from 0", f"set {around} as a whole")
        if depth == len(path) - 1:
            _set(here, step, value)
            return None
        found = _get(here, step)
        below = _opened(path[: depth + 1], found)
        if below is None:
            part = ".".join(map(str, path[: depth + 1]))
            return Problem(name, f"--set {name}: {part} is {shown(found)}, which has no parts", f"set {part} as a whole")
        _set(here, step, below)
        here = below
    return None


def _opened(path: Location, found: object) -> dict[str, object] | list[object] | None:
    """Return a section as something that can be changed, or None where it has no parts."""
    if isinstance(found, str) and path == ("base",):
        return {"model": found}
    if isinstance(found, str) and path[:2] == ("data", "train"):
        return {"path": found} if len(path) == 3 else [found]
    if found is None:
        return {}
    items = as_list(found)
    return as_mapping(found) if items is None else items


def _get(here: dict[str, object] | list[object], step: str | int) -> object:
    return here.get(str(step)) if isinstance(here, dict) else here[int(step)]


def _set(here: dict[str, object] | list[object], step: str | int, value: object) -> None:
    if isinstance(here, dict):
        here[str(step)] = value
    else:
        here[int(step)] = value
