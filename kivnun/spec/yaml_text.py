"""The YAML that specs are written in: YAML 1.2's scalars, no tags, no anchors, no key twice, and the line of every value.

PyYAML's own loader follows YAML 1.1, in which `1e-3` is text, `no` is false and `0o17` is text; here its parser gives the events
and this file gives them their meaning. What is written here is read back as the same values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import yaml
from yaml.events import (
    AliasEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

MAX_DEPTH = 32
WHOLE = re.compile(r"[-+]?[0-9]+", re.ASCII)
OCTAL = re.compile(r"0o[0-7]+", re.ASCII)
HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+", re.ASCII)
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", re.ASCII)
SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)", re.ASCII)
PLAIN_TEXT = re.compile(r"[A-Za-z0-9_./~][A-Za-z0-9_./\-]*", re.ASCII)
WORDS: Mapping[str, bool | None] = {"": None, "~": None} | {
    form: value
    for word, value in (("null", None), ("true", True), ("false", False))
    for form in (word, word.capitalize(), word.upper())
}

Location = tuple[str | int, ...]


class YamlError(ValueError):
    """Text that is not YAML, or uses a part of YAML that specs do without. Holds the line, counted from 1 (0: unknown)."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.line = line


@dataclass
class Document:
    """A value and the line, counted from 1, on which each part of it begins."""

    value: object = None
    lines: dict[Location, int] = field(default_factory=dict[Location, int])


def read_scalar(text: str) -> object:
    """Return the value of a scalar without quotes: null, true, false, a number, or else the text itself (YAML 1.2, 10.3)."""
    if text in WORDS:
        return WORDS[text]
    if WHOLE.fullmatch(text):
        return _whole(text, 10)
    if OCTAL.fullmatch(text):
        return _whole(text[2:], 8)
    if HEXADECIMAL.fullmatch(text):
        return _whole(text[2:], 16)
    if NUMBER.fullmatch(text):
        return float(text)
    special = SPECIAL.fullmatch(text)
    if special is not None:
        return float("nan") if special.group(3) else float(special.group(1) + "inf")
    return text


def _whole(digits: str, base: int) -> int:
    if len(digits) > 400:
        raise YamlError(f"a number of {len(digits)} digits is too long")
    return int(digits, base)


def read_yaml(text: str) -> Document:
    """Return the one value that `text` holds, and where each part of it stands. Raises YamlError."""
    document = Document()
    events = _events(text)
    next(events)  # StreamStartEvent
    first = next(events)
    if isinstance(first, StreamEndEvent):
        return document
    document.value = _node(next(events), events, (), document.lines)
    next(events)  # DocumentEndEvent
    after = next(events)
    if not isinstance(after, StreamEndEvent):
        raise YamlError("more than one document in the file", _line(after))
    return document


def _events(text: str) -> Iterator[Event]:
    """Yield the parser's events; its error messages become ours, with the line they speak of."""
    try:
        yield from cast("Iterator[Event]", yaml.parse(text, Loader=yaml.SafeLoader))  # pyright: ignore[reportUnknownMemberType]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 0 if mark is None else mark.line + 1
        raise YamlError(f"not YAML: {error.problem or error.context or 'it cannot be parsed'}", line) from None
    except yaml.reader.ReaderError as error:
        raise YamlError(f"holds the character {error.character!r}, which YAML does not allow") from None


def _line(event: Event) -> int:
    return event.start_mark.line + 1


def _node(event: Event, events: Iterator[Event], at: Location, lines: dict[Location, int]) -> object:
    """Return the value that begins with `event`, taking its events."""
    lines[at] = _line(event)
    if len(at) > MAX_DEPTH:
        raise YamlError(f"nested deeper than {MAX_DEPTH} levels", _line(event))
    if isinstance(event, AliasEvent) or (isinstance(event, NodeEvent) and event.anchor is not None):
        raise YamlError("anchors (&) and aliases (*) are not used in specs; write the value out", _line(event))
    if isinstance(event, ScalarEvent):
        return _scalar(event)
    assert isinstance(event, SequenceStartEvent | MappingStartEvent)
    _refuse_tag(event.tag, event)
    if isinstance(event, SequenceStartEvent):
        return _sequence(events, at, lines)
    return _mapping(events, at, lines)


def _scalar(event: ScalarEvent) -> object:
    _refuse_tag(event.tag, event)
    text = str(event.value)
    try:
        value = read_scalar(text) if event.implicit[0] else text
    except YamlError as error:
        raise YamlError(error.message, _line(event)) from None
    if isinstance(value, str):
        fault = text_fault(value)
        if fault is not None:
            raise YamlError(f"text with {fault}", _line(event))
    return value


def _refuse_tag(tag: object, event: Event) -> None:
    if tag is not None:
        raise YamlError(f"tags such as {tag} are not used in specs; write the plain value", _line(event))


def _sequence(events: Iterator[Event], at: Location, lines: dict[Location, int]) -> list[object]:
    items: list[object] = []
    while not isinstance(event := next(events), SequenceEndEvent):
        items.append(_node(event, events, (*at, len(items)), lines))
    return items


def _mapping(events: Iterator[Event], at: Location, lines: dict[Location, int]) -> dict[str, object]:
    """Return a mapping. Keys are text as written: what YAML 1.1 reads as `true` or a number is an unknown key like any."""
    items: dict[str, object] = {}
    while not isinstance(event := next(events), MappingEndEvent):
        if not isinstance(event, ScalarEvent) or event.tag is not None or event.anchor is not None:
            raise YamlError("a key must be a plain word", _line(event))
        key = str(event.value)
        where = (*at, key)
        if key in items:
            raise YamlError(f"the key {'.'.join(map(str, where))} is given twice, first on line {lines[where]}", _line(event))
        line = _line(event)
        items[key] = _node(next(events), events, where, lines)
        lines[where] = line
    return items


def text_fault(text: str) -> str | None:
    """Return what makes `text` unusable as a path or name, or None."""
    if "\0" in text:
        return "a NUL character"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "half of a surrogate pair"
    return None


def read_json(text: str) -> Document:
    """Return the JSON value that `text` holds, keys given twice and NaN refused. Raises YamlError; lines are not known."""

    def mapping(pairs: list[tuple[str, object]]) -> dict[str, object]:
        items = dict(pairs)
        if len(items) < len(pairs):
            twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
            raise YamlError(f"the key {twice} is given twice")
        for value in (*items, *items.values()):
            if isinstance(value, str) and text_fault(value) is not None:
                raise YamlError(f"text with {text_fault(value)}")
        return items

    def constant(name: str) -> object:
        raise YamlError(f"{name} is not a number that JSON has")

    try:
        value = cast(
            "object",
            json.loads(text, object_pairs_hook=mapping, parse_constant=constant, parse_int=lambda digits: _whole(digits, 10)),
        )
    except json.JSONDecodeError as error:
        raise YamlError(f"not JSON: {error.msg.lower()}", error.lineno) from None
    except RecursionError:
        raise YamlError("nested too deeply") from None
    return Document(value)


def write_scalar(value: object) -> str:
    """Return a scalar or a list of scalars as YAML on one line, such that `read_yaml` gives it back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return value if PLAIN_TEXT.fullmatch(value) and isinstance(read_scalar(value), str) else _quoted(value)
    if isinstance(value, list):
        return "[" + ", ".join(write_scalar(item) for item in cast("list[object]", value)) + "]"
    if isinstance(value, Mapping):
        items = cast("Mapping[str, object]", value)
        return "{" + ", ".join(f"{key}: {write_scalar(item)}" for key, item in items.items()) + "}"
    raise TypeError(f"cannot write {type(value).__name__} as YAML")


def _quoted(text: str) -> str:
    """Return text in double quotes, with what YAML does not print as escapes."""
    plain = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(plain.get(char) or (char if char.isprintable() else _escape(char)) for char in text) + '"'


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def write_yaml(tree: Mapping[str, object], comments: Mapping[str, str] | None = None) -> str:
    """Return nested mappings as YAML blocks; `comments` maps dotted paths to what is written after the value."""
    return "\n".join(_block(tree, "", comments or {})) + "\n"


def _block(tree: Mapping[str, object], prefix: str, comments: Mapping[str, str]) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for key, value in tree.items():
        path = prefix + key
        note = f"  # {' '.join(comments[path].split())}" if path in comments else ""
        if isinstance(value, Mapping):
            yield f"{indent}{key}:{note}"
            yield from _block(cast("Mapping[str, object]", value), path + ".", comments)
        else:
            yield f"{indent}{key}: {write_scalar(value)}{note}"
