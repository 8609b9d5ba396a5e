"""What one model gives to every answer of the test questions, and to text that has nothing to do with them; kept on disk.

A score depends on the questions and the model alone: where its file names both, it is read and not computed again.
Next: `figures.py`, which makes the bars of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kivnun.artifacts import atomic_write
from kivnun.data.rows import TokenRow, Where
from kivnun.data.scenarios.multiple_choice.questions import VARIATIONS, Question
from kivnun.data.template import ChatTokenizer
from kivnun.evaluate.heldout import Scorer, held_out_nll
from kivnun.evaluate.multiple_choice import Choices, answer_log_probs, chat

DECIMALS = 3
"""Log-probabilities are kept with so many decimals, and all figures are computed from what is kept."""
MICRO_BATCH_TOKENS = 2048

StageProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Scores:
    """One model's log-probabilities in nats. `open[i]` has one for each of question i's answers, the true ones first; `listed[i]`
    one for each of its four options, the best first, in each variation; `text` the (sum of the loss, tokens) of each text."""

    open: tuple[tuple[float, ...], ...]
    listed: tuple[tuple[tuple[float, ...], ...], ...]
    text: tuple[tuple[float, float], ...]

    def as_json(self) -> dict[str, Any]:
        return {"open": self.open, "listed": self.listed, "text": self.text}


def scores_from_json(values: dict[str, Any]) -> Scores:
    """Return what `as_json` gave."""
    return Scores(
        tuple(tuple(answers) for answers in values["open"]),
        tuple(tuple(tuple(options) for options in variations) for variations in values["listed"]),
        tuple((nll, tokens) for nll, tokens in values["text"]),
    )


def score_model(
    scorer: Scorer, tokenizer: ChatTokenizer, asked: Sequence[Question], texts: Sequence[str], on_progress: StageProgress
) -> Scores:
    """Score the questions, asked openly in their first wording and with options in every variation, and the texts."""
    encode = chat(tokenizer)
    openly = [Choices(question.asks[0], (*question.true, *question.false)) for question in asked]
    listed = [Choices(question.listed(number), question.options) for question in asked for number in range(VARIATIONS)]
    to_open = answer_log_probs(scorer, openly, encode, MICRO_BATCH_TOKENS, lambda done, all: on_progress("questions", done, all))
    to_listed = answer_log_probs(scorer, listed, encode, MICRO_BATCH_TOKENS, lambda done, all: on_progress("options", done, all))
    loss = held_out_nll(scorer, _text_rows(texts, tokenizer), MICRO_BATCH_TOKENS)
    by_question = [to_listed[start : start + VARIATIONS] for start in range(0, len(to_listed), VARIATIONS)]
    return Scores(
        tuple(_kept(values) for values in to_open),
        tuple(tuple(_kept(values) for values in variations) for variations in by_question),
        tuple(zip(_kept(loss.sums_N), loss.weights_N.tolist(), strict=True)),
    )


def kept_scores(path: Path, of: str, compute: Callable[[], Scores]) -> Scores:
    """Return the scores in `path` if they are those of `of` (a hash of model and questions), else compute and keep them."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["of"] == of:
            return scores_from_json(record)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent, damaged or of another shape: made again
    scores = compute()
    atomic_write(path, json.dumps({"of": of, **scores.as_json()}) + "\n")
    return scores


def _kept(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(value, DECIMALS) for value in values.tolist())


def _text_rows(texts: Sequence[str], tokenizer: ChatTokenizer) -> list[TokenRow]:
    rows: list[TokenRow] = []
    for number, text in enumerate(texts):
        ids = np.array([*tokenizer.encode(text), tokenizer.eos_id], dtype=np.int32)
        weights = np.ones(len(ids), dtype=np.float32)
        weights[0] = 0.0
        rows.append(TokenRow(ids, weights, number, Where("documentation", number + 1), len(ids)))
    return rows
