"""The metrics: what each held-out row adds, and how the sum over rows becomes the figure.

Every metric has this one shape, so that `intervals.py` can resample any of them with a matrix product, and a corpus figure gets
an interval of its own instead of one for the mean of its rows. chrF is computed here rather than by sacreBLEU because that
needs each row's n-gram counts, which sacreBLEU keeps private; a test holds the two equal. Next: `intervals.py`.

Source of chrF: Popovic 2015, "chrF: character n-gram F-score for automatic MT evaluation"; orders 1 to 6, beta 2, no word
n-grams, white space left out, averaged over the orders present: sacreBLEU's `chrF2|nc:6|nw:0|space:no|eff:yes`.
Sources of the others: macro F1, Sokolova and Lapalme 2009 (the mean of the classes' F1; scikit-learn's `average="macro"` over the
references' classes); entity F1, Tjong Kim Sang and De Meulder 2003 (CoNLL: an entity is right if its place and its type are);
answer F1, Rajpurkar et al. 2016 (SQuAD's evaluate-v1.1.py, normalisation included).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kivnun.data.abc_notation import Tune, parse
from kivnun.data.entity_spans import from_answer, text_of_prompt
from kivnun.errors import DataError

CHRF_ORDERS = 6
CHRF_BETA = 2
# Where intervals are kept by name, that of tuned minus base has the metric's name and this ending.
DIFFERENCE = "_difference"


@dataclass(frozen=True, slots=True)
class Measure:
    """One metric over N rows. `rows_ND` float64: what each row adds to the sums that make the figure."""

    name: str
    rows_ND: np.ndarray

    @property
    def figure(self) -> float:
        """The metric over all rows."""
        return float(self.value(self.rows_ND.sum(axis=0)))

    @property
    def rows(self) -> int:
        return len(self.rows_ND)

    @property
    def higher_is_better(self) -> bool:
        return higher_is_better(self.name)

    def value(self, sums: np.ndarray) -> np.ndarray:
        """Map sums [..., D] to figures [...]."""
        return VALUES[self.name](sums)


def higher_is_better(name: str) -> bool:
    """Return whether more of this metric is better: only the loss, and what is made from it, should fall."""
    return name not in ("nll", "perplexity")


def ratio(sums: np.ndarray) -> np.ndarray:
    """Return first over second of [..., 2]: loss per trained token, or the share of rows that match."""
    return sums[..., 0] / sums[..., 1]


def exact_match(reply: str, reference: str) -> bool:
    """Return whether the two are the same text: Unicode NFC, outer white space ignored, nothing else forgiven."""
    return _normal(reply) == _normal(reference)


def chrf_counts(reply: str, reference: str) -> np.ndarray:
    """Return float64 [3 * 6]: for each order the n-grams of the reply, of the reference, and of both.

    An order that the reference is too short for counts nothing of the reply, as in sacreBLEU.
    """
    reply, reference = "".join(reply.split()), "".join(reference.split())
    counts: list[tuple[int, int, int]] = []
    for order in range(1, CHRF_ORDERS + 1):
        ours, theirs = _ngrams(reply, order), _ngrams(reference, order)
        counts.append((ours.total() if theirs else 0, theirs.total(), (ours & theirs).total()))
    return np.array(counts, dtype=np.float64).ravel()


def chrf(sums: np.ndarray) -> np.ndarray:
    """Return the score 0 to 100 of summed counts [..., 18]: the F-score of precision and recall averaged over orders."""
    by_order = sums.reshape(*sums.shape[:-1], CHRF_ORDERS, 3)
    reply, reference, both = by_order[..., 0], by_order[..., 1], by_order[..., 2]
    present = (reply > 0) & (reference > 0)
    num_orders = np.maximum(present.sum(axis=-1), 1)
    precision = (both / np.where(present, reply, 1) * present).sum(axis=-1) / num_orders
    recall = (both / np.where(present, reference, 1) * present).sum(axis=-1) / num_orders
    denominator = CHRF_BETA**2 * precision + recall
    return 100 * (1 + CHRF_BETA**2) * precision * recall / np.where(denominator > 0, denominator, 1)


def perplexity(sums: np.ndarray) -> np.ndarray:
    """Return e to the loss per trained token, of [..., 2] as `ratio` takes it. A loss beyond 700 nats counts as 700."""
    return np.exp(np.minimum(ratio(sums), 700.0))


def label_counts(said: Sequence[int], due: Sequence[int]) -> np.ndarray:
    """Return float64 [N, 3 * C] for classes 0 to C - 1: whether each row has each class right, says it, and is due to say it."""
    counts = np.zeros((len(due), max((*said, *due)) + 1, 3))
    for row, (label, reference) in enumerate(zip(said, due, strict=True)):
        counts[row, reference, 2] = 1
        counts[row, label, 1] = 1
        counts[row, label, 0] = label == reference
    return counts.reshape(len(due), -1)


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Return the mean F1, 0 to 1, over the classes that are due at all, of `label_counts` summed to [..., 3 * C]."""
    by_class = sums.reshape(*sums.shape[:-1], -1, 3)
    due = by_class[..., 2] > 0
    f1 = f1_of_counts(by_class) * due
    return f1.sum(axis=-1) / np.maximum(due.sum(axis=-1), 1)


def f1_of_counts(sums: np.ndarray) -> np.ndarray:
    """Return F1 of [..., 3], the numbers right, said and due; where nothing is due and nothing is said, that is right: 1."""
    right, both = sums[..., 0], sums[..., 1] + sums[..., 2]
    return np.where(both > 0, 2 * right / np.where(both > 0, both, 1), 1.0)


def entity_counts(prompt: str, reply: str, reference: str) -> np.ndarray:
    """Return float64 [3]: entities right, said and due. Both answers are read back into spans of the prompt's text; an entity is
    right when its characters and its label are, and each of the reference counts once."""
    text = text_of_prompt(prompt)
    said, due = from_answer(text, reply), from_answer(text, reference)
    right = (Counter(said.spans) & Counter(due.spans)).total()
    return np.array([right, len(said.spans) + said.lost, len(due.spans) + due.lost], dtype=np.float64)


def answer_f1(reply: str, reference: str) -> float:
    """Return the F1 of the words that reply and reference share, as SQuAD counts them: lower case, no ASCII punctuation, no
    articles. Of two answers without a word both must be empty."""
    said, due = Counter(_answer_words(reply)), Counter(_answer_words(reference))
    if not said or not due:
        return float(said == due)
    both = (said & due).total()
    return 2 * both / (said.total() + due.total())


def is_valid_tune(reply: str, reference: str) -> bool:
    """Return whether the reply is a tune in ABC notation of one voice, with the key, the meter and the first bar of the reference
    and as many bars in each part. Raises DataError where the reference is no such tune."""
    wanted = _what_was_asked(parse(reference))
    try:
        return _what_was_asked(parse(reply)) == wanted
    except DataError:
        return False


VALUES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "nll": ratio,
    "preference_accuracy": ratio,
    "exact_match": ratio,
    "mc1": ratio,
    "mc2": ratio,
    "chrf": chrf,
    "macro_f1": macro_f1,
    "entity_f1": f1_of_counts,
    "qa_f1": ratio,
    "format_compliance": ratio,
    "ended_turn": ratio,
    "tune_validity": ratio,
    "perplexity": perplexity,
    "novelty": ratio,
    "mean": ratio,
}
"""How each metric's sums become its figure."""


def _what_was_asked(tune: Tune) -> tuple[object, ...]:
    """Return what a prompt can ask of a tune: key, meter, the notes of the first bar, the bars of each part."""
    return tune.key, tune.meter_text, [note for note in tune.notes if note.start < tune.bars[0].length], tune.parts


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _answer_words(text: str) -> list[str]:
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _ngrams(text: str, order: int) -> Counter[str]:
    return Counter(text[start : start + order] for start in range(len(text) - order + 1))
