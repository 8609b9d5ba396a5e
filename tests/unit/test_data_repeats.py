"""What repeats in data: exact copies counted as by hand, near ones found as by comparing all with all, within known bounds."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kivnun.data import repeats, spool
from kivnun.data.near import RUN, plain, runs_of
from kivnun.data.repeats import Found, Repeats, fingerprint
from kivnun.data.rows import ChatRecord, PreferenceRecord, PromptRecord, TextRecord, Where
from kivnun.data.signatures import NEAR, SKETCH, TRIES, likeness, sketch_of

WORDS = [f"{a}{b}" for a in ("red", "quick", "old", "noisy", "small") for b in ("fox", "ship", "lamp", "river", "stone")]


def sentence(draw: random.Random, words: int = 12) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))


def find(texts: list[str], held_out: set[int] = frozenset(), looked_at: int = 1000) -> Found:  # type: ignore[assignment]
    found = Repeats(looked_at=looked_at)
    for line, text in enumerate(texts):
        found.add(TextRecord(text, Where("rows.jsonl", line)))
    return found.find(np.array([line in held_out for line in range(len(texts))]))


def jaccard(a: str, b: str) -> float:
    one, other = runs_of(plain(a), RUN), runs_of(plain(b), RUN)
    return len(one & other) / len(one | other)


@pytest.mark.parametrize("part", [2**18, 3])
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdefg"), st.booleans()), max_size=40))
def test_exact_copies_are_counted_as_by_hand(part: int, rows: list[tuple[str, bool]]) -> None:
    train = [text for text, held in rows if not held]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeats, "_PART", part)
        found = find([text for text, _ in rows], {line for line, (_, held) in enumerate(rows) if held})
    assert found.duplicates == len(train) - len(set(train))
    assert found.overlap == sum(text in train for text, held in rows if held)
    copies = [(line, [t for t, h in rows[:line] if not h].count(text)) for line, (text, held) in enumerate(rows) if not held]
    assert [pair.row.line for pair in found.pairs["duplicates"]] == [line for line, before in copies if before]
    assert all(rows[pair.row.line][0] == rows[pair.other.line][0] for kind in found.pairs.values() for pair in kind)


def test_equal_content_is_equal_wherever_it_stands_and_any_difference_counts() -> None:
    here, there = Where("a", 1), Where("b", 9)
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    kinds = [
        TextRecord("a", here),
        PromptRecord("a", "b", here),
        ChatRecord(messages, None, here),
        ChatRecord(messages, ({"type": "function"},), here),
        ChatRecord((messages[0], {**messages[1], "weight": 0}), None, here),
        PreferenceRecord("a", "b", "c", here),
        PreferenceRecord("a", "c", "b", here),
        PreferenceRecord(ChatRecord(messages[:1], None, here), "b", "c", here),
    ]
    assert len({fingerprint(record) for record in kinds}) == len(kinds)
    assert fingerprint(ChatRecord(tuple(dict(reversed(m.items())) for m in messages), None, there)) == fingerprint(kinds[2])


def test_near_duplicates_are_those_that_comparing_all_with_all_gives() -> None:
    draw = random.Random(5)
    texts = [sentence(draw) for _ in range(60)]
    for text in texts[:25]:
        words = text.split()
        words[draw.randrange(len(words))] = draw.choice(WORDS)
        texts.append(" ".join(words))
    held_out = set(range(70, 85))
    near = [(a, b) for a, b in combinations(range(len(texts)), 2) if texts[a] != texts[b] and jaccard(texts[a], texts[b]) >= NEAR]
    found = find(texts, held_out)
    in_train = {b for a, b in near if not {a, b} & held_out}
    over = {max(pair) for pair in near if len(held_out.intersection(pair)) == 1}
    assert in_train
    assert over
    assert (found.near_duplicates, found.near_overlap) == (len(in_train), len(over))
    assert {pair.row.line for pair in found.pairs["near_duplicates"]} == in_train
    assert {pair.row.line for pair in found.pairs["near_overlap"]} == over
    for pair in found.pairs["near_overlap"]:
        assert pair.likeness == round(jaccard(texts[pair.row.line], texts[pair.other.line]), 3)


def test_white_space_and_case_make_near_and_not_exact_copies() -> None:
    found = find(["The quick brown fox", "the  quick brown\nFOX", "something else"])
    assert (found.duplicates, found.near_duplicates) == (0, 1)
    assert found.pairs["near_duplicates"][0].likeness == 1.0


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=80), st.text(max_size=80))
def test_the_likeness_of_short_texts_is_exact(a: str, b: str) -> None:
    assert likeness(sketch_of(a).lowest, sketch_of(b).lowest) == pytest.approx(jaccard(a, b))


def test_the_likeness_of_long_texts_is_estimated_within_four_errors() -> None:
    draw = random.Random(1)
    words = [str(draw.randrange(10**6)) for _ in range(3000)]
    text = " ".join(words)
    for share in (0.02, 0.1, 0.3):
        other = " ".join("other" if draw.random() < share else word for word in words)
        value = jaccard(text, other)
        assert likeness(sketch_of(text).lowest, sketch_of(other).lowest) == pytest.approx(value, abs=4 * 0.5 / SKETCH**0.5)
        assert likeness(sketch_of(text).lowest, sketch_of(text + " x").lowest) > 0.97


def test_a_text_longer_than_what_is_hashed_at_once_has_the_same_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    text = sentence(random.Random(3), 400)
    whole = sketch_of(text)
    monkeypatch.setattr("kivnun.data.signatures._AT_ONCE", 50)
    parts = sketch_of(text)
    assert whole.lowest.tolist() == parts.lowest.tolist()
    assert whole.bins.tolist() == parts.bins.tolist()


@pytest.mark.parametrize("text", ["", "a", "ab cd", "\U0001f600"])
def test_the_shortest_texts_are_like_themselves(text: str) -> None:
    assert likeness(sketch_of(text).lowest, sketch_of(text).lowest) == 1.0


def test_beyond_the_bound_a_sample_is_looked_at_and_a_note_says_so() -> None:
    draw = random.Random(2)
    texts = [sentence(draw) for _ in range(300)]
    found = find([*texts, *texts], looked_at=100)
    assert found.different == len(set(texts))
    assert 20 <= found.looked_at <= 100
    assert found.duplicates == 600 - len(set(texts))
    assert [note for note in found.notes() if f"among {found.looked_at} of {found.different} different rows" in note]
    assert list(find(texts).notes()) == []
    shuffled = draw.sample(texts, len(texts))
    assert find(shuffled, looked_at=100).looked_at == found.looked_at


def test_many_copies_of_one_row_do_not_push_the_others_out_of_the_sample() -> None:
    texts = [sentence(random.Random(at)) for at in range(50)]
    assert find(["the same"] * 500 + texts, looked_at=60).looked_at == 51


def test_a_template_that_all_rows_share_costs_no_more_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Counter[str]()

    def counted(a: np.ndarray, b: np.ndarray) -> float:
        calls["likeness"] += 1
        return likeness(a, b)

    monkeypatch.setattr("kivnun.data.signatures.likeness", counted)
    draw = random.Random(7)
    template = sentence(draw, 10)
    assert find([template + " " + sentence(draw, 8) for _ in range(400)]).looked_at == 400
    assert 400 < calls["likeness"] <= 400 * TRIES  # of 79,800 pairs


def test_what_is_found_does_not_depend_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(4)
    texts = [sentence(draw, 4) for _ in range(40)] * 2
    texts += [text + "s" for text in texts[:10]]
    before = find(texts, {3, 50, 85})
    monkeypatch.setattr(spool, "MEMORY_BYTES", 50)
    assert find(texts, {3, 50, 85}) == before
    assert before.near_duplicates
    assert before.overlap
