"""Shapes that say a task and not a conversation, and how each is asked and answered: one user turn and the reply that is trained.

instruction, prompt_response, classification, entities, multiple_choice; and ShareGPT's way to write a conversation. The wording is
that of the built-in scenarios, so that the metrics made for them (macro_f1, entity_f1, exact_match) score these rows too. Nothing
of a row is trimmed, changed or left out. Next: `entity_tags.py` (tags to spans), `formats.py` (all shapes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kivnun.data.chat_shape import Complain, check_trains, check_weight, nearest
from kivnun.data.entity_spans import MARKER, Span, as_answer, checked_spans
from kivnun.data.entity_tags import text_and_spans
from kivnun.data.jsonl import LineProblem, as_list, as_object, key_name, type_name
from kivnun.data.rows import ChatRecord, Where
from kivnun.errors import DataError

Row = dict[str, Any]

CLASSIFY = "Which label?"
MARK = "Mark each {}."
ANY_ENTITY = "entity"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool"}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def string_at(row: Row, key: str, complain: Complain) -> str:
    """Return row[key], complaining unless it is a string."""
    if key not in row:
        complain(f"the key {key!r} is missing")
        return "?"  # not empty: one complaint is enough
    value = row[key]
    if not isinstance(value, str):
        advice = "; for conversations use the messages format" if as_list(value) is not None else ""
        complain(f"{key} must be a string, got {type_name(value)}{advice}")
        return "?"
    return value


def instruction(row: Row, where: Where, complain: Complain, _: str | None) -> ChatRecord:
    """Alpaca's shape: the instruction, an empty line, the input; of the two the other alone where one is empty."""
    asked = [part for part in (string_at(row, "instruction", complain), _or_empty(row, "input", complain)) if part]
    reply = string_at(row, "output", complain)
    if not asked:
        complain("instruction and input are both empty: there is nothing to reply to")
    return _asked("\n\n".join(asked), reply, where, _or_empty(row, "system", complain))


def prompt_response(row: Row, where: Where, complain: Complain, _: str | None) -> ChatRecord:
    prompt, reply = string_at(row, "prompt", complain), string_at(row, "response", complain)
    if prompt == "":
        complain("prompt is empty: there is nothing to reply to")
    return _asked(prompt, reply, where, _or_empty(row, "system", complain))


def classification(row: Row, where: Where, complain: Complain, ask: str | None) -> ChatRecord:
    """The question, the text (of two texts the second on a line below), and the label as the reply."""
    first = "text1" if "text1" in row else "text"
    text, second = string_at(row, first, complain), _or_empty(row, "text2", complain)
    if not text.strip():
        complain(f"{first} is empty: there is nothing to classify")
    label = _label(row["label"], "label", complain) if "label" in row else string_at(row, "label", complain)
    return _asked(_joined(CLASSIFY if ask is None else ask, " ", f"{text}\n{second}" if second else text), label, where)


def entities(row: Row, where: Where, complain: Complain, ask: str | None) -> ChatRecord | None:
    """What to mark, the text, and a line for each entity as the reply (`entity_spans.py`)."""
    found = _tagged(row, complain) if "tokens" in row or "tags" in row else _marked(row, complain)
    if found is None:
        return None
    text, spans = found
    if not text.strip():
        complain("the text is empty: there is nothing to mark")
    labels = _labels(row.get("labels"), complain)
    unknown = {span.label for span in spans} - set(labels or ())
    if labels and unknown:
        complain(f"{len(unknown)} labels of entities are not among labels, which name every label that there is")
    if ask is not None and MARKER in ask:
        complain(f"data.instruction holds {MARKER!r}, which begins the text itself: word it otherwise")
    try:
        reply = as_answer(text, spans)
    except DataError as error:
        complain(error.message)
        return None
    asked = MARK.format(", ".join(labels) if labels else ANY_ENTITY) if ask is None else ask
    return _asked(_joined(asked, "\n", MARKER + text), reply, where)


def multiple_choice(row: Row, where: Where, complain: Complain, ask: str | None) -> ChatRecord | None:
    """The question, the choices on lines of their own, and the right choice's text as the reply."""
    question = string_at(row, "question", complain)
    if not question.strip():
        complain("question is empty")
    key = "answerKey" if "answerKey" in row else "answer"
    choices, names = _choices(row.get("choices"), complain)
    if key not in row:
        complain("the key 'answer' is missing")
    if not choices or key not in row:
        return None
    right = _right(row[key], choices, names, key, complain)
    if right is None:
        return None
    listed = "\n".join(f"- {choice}" for choice in choices)
    return _asked(_joined(ask or "", "\n", f"{question}\nOptions:\n{listed}"), choices[right], where)


def sharegpt(row: Row, where: Where, complain: Complain, _: str | None) -> ChatRecord:
    """Turns of {from, value}: system, human, gpt and tool are system, user, assistant and tool."""
    if "id" in row and not isinstance(row["id"], str | int):
        complain(f"id must be a string or a number, got {type_name(row['id'])}")
    messages: list[Row] = []
    system = _or_empty(row, "system", complain)
    if system:
        messages.append({"role": "system", "content": system})
    turns = as_list(row["conversations"])
    if turns is None:
        complain(f"conversations must be a list, got {type_name(row['conversations'])}")
    elif not turns:
        complain("conversations is empty")
    read = [_turn(turn, f"conversations[{number}]", complain) for number, turn in enumerate(turns or [])]
    good = [message for message in read if message is not None]
    if turns and len(good) == len(read):  # a conversation with a turn left out is none: of its end nothing can be said
        check_trains(good, complain)
    return ChatRecord((*messages, *good), None, where)


def _turn(value: Any, at: str, complain: Complain) -> Row | None:
    turn = as_object(value)
    if turn is None:
        complain(f"{at} must be an object, got {type_name(value)}")
        return None
    if "role" in turn or "content" in turn:
        complain(f"{at} has role and content: these are messages; name the key messages, or map it with data.columns")
        return None
    role = turn.get("from")
    if not isinstance(role, str) or role not in _ROLES:
        near = nearest(role, _ROLES) if isinstance(role, str) else None
        complain(f"{at}.from must be one of {', '.join(_ROLES)}" + (f"; did you mean {near!r}?" if near else ""))
        return None
    unknown = [key for key in turn if key not in ("from", "value", "weight")]
    if unknown:
        shown = ", ".join(map(key_name, unknown[:6]))
        complain(f"keys that would have no effect in {at}: {shown}; allowed: from, value, weight. Remove them")
    content = turn.get("value")
    if not isinstance(content, str):
        complain(f"{at}.value must be a string, got {type_name(content)}")
        content = "?"
    message: Row = {"role": _ROLES[role], "content": content}
    if turn.get("weight") is not None:
        if message["role"] != "assistant":
            complain(f"{at}.weight is for gpt's turns only")
        check_weight(turn["weight"], at, complain)
        message["weight"] = turn["weight"]
    return message


def _tagged(row: Row, complain: Complain) -> tuple[str, list[Span]] | None:
    tokens, tags = _strings(row, "tokens", complain), _strings(row, "tags", complain)
    return None if tokens is None or tags is None else text_and_spans(tokens, tags, complain)


def _marked(row: Row, complain: Complain) -> tuple[str, list[Span]] | None:
    text = string_at(row, "text", complain)
    if "entities" not in row:
        complain("the key 'entities' is missing")
        return None
    try:
        return text, checked_spans(text, _as_objects(row["entities"]))
    except DataError as error:
        complain(error.message)
        return None


def _as_objects(entities: Any) -> Any:
    """Return spans as a list of {start, end, label}: also from lists [start, end, label] and from an object of three lists."""
    several = as_object(entities)
    if several is not None:
        columns = [as_list(several.get(key)) for key in ("start", "end", "label")]
        lists = [column for column in columns if column is not None]
        if len(several) != 3 or len(lists) != 3 or len({len(column) for column in lists}) != 1:
            return None
        return [dict(zip(("start", "end", "label"), span, strict=True)) for span in zip(*lists, strict=True)]
    items = as_list(entities)
    if items is None:
        return None
    return [
        dict(zip(("start", "end", "label"), triple, strict=True))
        if (triple := as_list(item)) is not None and len(triple) == 3
        else item
        for item in items
    ]


def _strings(row: Row, key: str, complain: Complain) -> list[str] | None:
    if key not in row:
        complain(f"the key {key!r} is missing")
        return None
    items = as_list(row[key])
    if items is None or not all(isinstance(item, str) for item in items):
        complain(f"{key} must be a list of strings" + ("" if items is not None else f", got {type_name(row[key])}"))
        return None
    return items


def _labels(value: Any, complain: Complain) -> list[str]:
    items = as_list(value)
    if value is not None and (items is None or not all(isinstance(item, str) and item.strip() for item in items)):
        complain("labels must be a list of strings that are not empty")
        return []
    return items or []


def _label(value: Any, at: str, complain: Complain) -> str:
    """Return a class as text: a string as it is, true and false and numbers as JSON writes them."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        if not math.isfinite(value):
            complain(f"{at} is no number that is finite")
        return repr(value)
    if not isinstance(value, str):
        complain(f"{at} must be a string, a number or a boolean, got {type_name(value)}")
        return "?"
    if not value.strip():
        complain(f"{at} is empty")
    elif value != value.strip():
        complain(f"{at} has white space at an end, which would make another class of it; remove it")
    return value


def _choices(value: Any, complain: Complain) -> tuple[list[str], list[str]]:
    """Return the choices and their names: those of {"text": [...], "label": [...]}, else A, B, C and so on."""
    given = as_object(value)
    texts = as_list(given.get("text")) if given is not None else as_list(value)
    names = as_list(given.get("label")) if given is not None else None
    if texts is None or (given is not None and (names is None or len(given) != 2)):
        complain('choices must be a list, or an object {"text": [...], "label": [...]}')
        return [], []
    before = len(texts)
    choices = [_label(text, f"choices[{number}]", complain) for number, text in enumerate(texts)]
    if before < 2:
        complain(f"choices must be at least two, got {before}")
    if len(set(choices)) != len(choices):
        complain("two choices are the same")
    if names is None:
        return choices, list(_LETTERS[: len(choices)])
    shown = [name for name in names if isinstance(name, str) and name]
    if len(shown) != len(choices) or len(set(shown)) != len(shown):
        complain("choices.label must name each choice, with a string of its own")
        return [], []
    return choices, shown


def _right(answer: Any, choices: Sequence[str], names: Sequence[str], at: str, complain: Complain) -> int | None:
    """Return which choice is right: a whole number counts from 0, a string is a choice's text or its name."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(choices):
            return answer
        complain(f"{at} must be from 0 to {len(choices) - 1}, since there are {len(choices)} choices")
        return None
    if not isinstance(answer, str):
        complain(f"{at} must be the number of a choice from 0, its letter or its text; got {type_name(answer)}")
        return None
    found = {place for listed in (choices, names) for place, item in enumerate(listed) if item == answer}
    if len(found) == 1:
        return found.pop()
    if found:
        complain(f"{at} is the text of one choice and the name of another; give the number of the right choice, counted from 0")
    else:
        complain(f"{at} is neither the text nor the letter of a choice")
    return None


def spelled_answer(answer: str, choices: Any) -> str | int:
    """Return an answer out of a file in which all is text: digits count the choices from 0, unless they are a choice themselves.

    Raises LineProblem where they are one choice and count another.
    """
    items = as_list(choices) or []
    if not (answer.isascii() and answer.isdecimal()) or len(answer) > 3:
        return answer
    place = int(answer)
    if answer not in items:
        return place
    if place < len(items) and items[place] != answer:
        raise LineProblem(
            "answer is the text of one choice and the number of another; give the row in JSONL, with a number or a text"
        )
    return answer


def _or_empty(row: Row, key: str, complain: Complain) -> str:
    """Return an optional text; a key that is not there, or null, says nothing."""
    return "" if row.get(key) is None else string_at(row, key, complain)


def _joined(ask: str, gap: str, text: str) -> str:
    """Return what is asked and the text, with `gap` between unless the question ends with white space of its own."""
    return text if not ask else ask + ("" if ask[-1].isspace() else gap) + text


def _asked(prompt: str, reply: str, where: Where, system: str = "") -> ChatRecord:
    before = [{"role": "system", "content": system}] if system else []
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    return ChatRecord((*before, *turns), None, where)
