"""The metrics: what each held-out row adds, and how the sum over rows becomes the figure.

Every metric has this one shape, so that `intervals.py` can resample any of them with a matrix product, and a corpus figure gets
an interval of its own instead of one for the mean of its rows. chrF is computed here rather than by sacreBLEU because that
needs each row's n-gram counts, which sacreBLEU keeps private; a test holds the two equal. Next: `intervals.py`.

Source of chrF: Popovic 2015, "chrF: character n-gram F-score for automatic MT evaluation"; orders 1 to 6, beta 2, no word
n-grams, white space left out, averaged over the orders present: sacreBLEU's `chrF2|nc:6|nw:0|space:no|eff:yes`.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

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
    """Return whether more of this metric is better: of all of them, only the loss should fall."""
    return name != "nll"


def ratio(sums: np.ndarray) -> np.ndarray:
    """Return first over second of [..., 2]: loss per trained token, or the share of rows that match."""
    return sums[..., 0] / sums[..., 1]


def exact_match(reply: str, reference: str) -> bool:
    """Return whether the two are the same text: Unicode NFC, outer white space ignored, nothing else forgiven."""
    return unicodedata.normalize("NFC", reply).strip() == unicodedata.normalize("NFC", reference).strip()


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


VALUES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "nll": ratio,
    "preference_accuracy": ratio,
    "exact_match": ratio,
    "mc1": ratio,
    "mc2": ratio,
    "chrf": chrf,
}
"""How each metric's sums become its figure."""


def _ngrams(text: str, order: int) -> Counter[str]:
    return Counter(text[start : start + order] for start in range(len(text) - order + 1))
