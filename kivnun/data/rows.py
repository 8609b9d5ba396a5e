"""The values that flow from files to the engine: records (what a line says) and token rows (what is trained).

record --template--> TokenRow --packing--> PackedBatch. Records are plain data as the user wrote it, checked but not changed.
Next: `formats.py` (lines to records), `template.py` (records to token rows), `packing.py` (token rows to batches).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np


@dataclass(frozen=True, slots=True)
class Where:
    """The place a record came from. `line` counts from 1; it is the row's number in files whose rows are no lines."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True)
class ChatRecord:
    """A conversation in OpenAI's shape. Each message is a dict with `role` and `content`; an assistant message may hold
    `weight` (0 or 1): 0 means that the reply is context only."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None
    where: Where


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """A prompt and its completion as plain text, no template: the completion and one EOS are trained."""

    prompt: str
    completion: str
    where: Where


@dataclass(frozen=True, slots=True)
class TextRecord:
    """Running text: every token and one EOS are trained."""

    text: str
    where: Where


@dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """One prompt (a conversation that ends before the reply, or plain text) and two replies, the better one first."""

    prompt: ChatRecord | str
    chosen: str
    rejected: str
    where: Where


Record: TypeAlias = ChatRecord | PromptRecord | TextRecord | PreferenceRecord


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Token ids of one row and what each is worth.

    `ids` int32 [T]; `weights` float32 [T]: `weights[t]` is the weight of the negative log-likelihood of `ids[t]` given
    `ids[:t]`; `weights[0]` is always 0, since nothing predicts the first token. `row` is the row's number in its data set, the
    key of every draw made for it. `prompt_len` is the number of leading tokens that a generation of the last reply is given.
    """

    ids: np.ndarray
    weights: np.ndarray
    row: int
    where: Where
    prompt_len: int

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def total_weight(self) -> float:
        return float(self.weights.sum(dtype=np.float64))

    @property
    def sides(self) -> tuple[TokenRow, ...]:
        """Return the token rows that are trained together: this one."""
        return (self,)


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """The two token rows of one preference, never split over batches."""

    chosen: TokenRow
    rejected: TokenRow
    row: int
    where: Where

    @property
    def length(self) -> int:
        return self.chosen.length + self.rejected.length

    @property
    def sides(self) -> tuple[TokenRow, ...]:
        """Return the token rows that are trained together, the chosen one first."""
        return (self.chosen, self.rejected)


Trainable: TypeAlias = TokenRow | PreferencePair
