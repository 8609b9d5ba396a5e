"""Task metrics: the model writes the reply it would write in use, and the reply is compared with the reference.

Prompts are the row's own token ids up to `prompt_len`, the list that training, chat and evaluation share; decoding is greedy.
Next: `evaluation.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kivnun.data.rows import PreferencePair, TokenRow, Trainable
from kivnun.data.template import ChatTokenizer
from kivnun.errors import SpecError
from kivnun.evaluate.heldout import Progress, Scorer
from kivnun.evaluate.metrics import Measure, chrf_counts, exact_match
from kivnun.model.generate import ROWS_AT_ONCE, SamplingParams
from kivnun.randomness import permutation


@dataclass(frozen=True, slots=True)
class Sample:
    """One held-out row as people read it: the prompt, the reference reply, and what the model wrote."""

    prompt: str
    reference: str
    reply: str


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The task metrics over generated rows: their figures, what each row got (chrF: its own score), and all replies."""

    metrics: dict[str, float]
    per_row: dict[str, list[float]]
    samples: list[Sample]
    measures: list[Measure]


def run_tasks(
    scorer: Scorer,
    rows: Sequence[TokenRow],
    tokenizer: ChatTokenizer,
    metrics: Sequence[str],
    max_new_tokens: int,
    on_progress: Progress | None = None,
) -> TaskResult:
    """Generate a reply for each row, greedily, and compare it with the row's reference by each named metric."""
    replies = generate_replies(scorer, rows, tokenizer, max_new_tokens, on_progress)
    samples = [
        Sample(
            tokenizer.decode(row.ids[: row.prompt_len].tolist(), skip_special=True).strip(), reference_reply(row, tokenizer), reply
        )
        for row, reply in zip(rows, replies, strict=True)
    ]
    measures = [_measure(name, samples) for name in metrics]
    per_row = {measure.name: measure.value(measure.rows_ND).tolist() for measure in measures}
    return TaskResult({measure.name: measure.figure for measure in measures}, per_row, samples, measures)


def generation_rows(rows: Sequence[Trainable], count: int, seed: int) -> list[TokenRow]:
    """Return up to `count` rows that have a prompt and a reply, chosen by the seed alone, in their order in the data.

    Of a preference pair the chosen reply is the reference. Running text has no prompt and gives none, nor does a row whose reply
    was cut off by truncation or is not trained (weight 0).
    """
    candidates = [row.chosen if isinstance(row, PreferencePair) else row for row in rows]
    candidates = [row for row in candidates if row.prompt_len > 0 and _reply_ids(row)]
    picked = np.sort(permutation(len(candidates), seed, "evaluate_rows")[:count])
    return [candidates[int(place)] for place in picked]


def generate_replies(
    scorer: Scorer, rows: Sequence[TokenRow], tokenizer: ChatTokenizer, max_new_tokens: int, on_progress: Progress | None = None
) -> list[str]:
    """Return the greedy reply to each row's prompt as text, without the stop marker."""
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, stop_ids=tokenizer.stop_ids)
    replies: list[str] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        prompts = [row.ids[: row.prompt_len].tolist() for row in rows[start : start + ROWS_AT_ONCE]]
        replies.extend(_reply_text(ids, tokenizer) for ids in scorer.sample(prompts, params))
        if on_progress is not None:
            on_progress(len(replies), len(rows))
    return replies


def reference_reply(row: TokenRow, tokenizer: ChatTokenizer) -> str:
    """Return the reply that the row was to teach, without the stop marker and what the template writes after it."""
    return _reply_text(_reply_ids(row), tokenizer)


def _reply_ids(row: TokenRow) -> list[int]:
    """Return the trained tokens that follow the prompt without a gap: the reply with its marker."""
    trained = row.weights[row.prompt_len :] > 0
    end = len(trained) if trained.all() else int(np.argmin(trained))
    return row.ids[row.prompt_len : row.prompt_len + end].tolist()


def _measure(name: str, samples: Sequence[Sample]) -> Measure:
    if name == "exact_match":
        hits = [(float(exact_match(sample.reply, sample.reference)), 1.0) for sample in samples]
        return Measure(name, np.array(hits))
    if name == "chrf":
        counts = np.stack([chrf_counts(sample.reply, sample.reference) for sample in samples])
        return Measure(name, counts)
    raise SpecError(f"evaluation.metrics: unknown metric {name!r}; allowed are exact_match and chrf")


def _prompt_text(row: TokenRow, tokenizer: ChatTokenizer) -> str:
    """Return the prompt for people to read: without the template's markers."""
    return tokenizer.decode(row.ids[: row.prompt_len].tolist(), skip_special=True).strip()


def _reply_text(ids: Sequence[int], tokenizer: ChatTokenizer) -> str:
    """Return the text before the first stop id. Other markers are kept: a reply that holds one is not the reference."""
    stops = set(tokenizer.stop_ids)
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return tokenizer.decode(list(ids[:end]))
