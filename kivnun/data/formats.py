"""From the objects on a file's lines to checked records, in four shapes: messages, prompt_completion, text, preference.

A row is a record or it has problems; there is no third way. A key that would have no effect is refused, because a file's author
meant something by it. The two changes made to what the file says are loss-free and written here: keys of a message that hold
null are left out, and a list of text parts becomes the one string it spells. Next: `chat_shape.py` (the rules of one
conversation), `checks.py` (the report), `loader.py` (records to token rows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kivnun.data.chat_shape import Complain, check_keys, check_messages, check_prompt_messages, check_reply, check_tools, nearest
from kivnun.data.jsonl import LineProblem, as_list, as_object, key_name, read_objects, type_name
from kivnun.data.rows import ChatRecord, PreferenceRecord, PromptRecord, Record, TextRecord, Where
from kivnun.errors import DataError, RowProblem, SpecError

FORMATS = ("messages", "prompt_completion", "text", "preference")
UNKNOWN = "unknown"
MAX_PROBLEMS_PER_ROW = 5

# A row that holds one of these keys is meant in that shape, whatever else it holds.
_SIGNS = (
    ("messages", ("messages",)),
    ("preference", ("chosen", "rejected", "preferred_output", "non_preferred_output")),
    ("prompt_completion", ("completion",)),
    ("text", ("text",)),
)
_KEYS = {
    "messages": ("messages", "tools"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected", "tools", "input", "preferred_output", "non_preferred_output"),
}
_ALL_KEYS = tuple(dict.fromkeys(key for keys in _KEYS.values() for key in keys))
_SHAPES = (
    '{"messages": [...]}, {"prompt": ..., "completion": ...}, {"text": ...}, {"prompt": ..., "chosen": ..., "rejected": ...} or '
    '{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}'
)


@dataclass
class _Complaints:
    """The problems of one row, in words; bounded, so that one broken row of 16 MiB does not make a million of them."""

    messages: list[tuple[str, str | None]] = field(default_factory=list[tuple[str, str | None]])
    more: int = 0

    def __call__(self, message: str, page: str | None = None) -> None:
        if len(self.messages) < MAX_PROBLEMS_PER_ROW:
            self.messages.append((message, page))
        else:
            self.more += 1

    def problems(self, where: Where) -> Iterator[RowProblem]:
        for message, page in self.messages:
            yield RowProblem(where.path, where.line, message, page)
        if self.more:
            yield RowProblem(where.path, where.line, f"and {self.more} more problems in this row")


def read_records(path: Path, format: str = "auto") -> tuple[str, list[Record], list[RowProblem]]:
    """Return the format, the good records in their order, and what is wrong with the other rows.

    Every non-blank line is a record or has at least one problem, never both. With "auto" the first good row decides the format
    and a later row of another shape is a problem; with no good row the format is that of the first row whose keys tell, else
    "unknown". Raises DataError where the file as a whole is of no use, StorageError where the system cannot read it, SpecError.
    """
    if format not in ("auto", *FORMATS):
        raise SpecError(
            f"data.format must be one of auto, {', '.join(FORMATS)}, got {format!r}", hint="auto decides by the rows' keys"
        )
    decided = None if format == "auto" else format
    guess = UNKNOWN
    records: list[Record] = []
    problems: list[RowProblem] = []
    for line, value in read_objects(path):
        where = Where(str(path), line)
        if isinstance(value, LineProblem):
            problems.append(RowProblem(where.path, line, str(value), value.page))
            continue
        complaints = _Complaints()
        shape = shape_of(value)
        record = _record(value, shape, decided, where, complaints)
        if record is not None and not complaints.messages:
            records.append(record)
            decided = shape
        else:
            problems.extend(complaints.problems(where))
        guess = shape if shape is not None and guess == UNKNOWN else guess
    if not records and not problems:
        raise DataError(f"data file {path} holds no rows", hint=f"each line is one JSON object: {_SHAPES}")
    return decided or guess, records, problems


def shape_of(row: dict[str, Any]) -> str | None:
    """Return the format that a row's keys tell, or None. Looks at keys only: the values may still be wrong."""
    return next((shape for shape, signs in _SIGNS if any(sign in row for sign in signs)), None)


def _record(row: dict[str, Any], shape: str | None, decided: str | None, where: Where, complain: Complain) -> Record | None:
    if shape is None:
        _complain_of_shape(row, decided, complain)
        return None
    if decided is not None and shape != decided:
        complain(
            f"the row's keys are those of {shape}, the file's format is {decided}; one file holds one format", "07-mixed-formats"
        )
        return None
    return _PARSERS[shape](row, where, complain)


def _complain_of_shape(row: dict[str, Any], decided: str | None, complain: Complain) -> None:
    wanted = _KEYS[decided] if decided is not None else _ALL_KEYS
    names = list(row)
    typos = [(name, near) for name in names[:100] if name not in wanted and (near := nearest(name, wanted)) is not None]
    for name, near in typos:
        complain(f"unknown key {key_name(name)}; did you mean {near!r}?")
    if not typos:
        shown = ", ".join(key_name(name) for name in names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        complain(f"the row's keys ({shown or 'none'}) fit no format; a row is {_SHAPES}")


def _chat(row: dict[str, Any], where: Where, complain: Complain) -> Record | None:
    check_keys(row, _KEYS["messages"], "", complain)
    messages = check_messages(row["messages"], complain)
    tools = check_tools(row.get("tools"), complain)
    return ChatRecord(messages, tools, where)


def _prompt(row: dict[str, Any], where: Where, complain: Complain) -> Record | None:
    check_keys(row, _KEYS["prompt_completion"], "", complain)
    prompt = _string(row, "prompt", complain)
    completion = _string(row, "completion", complain)
    if prompt == "":
        complain("prompt is empty: nothing would predict the first token; use the text format for text without a prompt")
    return PromptRecord(prompt, completion, where)


def _text(row: dict[str, Any], where: Where, complain: Complain) -> Record | None:
    check_keys(row, _KEYS["text"], "", complain)
    text = _string(row, "text", complain)
    if row["text"] == "":
        complain("text is empty: there is nothing to train")
    return TextRecord(text, where)


def _string(row: dict[str, Any], key: str, complain: Complain) -> str:
    """Return row[key], complaining unless it is a string."""
    if key not in row:
        complain(f"the key {key!r} is missing")
        return ""
    value = row[key]
    if not isinstance(value, str):
        advice = "; for conversations use the messages format" if as_list(value) is not None else ""
        complain(f"{key} must be a string, got {type_name(value)}{advice}")
        return "?"  # not empty: one complaint is enough
    return value


def _preference(row: dict[str, Any], where: Where, complain: Complain) -> Record | None:
    hosted = any(key in row for key in ("input", "preferred_output", "non_preferred_output"))
    before = "input" if hosted else "prompt"
    better, worse = ("preferred_output", "non_preferred_output") if hosted else ("chosen", "rejected")
    missing = [key for key in (before, better, worse) if key not in row]
    for key in missing:
        complain(f"the key {key!r} is missing")
    if missing:
        return None
    if hosted:
        check_keys(row, (before, better, worse), "", complain)
        prompt = _hosted_prompt(row["input"], where, complain)
    else:
        check_keys(row, ("prompt", "chosen", "rejected", "tools"), "", complain)
        prompt = _plain_prompt(row, where, complain)
    chosen = check_reply(row[better], better, complain)
    rejected = check_reply(row[worse], worse, complain)
    if chosen is None or rejected is None or prompt is None:
        return None
    if chosen == rejected:
        complain(f"{better} and {worse} are the same: the pair says nothing about which is better")
    return PreferenceRecord(prompt, chosen, rejected, where)


def _hosted_prompt(value: Any, where: Where, complain: Complain) -> ChatRecord | None:
    given = as_object(value)
    if given is None:
        complain(f"input must be an object with messages, got {type_name(value)}")
        return None
    check_keys(given, ("messages", "tools"), "input.", complain)
    if "messages" not in given:
        complain("the key 'input.messages' is missing")
        return None
    messages = check_prompt_messages(given["messages"], "input.messages", complain)
    return ChatRecord(messages, check_tools(given.get("tools"), complain, "input.tools"), where)


def _plain_prompt(row: dict[str, Any], where: Where, complain: Complain) -> ChatRecord | str | None:
    prompt = row["prompt"]
    if as_list(prompt) is not None:
        messages = check_prompt_messages(prompt, "prompt", complain)
        return ChatRecord(messages, check_tools(row.get("tools"), complain), where)
    if not isinstance(prompt, str):
        complain(f"prompt must be a string or a list of messages, got {type_name(prompt)}")
        return None
    if "tools" in row:
        complain("tools need a prompt of messages; this prompt is plain text")
    if prompt == "":
        complain("prompt is empty: nothing would predict the first token of the replies")
    return prompt


_PARSERS: dict[str, Callable[[dict[str, Any], Where, Complain], Record | None]] = {
    "messages": _chat,
    "prompt_completion": _prompt,
    "text": _text,
    "preference": _preference,
}
