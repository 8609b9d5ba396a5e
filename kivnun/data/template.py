"""Conversations to token rows: what a model reads as a prompt, and which tokens of a row are trained.

Masks are made by construction, not by searching for markers: the template is asked for the prompt of each reply, and for the
conversation with that reply, and what the second adds to the first is the reply with its end-of-turn marker. The same function
makes the ids of training, evaluation and chat, so they are the same list. `docs/concepts/masks.md` tells the rules in words;
`rendering.py` makes the text, `tokenizer.py` the ids. Next: `loader.py` (files to rows), `packing.py` (rows to batches).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from kivnun.data.rendering import PINNED_DATE, ChatTemplate, Message
from kivnun.data.rows import ChatRecord
from kivnun.data.tokenizer import StreamDecoder, Tokenizer
from kivnun.data.tool_text import ToolText, tool_text, uses_tools
from kivnun.errors import BaseModelError, DataError, RowProblem

__all__ = ["ChatTokenizer", "StreamDecoder", "load_tokenizer"]

Tools: TypeAlias = Sequence[Mapping[str, Any]] | None
Row: TypeAlias = tuple[NDArray[np.int32], NDArray[np.float32], int]

# Stands for a reply that is not known yet. Letters and digits only: no template changes it, no data holds it.
_PROBE = "Qz7Kivnun0Reply7zQ"


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant message as it is rendered: `prompt` + `reply` + `marker` is the text up to its end.

    `reply` includes whitespace that the template puts around the content; `marker` is "" where the template has none; `rebuilt`
    says that the template renders the reply otherwise than after its own prompt for it.
    """

    prompt: str
    reply: str
    marker: str
    rebuilt: bool

    @property
    def text(self) -> str:
        return self.prompt + self.reply + self.marker


class ChatTokenizer:
    """A base's tokenizer with its chat template: the one maker of token ids.

    `eos_id` ends completions and running text, `stop_ids` end a generated reply (EOS ids and the template's end-of-turn marker),
    `notes` says in sentences what a user should know about the template.
    """

    def __init__(self, tokens: Tokenizer, templates: Mapping[str, ChatTemplate]) -> None:
        self.tokens = tokens
        self._templates = dict(templates)
        self.eos_id = tokens.eos_id
        self.vocab_size = tokens.vocab_size
        self.has_template = bool(templates)
        self._tool_texts: dict[str, ToolText | None] = {}

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Return the ids of plain text, without EOS; see `Tokenizer.encode`."""
        return self.tokens.encode(text, add_bos=add_bos)

    def encode_pair(self, prompt: str, completion: str) -> tuple[list[int], int]:
        """Return the ids of a prompt with its completion, without EOS, and how many are the prompt's: those of `encode(prompt)`."""
        prompt_ids = self.encode(prompt)
        return prompt_ids + self.tokens.extend_exactly(prompt, completion), len(prompt_ids)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Return the text of ids; with `skip_special`, without special tokens."""
        return self.tokens.decode(ids, skip_special)

    def text_after(self, context: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text that `ids` add after `context`, exactly."""
        return self.tokens.text_after(context, ids)

    def stream_decoder(self) -> StreamDecoder:
        """Return a decoder for ids as they are generated; special tokens give no text."""
        return StreamDecoder(self.tokens)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over all that decides ids: tokenizer.json, special tokens, templates and, where one asks for it, the date."""
        dates = [f"{template.now:%Y-%m-%d %H:%M:%S}" for template in self._templates.values() if template.uses_clock]
        return self.tokens.content_hash(*(f"{name}\n{one.source}" for name, one in sorted(self._templates.items())), *dates)

    @property
    def template_source(self) -> str | None:
        """Return the chat template that renders a conversation without tools; None: there is none."""
        return self._templates["default"].source if "default" in self._templates else None

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generated reply, EOS first."""
        marker = self._probed.marker if self._probed else ""
        marker_ids = [self.tokens.added_tokens[marker]] if marker in self.tokens.added_tokens else []
        return tuple(dict.fromkeys((*self.tokens.end_ids, *marker_ids)))

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about this template, in sentences."""
        notes: list[str] = []
        for date in sorted({template.now for template in self._templates.values() if template.uses_clock}):
            notes.append(f"the chat template prints the date; it is held at {date:%d %b %Y}, so that ids stay the same")
        if self._probed and not self._probed.marker:
            notes.append("the chat template ends no reply with a special token; EOS is put after each, one row per reply")
        if self._probed and self._probed.rebuilt:
            notes.append("the chat template prompts for a reply otherwise than it renders one; rows are prompt + reply + marker")
        return tuple(notes)

    def prompt_ids(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """Return what the model is given to write the next reply: exactly the first ids of the row that trains that reply.

        Raises BaseModelError without a template, DataError where the template refuses the conversation.
        """
        conversation = self._conversation(messages, tools)
        count = len(messages)
        text = conversation.prompt(count)
        return self._encode(text, _turns_within(text, conversation.earlier_turns(count), len(text)))[0]

    def prompt_text(self, messages: Sequence[Message], tools: Tools = None) -> str:
        """Return the text that `prompt_ids` are the ids of. Raises as it does."""
        return self._conversation(messages, tools).prompt(len(messages))

    def chat_rows(self, record: ChatRecord) -> list[Row]:
        """Return the rows that train a conversation's replies: (ids int32 [T], weights float32 [T], prompt_len) each.

        One row, the whole rendering, where that holds every trained reply as its prompt leads to it; else one row per trained
        reply, ending with it. Raises DataError with the record's line, BaseModelError without a template.
        """
        try:
            return self._rows(record)
        except DataError as error:
            problem = RowProblem(record.where.path, record.where.line, error.message)
            raise DataError("a conversation cannot be made into tokens", (problem,), hint=error.hint) from None

    def _rows(self, record: ChatRecord) -> list[Row]:
        conversation = self._conversation(record.messages, record.tools)
        trained = {
            number: float(message.get("weight", 1))
            for number, message in enumerate(record.messages)
            if message.get("role") == "assistant" and message.get("weight", 1) != 0
        }
        if not trained:
            raise DataError("no assistant message to train", hint="give one assistant message a weight of 1, or no weight")
        turns = {number: conversation.turn(number) for number in trained}
        full = conversation.text(len(record.messages))
        if all(turn.marker and full.startswith(turn.text) for turn in turns.values()):
            return [self._row(conversation, full, len(record.messages), trained)]
        rows: list[Row] = []
        for number, turn in turns.items():
            rendered = conversation.text(number + 1)
            text = rendered if turn.marker and rendered.startswith(turn.text) else turn.text
            rows.append(self._row(conversation, text, number + 1, {number: trained[number]}))
        return rows

    def _row(self, conversation: _Conversation, text: str, count: int, trained: Mapping[int, float]) -> Row:
        """Return one row of `text`, which renders the first `count` messages, with the replies in `trained` weighted."""
        turns = _turns_within(text, conversation.earlier_turns(count), len(text))
        ids, spans = self._encode(text, turns)
        last = max(trained)
        if not turns[last].marker:
            ids.append(self.eos_id)
            spans[last] = (spans[last][0], len(ids))
        weights = np.zeros(len(ids), np.float32)
        for number, weight in trained.items():
            begin, end = spans[number]
            weights[begin:end] = weight
        weights[0] = 0  # nothing predicts the first token
        return np.array(ids, np.int32), weights, spans[last][0]

    def _encode(self, text: str, turns: Mapping[int, Turn]) -> tuple[list[int], dict[int, tuple[int, int]]]:
        """Return the ids of `text` and, by message number, where each turn's reply with its marker begins and ends in them.

        What comes before a place in the text decides the ids up to there, nothing after it does. So the ids of a prompt are a
        prefix of the ids of every row that goes on from it.
        """
        ids: list[int] = []
        spans: dict[int, tuple[int, int]] = {}
        context_from = cursor = 0
        for number, turn in turns.items():
            start = len(turn.prompt)
            ids += self.tokens.extend(text[context_from:cursor], text[cursor:start])
            begin = len(ids)
            ids += self.tokens.extend_exactly(text[context_from:start], turn.reply)
            ids += self._marker_ids(text[context_from:start] + turn.reply, turn.marker)
            spans[number] = (begin, len(ids))
            cursor = len(turn.text)
            context_from = cursor - len(turn.marker) if turn.marker else context_from
        ids += self.tokens.extend(text[context_from:cursor], text[cursor:])
        return ids, spans

    def _marker_ids(self, context: str, marker: str) -> list[int]:
        if marker in self.tokens.added_tokens:
            return [self.tokens.added_tokens[marker]]
        return self.tokens.extend_exactly(context, marker)

    def _conversation(self, messages: Sequence[Message], tools: Tools) -> _Conversation:
        if not self._templates:
            raise BaseModelError(
                f"the base in {self.tokens.folder} has no chat template",
                hint="give one with data.template, or use prompt/completion rows",
                pages=("09-no-chat-template",),
            )
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise BaseModelError(
                f"the base has no default chat template, only {', '.join(sorted(self._templates))}",
                hint="give one with data.template",
            )
        lead: Sequence[Message] = ()
        if uses_tools(messages, tools) and (words := self._tool_text(name)) is not None:
            lead, messages = words.conversation(messages, tools)
            tools = None
        return _Conversation(self._templates[name], messages, tools, self.tokens, lead)

    def call_marks(self) -> tuple[str, str] | None:
        """Return what stands around calls of functions where they are put in words; None where the template renders them."""
        name = "tool_use" if "tool_use" in self._templates else "default"
        words = self._tool_text(name) if name in self._templates else None
        return None if words is None else words.marks

    def _tool_text(self, name: str) -> ToolText | None:
        if name not in self._tool_texts:
            self._tool_texts[name] = tool_text(self._templates[name], self.tokens.added_tokens)
        return self._tool_texts[name]

    @cached_property
    def _probed(self) -> Turn | None:
        """The plainest turn there is, to see how this template ends one; None where it refuses that."""
        try:
            probe = ({"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE})
            return self._conversation(probe, None).turn(1)
        except (BaseModelError, DataError):
            return None


class _Conversation:
    """The renderings of one conversation's beginnings, each made once."""

    def __init__(
        self, template: ChatTemplate, messages: Sequence[Message], tools: Tools, tokens: Tokenizer, lead: Sequence[Message] = ()
    ) -> None:
        self._template = template
        self._lead = lead  # rendered before all others, and not counted
        self._messages = messages
        self._tools = tools
        self._tokens = tokens
        self._texts: dict[tuple[int, bool], str] = {}
        self._turns: dict[int, Turn | None] = {}

    def text(self, count: int, *, add_generation_prompt: bool = False) -> str:
        """Return the rendering of the first `count` messages."""
        key = (count, add_generation_prompt)
        if key not in self._texts:
            messages = [*self._lead, *self._messages[:count]]
            self._texts[key] = self._template.render(messages, self._tools, add_generation_prompt=add_generation_prompt)
        return self._texts[key]

    def prompt(self, count: int) -> str:
        """Return what the model is given after the first `count` messages.

        A template that knows no generation prompt still writes something before a reply ("ASSISTANT:"); that belongs to the
        prompt, up to the spaces, which tokenizers keep with the word that follows.
        """
        text = self.text(count, add_generation_prompt=True)
        around = self._around_reply(count) if self._knows_no_prompt(count) else None
        if around and around[0].startswith(text) and around[0][len(text) :].strip():
            return around[0].rstrip(" ")
        return text

    def turn(self, number: int) -> Turn:
        """Return how message `number`, an assistant's, is rendered after its prompt. Raises DataError where it is not."""
        prompt, text = self.prompt(number), self.text(number + 1)
        before, after = self._around_reply(number) or (prompt, None)
        if after is not None and text.endswith(after):
            end = len(text) - len(after)
            space, marker = self._split_marker(after)
            end += len(space)
        else:
            # The reply is not rendered as plain content is (a tool call): what token ends the rendering is its marker.
            marker = self._tokens.last_token(text.rstrip())
            end = len(text.rstrip()) - len(marker) if marker else len(text)
        rebuilt = not text.startswith(prompt)
        start = len(before) if rebuilt else len(prompt)
        if not text.startswith(before if rebuilt else prompt) or end < start:
            raise DataError(
                f"the chat template does not render message {number + 1} after the prompt for it",
                hint="give this message weight 0, or another template with data.template",
            )
        return Turn(prompt, text[start:end], marker, rebuilt)

    def earlier_turns(self, count: int) -> dict[int, Turn]:
        """Return the turns among the first `count` messages that can be told apart in the text, by message number."""
        turns: dict[int, Turn] = {}
        for number, message in enumerate(self._messages[:count]):
            if message.get("role") == "assistant" and (turn := self._turn_or_none(number)):
                turns[number] = turn
        return turns

    def _turn_or_none(self, number: int) -> Turn | None:
        if number not in self._turns:
            try:
                self._turns[number] = self.turn(number)
            except DataError:
                self._turns[number] = None
        return self._turns[number]

    def _knows_no_prompt(self, count: int) -> bool:
        try:
            return self.text(count) == self.text(count, add_generation_prompt=True)
        except DataError:  # a conversation without its reply is refused, so the flag is read
            return False

    def _around_reply(self, number: int) -> tuple[str, str] | None:
        """Return the text before and after a reply at place `number`, None where the template does not show it once."""
        probe = [*self._lead, *self._messages[:number], {"role": "assistant", "content": _PROBE}]
        try:
            text = self._template.render(probe, self._tools, add_generation_prompt=False)
        except DataError:
            return None
        before, _, after = text.partition(_PROBE)
        return (before, after) if text.count(_PROBE) == 1 else None

    def _split_marker(self, after: str) -> tuple[str, str]:
        """Return what lies between a reply and its end-of-turn marker, and the marker."""
        rest = after.lstrip()
        space = after[: len(after) - len(rest)]
        if marker := self._tokens.first_token(rest):
            return space, marker
        eos = self._tokens.special_tokens.get("eos_token")
        return (space, rest.rstrip()) if eos and rest.rstrip().endswith(eos) else ("", "")


def load_tokenizer(folder: Path, template_path: Path | None = None, *, now: datetime = PINNED_DATE) -> ChatTokenizer:
    """Return the tokenizer of a base's folder with its chat template, or with the one at `template_path`.

    `now` is the date that templates are told. Raises BaseModelError with a hint where files are missing or not valid.
    """
    tokens = Tokenizer(folder)
    sources = _template_sources(folder, tokens.config) if template_path is None else {"default": _read_text(template_path)}
    return ChatTokenizer(tokens, {name: ChatTemplate(text, tokens.special_tokens, now) for name, text in sources.items()})


def _turns_within(text: str, turns: Mapping[int, Turn], limit: int) -> dict[int, Turn]:
    """Return the turns that stand in `text[:limit]` as they were rendered, in order, none over another."""
    kept: dict[int, Turn] = {}
    for number, turn in sorted(turns.items(), reverse=True):
        if len(turn.text) <= limit and text.startswith(turn.text):
            kept[number] = turn
            limit = len(turn.prompt)
    return dict(sorted(kept.items()))


def _template_sources(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return a base's templates by name, found where transformers looks for them and in its order."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        more = sorted((folder / "chat_templates").glob("*.jinja"))
        return {"default": _read_text(path), **{one.stem: _read_text(one) for one in more}}
    given = config.get("chat_template")
    if isinstance(given, list):
        return {str(one["name"]): str(one["template"]) for one in cast(list[dict[str, Any]], given)}
    return {"default": given} if isinstance(given, str) else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BaseModelError(f"the chat template {path} cannot be read: {error}", hint="check data.template") from None
