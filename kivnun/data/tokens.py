"""Records to token ids and weights, before a row has its number: the one way, for training and for held-out rows.

The ids that a generation starts from are exactly a row's first ids: no token lies over the seam of prompt and reply.
Next: `template.py` (conversations), `loader.py` (whole files).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kivnun.data.rows import ChatRecord, PreferenceRecord, PromptRecord, Record, TextRecord
from kivnun.errors import DataError


class RowTokenizer(Protocol):
    """What making rows needs of a tokenizer; `template.ChatTokenizer` is the one of real bases."""

    @property
    def eos_id(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text, with BOS first where the tokenizer's own policy adds one, without EOS."""
        ...

    def encode_pair(self, prompt: str, completion: str) -> tuple[list[int], int]:
        """Return the ids of a prompt with its completion, without EOS, and how many are the prompt's: those of `encode(prompt)`."""
        ...

    def chat_rows(self, record: ChatRecord) -> list[tuple[np.ndarray, np.ndarray, int]]:
        """Return (ids int32, weights float32, prompt_len) per row of a conversation. Raises DataError if the template cannot."""
        ...


@dataclass(frozen=True, slots=True)
class Draft:
    """A token row without its number: `ids` int32 [T], `weights` float32 [T], `prompt_len` as in `rows.TokenRow`."""

    ids: np.ndarray
    weights: np.ndarray
    prompt_len: int

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def trained(self) -> int:
        """Return the number of tokens that carry a weight."""
        return int(np.count_nonzero(self.weights))


def make_drafts(record: Record, tokenizer: RowTokenizer) -> list[Draft]:
    """Return the rows of a record, each with something to train: one for prompts and text, one or more for a conversation, the
    chosen and the rejected for a preference. Raises DataError (without content) where the template or tokenizer cannot."""
    match record:
        case ChatRecord():
            drafts = [Draft(ids, weights, prompt_len) for ids, weights, prompt_len in tokenizer.chat_rows(record)]
        case PromptRecord():
            drafts = [_completed(record.prompt, record.completion, tokenizer)]
        case TextRecord():
            ids = [*tokenizer.encode(record.text), tokenizer.eos_id]
            drafts = [_draft(ids, 0)]
        case PreferenceRecord():
            drafts = [_reply(record, reply, tokenizer) for reply in (record.chosen, record.rejected)]
            _check_prompts(drafts)
    if not drafts or any(not draft.trained for draft in drafts):
        raise DataError("the row trains nothing: no token of it carries a weight")
    return drafts


def cut_drafts(drafts: Sequence[Draft], max_seq_len: int) -> tuple[list[Draft], int]:
    """Return the rows with at most `max_seq_len` tokens, their ends cut off, and the number of tokens cut. Rows that then train
    nothing are gone (a row without labels must never reach an optimizer); the list may be empty."""
    kept: list[Draft] = []
    for draft in drafts:
        ids, weights = draft.ids[:max_seq_len].copy(), draft.weights[:max_seq_len].copy()  # copies free the tail
        shorter = Draft(ids, weights, min(draft.prompt_len, max_seq_len))
        if shorter.trained:
            kept.append(shorter)
    return kept, sum(draft.length for draft in drafts) - sum(draft.length for draft in kept)


def _draft(ids: Sequence[int], prompt_len: int) -> Draft:
    weights = np.ones(len(ids), dtype=np.float32)
    weights[: max(prompt_len, 1)] = 0  # nothing predicts the first token
    return Draft(np.asarray(ids, dtype=np.int32), weights, prompt_len)


def _completed(prompt: str, completion: str, tokenizer: RowTokenizer) -> Draft:
    ids, prompt_len = tokenizer.encode_pair(prompt, completion)
    return _draft([*ids, tokenizer.eos_id], prompt_len)


def _reply(record: PreferenceRecord, reply: str, tokenizer: RowTokenizer) -> Draft:
    """Return prompt and reply as one row of which only the reply and its end are trained."""
    if isinstance(record.prompt, str):
        return _completed(record.prompt, reply, tokenizer)
    context = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in record.prompt.messages]
    messages = (*context, {"role": "assistant", "content": reply})
    ids, weights, prompt_len = tokenizer.chat_rows(ChatRecord(messages, record.prompt.tools, record.where))[-1]
    return Draft(ids, weights, prompt_len)


def _check_prompts(drafts: Sequence[Draft]) -> None:
    """A preference compares two replies to one prompt: a template that renders it differently for each makes no such pair."""
    prompts = [draft.ids[: draft.prompt_len].tolist() for draft in drafts]
    if prompts[0] != prompts[1]:
        raise DataError("the template renders the prompt differently for the chosen and the rejected reply")
