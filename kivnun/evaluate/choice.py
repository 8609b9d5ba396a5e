"""Classification without parsing replies: of all labels, the one that the model finds likeliest after the prompt.

A label's likelihood is that of its whole reply with the end-of-turn marker, so labels of any length are compared as what they are,
events that exclude each other. A model that was never shown the labels is at chance here, where its free replies would all count as
wrong: so what tuning is credited with is telling the classes apart, and not having learned their names. Next: `evaluation.py`.

Source: the multiple-choice requests of lm-evaluation-harness, summed log-likelihood, no length normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kivnun.data.rows import TokenRow
from kivnun.errors import SpecError
from kivnun.evaluate.heldout import Progress, Scorer, target_log_probs
from kivnun.evaluate.metrics import Measure, label_counts
from kivnun.evaluate.tasks import reply_ids

MOST_LABELS = 64


def choose_labels(
    scorer: Scorer, rows: Sequence[TokenRow], micro_batch_tokens: int, on_progress: Progress | None = None
) -> Measure:
    """Return `macro_f1` over the rows; the labels are the different replies that the rows have.

    Raises SpecError when there are more than MOST_LABELS, which are no labels but free text.
    """
    replies = [tuple(reply_ids(row)) for row in rows]
    labels = sorted(set(replies))
    if len(labels) > MOST_LABELS:
        raise SpecError(
            f"evaluation.metrics asks for macro_f1, but {len(rows):,} held-out rows have {len(labels):,} different replies; "
            f"labels are {MOST_LABELS} at most",
            hint="macro_f1 is for classification; for free replies ask for exact_match, qa_f1 or chrf",
        )
    candidates = [_with_reply(row, label, place * len(labels) + number)
                  for place, row in enumerate(rows) for number, label in enumerate(labels)]  # fmt: skip
    scored, log_probs = target_log_probs(scorer, candidates, micro_batch_tokens, on_progress)
    sums = np.empty(len(candidates))
    sums[[row.row for row in scored]] = [values.sum() for values in log_probs]
    chosen = sums.reshape(len(rows), len(labels)).argmax(axis=1).tolist()
    return Measure("macro_f1", label_counts(chosen, [labels.index(reply) for reply in replies]))


def _with_reply(row: TokenRow, reply: tuple[int, ...], number: int) -> TokenRow:
    """Return the row with another reply to its prompt, all of the reply weighed alike."""
    ids = np.concatenate([row.ids[: row.prompt_len], np.array(reply, dtype=row.ids.dtype)])
    weights = np.zeros(len(ids), dtype=np.float32)
    weights[row.prompt_len :] = 1
    return TokenRow(ids, weights, number, row.where, row.prompt_len)
