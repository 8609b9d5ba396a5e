"""Multiple choice by likelihood: the sum of log-probabilities of each answer's tokens decides, nothing is generated.

MC1: is the best answer likelier than every false one. MC2: the share of the true answers in the probability of all answers.
Robust accuracy, ours: is the best of four listed options the likeliest in every variation of the question.
Answers of one question share their prompt, so packing with shared prefixes computes it once.

Source: Lin, Hilton and Evans 2022, "TruthfulQA: Measuring How Models Mimic Human Falsehoods", arXiv 2109.07958, section 3 and the
code published with it: an answer's score is its summed log-probability, whatever its length; a tie counts as false.
Next: `kivnun/data/choices.py` (files of such questions), `kivnun/showcase/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from kivnun.data.packing import PackedBatch, micro_batches, pack
from kivnun.data.rows import ChatRecord, TokenRow, Where
from kivnun.data.template import ChatTokenizer
from kivnun.errors import NonFiniteLossError
from kivnun.evaluate.heldout import Progress, Scorer


@dataclass(frozen=True, slots=True)
class Choices:
    """One prompt and the answers to weigh."""

    prompt: str
    answers: tuple[str, ...]


Encode = Callable[[str, str], tuple[list[int], int]]
"""From a prompt and an answer to the ids of both together, and how many are the prompt's."""


def plain_text(tokenizer: ChatTokenizer) -> Encode:
    """Return the way of completion models: the answer follows the prompt as text; no marker after it is weighed."""
    return tokenizer.encode_pair


def chat(tokenizer: ChatTokenizer) -> Encode:
    """Return the way of chats: the answer is the reply to the prompt as a user's message, with its end-of-turn marker."""

    def encode(prompt: str, answer: str) -> tuple[list[int], int]:
        messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
        ids, weights, prompt_len = tokenizer.chat_rows(ChatRecord(messages, None, Where("multiple choice", 0)))[0]
        end = int(np.flatnonzero(weights)[-1]) + 1
        return ids[:end].tolist(), prompt_len

    return encode


def answer_log_probs(
    scorer: Scorer,
    asked: Sequence[Choices],
    encode: Encode,
    micro_batch_tokens: int,
    on_progress: Progress | None = None,
    *,
    share_prefixes: bool = True,
) -> list[np.ndarray]:
    """Return, for each of `asked`, the summed log-probability (nats, float64) of each answer after the prompt.

    Raises NonFiniteLossError when a sum is not finite.
    """
    rows = [_token_row(encode, choices.prompt, answer, 0) for choices in asked for answer in choices.answers]
    rows = [TokenRow(row.ids, row.weights, number, row.where, row.prompt_len) for number, row in enumerate(rows)]
    sums = np.full(len(rows), np.nan)
    done = 0
    for run in micro_batches(rows, micro_batch_tokens, share_prefixes):
        batch = pack(run, share_prefixes)
        sums[list(batch.rows)] = _row_sums(scorer.forward(batch), batch)
        done += len(run)
        if on_progress is not None:
            on_progress(done, len(rows))
    if not np.isfinite(sums).all():
        raise NonFiniteLossError("an answer's log-probability is not finite", hint="the weights hold NaN or infinite values")
    ends = [0, *accumulate(len(choices.answers) for choices in asked)]
    return [sums[start:end] for start, end in pairwise(ends)]


def mc1(best: float, false: np.ndarray) -> float:
    """Return 1 where the best answer is likelier than every false one, else 0."""
    return float(best > false.max())


def mc2(true: np.ndarray, false: np.ndarray) -> float:
    """Return the true answers' share of the probability of all answers, both given as log-probabilities."""
    top = max(float(true.max()), float(false.max()))  # exp() of sums of -800 nats is 0: only ratios are wanted
    p_true, p_false = float(np.exp(true - top).sum()), float(np.exp(false - top).sum())
    return p_true / (p_true + p_false)


def _row_sums(log_probs_S: np.ndarray, batch: PackedBatch) -> np.ndarray:
    return np.bincount(batch.segment_S, weights=log_probs_S.astype(np.float64), minlength=len(batch.rows))


def _token_row(encode: Encode, prompt: str, answer: str, number: int) -> TokenRow:
    ids, prompt_len = encode(prompt, answer)
    weights = np.zeros(len(ids), dtype=np.float32)
    weights[max(prompt_len, 1) :] = 1.0
    return TokenRow(np.array(ids, dtype=np.int32), weights, number, Where("multiple choice", number + 1), prompt_len)
