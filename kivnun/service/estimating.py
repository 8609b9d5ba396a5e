"""Tokens by the length of texts, for bases without a tokenizer at hand: toy bases, and bases that are not on this machine yet.

It makes rows of the right shape, so that everything that counts rows counts these alike; the ids say nothing.
Next: `examples_report.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from kivnun.data.rows import ChatRecord

TOY_BYTES = 4.0
TOY_LONGEST = 1 << 20


@dataclass(frozen=True, slots=True)
class EstimatingTokenizer:
    """A `data.tokens.RowTokenizer` that takes every token for so many bytes of UTF-8."""

    bytes_a_token: float
    eos_id: int = 0

    def encode(self, text: str) -> list[int]:
        return [0] * max(1, round(len(text.encode("utf-8", "replace")) / self.bytes_a_token))

    def encode_pair(self, prompt: str, completion: str) -> tuple[list[int], int]:
        asked = self.encode(prompt)
        return [*asked, *self.encode(completion)], len(asked)

    def chat_rows(self, record: ChatRecord) -> list[tuple[np.ndarray, np.ndarray, int]]:
        """Return one row: every assistant message is trained, but those of weight 0."""
        weights: list[float] = [0.0]
        prompt_len = 1
        for message in record.messages:
            said = f"{message.get('content') or ''}{json.dumps(message['tool_calls']) if message.get('tool_calls') else ''}"
            trained = message["role"] == "assistant" and message.get("weight") != 0
            prompt_len = len(weights) if message["role"] == "assistant" else prompt_len
            weights += [float(trained)] * (len(self.encode(said)) + 1)  # and the token that ends a turn
        return [(np.zeros(len(weights), dtype=np.int32), np.asarray(weights, dtype=np.float32), prompt_len)]
