"""Rows to be answered: a conversation or a prompt, or any row made for training, whose reply is then set apart and never shown.

A row is asked or it has problems; there is no third way, and a key that would have no effect is refused, as in `formats.py`.
Next: `kivnun/predict.py` (who answers them).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kivnun.data.chat_shape import (
    Complain,
    Message,
    Sentences,
    check_asked_messages,
    check_keys,
    check_prompt_messages,
    check_reply,
    check_tools,
)
from kivnun.data.jsonl import LineProblem, as_list, as_object, key_name, read_objects, type_name
from kivnun.data.shapes import PARALLEL, check_parallel
from kivnun.errors import DataError

SHAPES = '{"messages": [...]}, {"prompt": ...}, or a row made for training other than {"text": ...}'


@dataclass(frozen=True, slots=True)
class Asked:
    """One row. `prompt` is a conversation that ends before the reply, or plain text; `reference` the reply that the row holds."""

    line: int
    id: str | int | None
    prompt: tuple[Message, ...] | str
    tools: tuple[dict[str, Any], ...] | None
    reference: str | None


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be answered, and why: sentences that hold none of its content."""

    line: int
    id: str | int | None
    problems: tuple[str, ...]


class PromptTokenizer(Protocol):
    """What turning a row into a prompt's ids needs; `template.ChatTokenizer` is the one of real bases."""

    @property
    def has_template(self) -> bool: ...

    def encode(self, text: str) -> list[int]: ...

    def prompt_ids(self, messages: tuple[Message, ...], tools: tuple[dict[str, Any], ...] | None = None) -> list[int]: ...


def read_asked(path: Path) -> list[Asked | BadRow]:
    """Return every non-blank line of a JSONL file as what is asked or what is wrong with it, in the file's order.

    Raises DataError where the file as a whole is of no use, StorageError where the system cannot read it.
    """
    rows = [_row(line, value) for line, value in read_objects(path)]
    if not rows:
        raise DataError(f"{path} holds no rows", hint=f"each line is one JSON object: {SHAPES}")
    return rows


def prompt_ids(row: Asked, tokenizer: PromptTokenizer) -> list[int]:
    """Return what the model is given: exactly the first ids of the row that would train the reply.

    Raises DataError where the template refuses the conversation or nothing would predict the first token.
    """
    if isinstance(row.prompt, str):
        ids = tokenizer.encode(row.prompt)
    elif not tokenizer.has_template:
        raise DataError("is a conversation, but the base has no chat template", hint="ask with prompt, or give data.template")
    else:
        ids = tokenizer.prompt_ids(row.prompt, row.tools)
    if not ids:
        raise DataError("the prompt is empty: nothing would predict the first token")
    return ids


def _row(line: int, value: dict[str, Any] | LineProblem) -> Asked | BadRow:
    if isinstance(value, LineProblem):
        return BadRow(line, None, (str(value),))
    problems = Sentences()
    identity = _identity(value, problems)
    rest = {key: item for key, item in value.items() if key != "id"}
    prompt, tools, reference = _parsed(rest, problems)
    return BadRow(line, identity, tuple(problems)) if problems else Asked(line, identity, prompt, tools, reference)


def _identity(row: dict[str, Any], complain: Complain) -> str | int | None:
    given = row.get("id")
    if given is None or isinstance(given, str) or (isinstance(given, int) and not isinstance(given, bool)):
        return given
    complain(f"id must be a string or a whole number, got {type_name(given)}")
    return None


def _parsed(row: dict[str, Any], complain: Complain) -> tuple[Any, Any, str | None]:
    """Return (prompt, tools, reference) of a row; what is returned after a complaint is not used."""
    if "messages" in row:
        check_keys([key for key in row if key != PARALLEL], ("messages", "tools"), "", complain)
        check_parallel(row, "", complain)
        messages, reply = check_asked_messages(row["messages"], "messages", complain)
        return messages, check_tools(row.get("tools"), complain), None if reply is None else reply["content"]
    if "input" in row or "preferred_output" in row:
        return _hosted(row, complain)
    if "prompt" in row:
        return _prompted(row, complain)
    if "text" in row:
        complain("is running text: nothing in it is asked; give a prompt or messages")
    else:
        shown = ", ".join(key_name(key) for key in list(row)[:6])
        complain(f"the row's keys ({shown or 'none'}) ask nothing; a row is {SHAPES}")
    return "", None, None


def _prompted(row: dict[str, Any], complain: Complain) -> tuple[Any, Any, str | None]:
    pair = "chosen" in row or "rejected" in row
    check_keys(row, ("prompt", "chosen", "rejected", "tools") if pair else ("prompt", "completion", "tools"), "", complain)
    prompt, tools = row["prompt"], check_tools(row.get("tools"), complain)
    if as_list(prompt) is not None:
        prompt = check_prompt_messages(prompt, "prompt", complain)
    elif not isinstance(prompt, str):
        complain(f"prompt must be a string or a list of messages, got {type_name(prompt)}")
    elif not prompt:
        complain("prompt is empty: nothing would predict the first token")
    elif tools:
        complain("tools need a prompt of messages; this prompt is plain text")
    if pair:
        return prompt, tools, check_reply(row.get("chosen"), "chosen", complain)
    reference = row.get("completion")
    if reference is not None and not isinstance(reference, str):
        complain(f"completion must be a string, got {type_name(reference)}")
    return prompt, tools, reference if isinstance(reference, str) else None


def _hosted(row: dict[str, Any], complain: Complain) -> tuple[Any, Any, str | None]:
    """Parse a preference in OpenAI's shape."""
    check_keys(row, ("input", "preferred_output", "non_preferred_output"), "", complain)
    given = as_object(row.get("input"))
    if given is None or "messages" not in given:
        complain("input must be an object with messages")
        return (), None, None
    check_keys([key for key in given if key != PARALLEL], ("messages", "tools"), "input.", complain)
    check_parallel(given, "input.", complain)
    messages = check_prompt_messages(given["messages"], "input.messages", complain)
    tools = check_tools(given.get("tools"), complain, "input.tools")
    better = row.get("preferred_output")
    return messages, tools, None if better is None else check_reply(better, "preferred_output", complain)


def problems_of(rows: list[Asked | BadRow]) -> Iterator[tuple[int, str]]:
    """Yield (line, problem) of every bad row."""
    for row in rows:
        if isinstance(row, BadRow):
            for problem in row.problems:
                yield row.line, problem
