"""A base's tokenizer as the service needs it: prompts to ids, and each id's own bytes. Loads no model.

Next: `question.py` (who asks it), `kivnun/data/template.py` (the tokenizer itself).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from llguidance import LLTokenizer

from kivnun.data.chat_shape import Message
from kivnun.data.template import ChatTokenizer, load_tokenizer


class BaseTokens:
    """The tokenizer in a base's folder, with the base's own template: what training renders rows with."""

    def __init__(self, folder: Path) -> None:
        self.chat: ChatTokenizer = load_tokenizer(folder)
        self.vocab_size = self.chat.vocab_size
        self.has_template = self.chat.has_template

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.chat.stop_ids

    def encode(self, text: str) -> list[int]:
        return self.chat.encode(text)

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        return self.chat.prompt_ids(messages, tools)

    def special_id(self, text: str) -> int | None:
        return self.chat.tokens.added_tokens.get(text)

    def call_marks(self) -> tuple[str, str] | None:
        return self.chat.call_marks()

    def bytes_of(self, token: int) -> bytes:
        return self.spelling.decode_bytes([token]) if token < self.vocab_size else b""

    @cached_property
    def spelling(self) -> LLTokenizer:
        """Return the bytes of every token, and which may follow under a grammar."""
        return LLTokenizer(self.chat.tokens.as_json(), n_vocab=self.vocab_size, eos_token=list(self.stop_ids))
