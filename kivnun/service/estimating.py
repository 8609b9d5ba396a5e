"""Rows for bases without a tokenizer at hand: of bases that are not on this machine yet by the length of texts, of toy bases by the
rule of toys (`jobs/toy.py`).

They have the right shape, so that everything that counts rows counts these alike; their ids say nothing.
Next: `examples_report.py`.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kivnun.artifacts import storage_errors
from kivnun.data.opening import name_of
from kivnun.data.rows import ChatRecord, PreferenceRecord, Record
from kivnun.data.tokens import Draft
from kivnun.jobs.toy import tokens_of


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


@dataclass(frozen=True)
class ToyRows:
    """The rows of toy bases: every token of a line is trained."""

    _tokens: dict[str, array[int]] = field(default_factory=dict[str, "array[int]"])  # of each line, by the file's name

    @classmethod
    def of(cls, paths: Iterable[Path]) -> ToyRows:
        """Read how long the lines of files are. Raises StorageError."""
        found: dict[str, array[int]] = {}
        for path in paths:
            with storage_errors(path), path.open("rb") as lines:
                found[name_of(path)] = array("q", (tokens_of(line.removesuffix(b"\n")) for line in lines))
        return cls(found)

    def drafts(self, record: Record) -> list[Draft]:
        tokens = self._tokens[record.where.path][record.where.line - 1]
        sides = (tokens - tokens // 2, tokens // 2) if isinstance(record, PreferenceRecord) else (tokens,)
        return [Draft(np.zeros(side, dtype=np.int32), np.ones(side, dtype=np.float32), 0) for side in sides]
