"""Entities as spans and as lines: each is made from the other without loss."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kivnun.data.entity_spans import Found, Span, as_answer, checked_spans, from_answer, text_of_prompt
from kivnun.errors import DataError

TEXT = "May met May in May, before Mayor May left."


@st.composite
def texts_with_spans(draw: st.DrawFn) -> tuple[str, list[Span]]:
    """Texts of few letters, so that everything repeats, with any spans: nested, overlapping, twice the same with two labels."""
    text = draw(st.text(alphabet="ab א#1 :.", max_size=24))
    places = st.tuples(st.integers(0, len(text)), st.integers(0, len(text)), st.sampled_from(("x", "y:z", "two words")))
    spans = {Span(start, end, label) for start, end, label in draw(st.lists(places, max_size=6)) if start < end}
    return text, sorted(s for s in spans if text[s.start : s.end] == text[s.start : s.end].strip())


@given(texts_with_spans())
def test_spans_written_and_read_back_are_the_same_spans(case: tuple[str, list[Span]]) -> None:
    text, spans = case
    assert from_answer(text, as_answer(text, spans)) == Found(tuple(spans), 0)


@given(st.text(max_size=30), st.text(max_size=60))
def test_any_reply_can_be_read_and_names_text_that_is_there(text: str, reply: str) -> None:
    found = from_answer(text, reply)
    assert all(0 <= span.start < span.end <= len(text) for span in found.spans)
    assert len(found.spans) + found.lost <= reply.count("\n") + 1


def test_mentions_come_in_the_order_of_the_text_without_numbers() -> None:
    spans = [Span(0, 3, "person"), Span(8, 11, "person"), Span(15, 18, "month")]
    assert as_answer(TEXT, spans) == "person: May\nperson: May\nmonth: May"


def test_a_mention_that_skips_an_earlier_one_says_which_it_is() -> None:
    spans = [Span(15, 18, "month"), Span(33, 36, "person")]
    assert as_answer(TEXT, spans) == "month: May #3\nperson: May"  # the fourth "May" is a part of Mayor, and no whole word


def test_a_part_of_a_word_can_be_marked_where_it_is_no_whole_word() -> None:
    text = "הגיע לתל אביב"
    assert from_answer(text, "place: תל אביב").spans == (Span(6, 13, "place"),)


def test_a_text_without_entities_is_answered_none() -> None:
    assert as_answer("Nobody came.", []) == "none"
    assert from_answer("Nobody came.", "none") == Found((), 0)
    assert from_answer("Nobody came.", "") == Found((), 0)


@pytest.mark.parametrize(
    "line", ["Dana", "person:", "person: Nobody", "person: Dana #2", "person: Dana #99999999999999", ": Dana", "x"]
)
def test_a_line_that_names_nothing_in_the_text_is_lost(line: str) -> None:
    assert from_answer("Dana came.", f"person: Dana\n{line}") == Found((Span(0, 4, "person"),), 1)


def test_the_same_mention_said_twice_is_two_spans() -> None:
    assert from_answer("Dana came.", "person: Dana\nperson: Dana").spans == (Span(0, 4, "person"),) * 2


@pytest.mark.parametrize(
    ("span", "why"),
    [
        (Span(0, 99, "x"), "the text has 8 characters"),
        (Span(3, 3, "x"), "the span 3 to 3"),
        (Span(0, 4, "x"), "space at an end"),
        (Span(4, 8, "x"), "line break"),
        (Span(0, 3, ""), "a label must be"),
        (Span(0, 3, "a: b"), "a label must be"),
        (Span(0, 3, "a:"), "a label must be"),
    ],
)
def test_a_span_that_fits_no_line_is_refused(span: Span, why: str) -> None:
    with pytest.raises(DataError, match=why):
        as_answer("one two\n", [span])


def test_published_entities_are_checked() -> None:
    assert checked_spans("Dana came.", [{"start": 0, "end": 4, "label": "person", "text": "Dana"}]) == [Span(0, 4, "person")]
    for wrong in (
        None,
        "person",
        [{"start": 0, "end": 4}],
        [{"start": 0.0, "end": 4, "label": "x"}],
        [{"start": True, "end": 4, "label": "x"}],
        [[]],
    ):
        with pytest.raises(DataError, match="entities must be"):
            checked_spans("Dana came.", wrong)


def test_the_text_of_a_prompt_is_what_follows_the_marker() -> None:
    assert text_of_prompt("Mark it.\nText: Text: a") == "Text: a"
    assert text_of_prompt("Dana came.") == "Dana came."
