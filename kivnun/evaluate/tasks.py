"""Task metrics: the model writes the reply it would write in use, and the reply is compared with the reference.

Prompts are the row's own token ids up to `prompt_len`, the list that training, chat and evaluation share; decoding is greedy.
Next: `evaluation.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kivnun.data.format_rules import keeps_rules, states_rules
from kivnun.data.rows import PreferencePair, TokenRow, Trainable
from kivnun.data.template import ChatTokenizer
from kivnun.errors import SpecError
from kivnun.evaluate.heldout import Progress, Scorer
from kivnun.evaluate.metrics import Measure, answer_f1, chrf_counts, entity_counts, exact_match, is_valid_tune
from kivnun.model.generate import ROWS_AT_ONCE, SamplingParams
from kivnun.randomness import permutation
from kivnun.spec.evaluation import METRICS


@dataclass(frozen=True, slots=True)
class Sample:
    """One held-out row as people read it: the prompt, the reference reply, and what the model wrote."""

    prompt: str
    reference: str
    reply: str


class Reply(NamedTuple):
    """What a model wrote, without the stop marker, and whether it ended the turn by itself."""

    text: str
    ended: bool


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
            tokenizer.decode(row.ids[: row.prompt_len].tolist(), skip_special=True).strip(),
            reference_reply(row, tokenizer),
            reply.text,
        )
        for row, reply in zip(rows, replies, strict=True)
    ]
    measures = [_measure(name, samples, replies) for name in metrics]
    per_row = {measure.name: measure.value(measure.rows_ND).tolist() for measure in measures}
    return TaskResult({measure.name: measure.figure for measure in measures}, per_row, samples, measures)


def generation_rows(rows: Sequence[Trainable], count: int, seed: int) -> list[TokenRow]:
    """Return up to `count` rows that have a prompt and a reply, chosen by the seed alone, in their order in the data.

    Of a preference pair the chosen reply is the reference. Running text has no prompt and gives none, nor does a row whose reply
    was cut off by truncation or is not trained (weight 0).
    """
    candidates = [row.chosen if isinstance(row, PreferencePair) else row for row in rows]
    candidates = [row for row in candidates if row.prompt_len > 0 and reply_ids(row)]
    picked = np.sort(permutation(len(candidates), seed, "evaluate_rows")[:count])
    return [candidates[int(place)] for place in picked]


def generate_replies(
    scorer: Scorer, rows: Sequence[TokenRow], tokenizer: ChatTokenizer, max_new_tokens: int, on_progress: Progress | None = None
) -> list[Reply]:
    """Return the greedy reply to each row's prompt."""
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, stop_ids=tokenizer.stop_ids)
    replies: list[Reply] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        prompts = [row.ids[: row.prompt_len].tolist() for row in rows[start : start + ROWS_AT_ONCE]]
        # A row is only shorter than asked for when its end-of-turn marker came, which is not part of it.
        answered = scorer.sample(prompts, params)
        replies.extend(Reply(_reply_text(ids, tokenizer), len(ids) < max_new_tokens) for ids in answered)
        if on_progress is not None:
            on_progress(len(replies), len(rows))
    return replies


def reference_reply(row: TokenRow, tokenizer: ChatTokenizer) -> str:
    """Return the reply that the row was to teach, without the stop marker and what the template writes after it."""
    return _reply_text(reply_ids(row), tokenizer)


def reply_ids(row: TokenRow) -> list[int]:
    """Return the trained tokens that follow the prompt without a gap: the reply with its marker."""
    trained = row.weights[row.prompt_len :] > 0
    end = len(trained) if trained.all() else int(np.argmin(trained))
    return row.ids[row.prompt_len : row.prompt_len + end].tolist()


def _measure(name: str, samples: Sequence[Sample], replies: Sequence[Reply]) -> Measure:
    if name == "ended_turn":
        return Measure(name, _shares([float(reply.ended) for reply in replies]))
    if name in COUNTS:
        return Measure(name, np.stack([COUNTS[name](sample) for sample in samples]))
    if name in SCORES:
        return Measure(name, _shares([float(SCORES[name](sample)) for sample in samples]))
    raise SpecError(f"evaluation.metrics: unknown metric {name!r}; allowed are {', '.join(METRICS)}", hint="name one of them")


def _keeps_format(sample: Sample) -> bool:
    if not states_rules(sample.prompt):
        raise SpecError(
            "evaluation.metrics asks for format_compliance, but a held-out prompt states no rule that can be checked",
            hint='say in it: First line "...". Last line "...". Every line between begins with "...". At most 3 lines.',
        )
    return keeps_rules(sample.prompt, sample.reply)


COUNTS: dict[str, Callable[[Sample], np.ndarray]] = {
    "chrf": lambda sample: chrf_counts(sample.reply, sample.reference),
    "entity_f1": lambda sample: entity_counts(sample.prompt, sample.reply, sample.reference),
}
"""Metrics of a corpus: each row adds counts, and the figure is made from their sums."""
SCORES: dict[str, Callable[[Sample], float]] = {
    "exact_match": lambda sample: exact_match(sample.reply, sample.reference),
    "qa_f1": lambda sample: answer_f1(sample.reply, sample.reference),
    "format_compliance": _keeps_format,
    "tune_validity": lambda sample: is_valid_tune(sample.reply, sample.reference),
}
"""Metrics that are the mean of a score, 0 to 1, that each row has of its own."""


def _shares(scores: Sequence[float]) -> np.ndarray:
    """Return float64 [N, 2]: each row's score, and one row."""
    return np.stack([np.array(scores, dtype=np.float64), np.ones(len(scores))], axis=1)


def _reply_text(ids: Sequence[int], tokenizer: ChatTokenizer) -> str:
    """Return the text before the first stop id. Other markers are kept: a reply that holds one is not the reference."""
    stops = set(tokenizer.stop_ids)
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return tokenizer.decode(list(ids[:end]))
