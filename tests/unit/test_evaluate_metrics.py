"""Metrics: chrF is sacreBLEU's, exact match forgives what it says and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import CHRF

from kivnun.evaluate.metrics import chrf, chrf_counts, exact_match

TEXTS = st.text(alphabet="abc אבג׳,. \n\t", max_size=12)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
def test_chrf_is_sacrebleus_for_rows_and_for_the_corpus(pairs: list[tuple[str, str]]) -> None:
    reference = CHRF()
    counts = np.stack([chrf_counts(*pair) for pair in pairs])
    rows = [reference.sentence_score(ours, [theirs]).score for ours, theirs in pairs]
    corpus = reference.corpus_score([ours for ours, _ in pairs], [[theirs for _, theirs in pairs]]).score
    np.testing.assert_allclose(chrf(counts), rows, rtol=0, atol=1e-9)
    np.testing.assert_allclose(chrf(counts.sum(axis=0)), corpus, rtol=0, atol=1e-9)


def test_chrf_of_known_pair() -> None:
    assert chrf(chrf_counts("שלושה ימים", "שלושה ימים")) == pytest.approx(100.0)
    assert chrf(chrf_counts("", "שלושה ימים")) == 0.0


@pytest.mark.parametrize(
    ("reply", "reference", "same"),
    [
        ("  caf\u00e9\n", "cafe\u0301", True),
        ("שלום", "שלום ", True),
        ("Yes", "yes", False),
        ("a  b", "a b", False),
        ("yes.", "yes", False),
        ("", " ", True),
    ],
)
def test_exact_match_forgives_composition_and_outer_space_alone(reply: str, reference: str, same: bool) -> None:
    assert exact_match(reply, reference) is same
