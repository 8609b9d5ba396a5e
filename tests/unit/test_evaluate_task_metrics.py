"""The scenarios' metrics against values counted by hand and definitions written out here."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kivnun.data.format_rules import keeps_rules, states_rules
from kivnun.data.packing import PackedBatch
from kivnun.data.rows import TokenRow, Where
from kivnun.errors import SpecError
from kivnun.evaluate.choice import choose_labels
from kivnun.evaluate.intervals import interval_of
from kivnun.evaluate.metrics import Measure, answer_f1, entity_counts, higher_is_better, is_valid_tune, label_counts
from kivnun.evaluate.tasks import COUNTS, SCORES, Reply, Sample, _measure
from kivnun.spec.evaluation import METRICS

TUNE = "X:1\nT:A\nM:3/4\nL:1/8\nK:G\n|: G6 | A6 :|"
PERSONA = 'You are a baker. First line "Ahoy!". Last line "Over.". Every line between begins with "* ".'


def macro_f1_by_definition(said: list[int], due: list[int]) -> float:
    """The mean over the references' classes of 2 TP / (2 TP + FP + FN)."""
    values = []
    for label in set(due):
        right = sum(a == b == label for a, b in zip(said, due, strict=True))
        false_positive = sum(a == label != b for a, b in zip(said, due, strict=True))
        false_negative = sum(b == label != a for a, b in zip(said, due, strict=True))
        values.append(2 * right / (2 * right + false_positive + false_negative))
    return sum(values) / len(values)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=30))
def test_macro_f1_is_the_mean_of_the_classes(pairs: list[tuple[int, int]]) -> None:
    said, due = [a for a, _ in pairs], [b for _, b in pairs]
    measure = Measure("macro_f1", label_counts(said, due))
    assert measure.figure == pytest.approx(macro_f1_by_definition(said, due))


def test_macro_f1_counted_by_hand() -> None:
    # class 0: 1 right, 1 false, 1 missed -> 1/2; class 1: 1 right, 0 false, 1 missed -> 2/3; class 2 is never due
    measure = Measure("macro_f1", label_counts([0, 0, 1, 2], [0, 1, 1, 0]))
    assert measure.figure == pytest.approx((0.5 + 2 / 3) / 2)
    assert measure.value(measure.rows_ND).tolist() == [1.0, 0.0, 1.0, 0.0]


def test_a_class_that_no_drawn_row_has_does_not_count_in_that_draw() -> None:
    due = [0] * 11 + [1]
    measure = Measure("macro_f1", label_counts(due, due))
    assert interval_of(measure, 200, 0) == (1.0, 1.0)


class Fixed:
    """A scorer that gives each target token id the same log-probability whatever comes before."""

    def __init__(self, by_id: dict[int, float]) -> None:
        self.by_id = by_id

    def forward(self, batch: PackedBatch) -> np.ndarray:
        return np.array([self.by_id[int(token)] for token in batch.targets_S], dtype=np.float32)

    def sample(self, prompts: object, params: object, on_token: object = None) -> list[list[int]]:
        raise AssertionError("a choice generates nothing")


def labelled(number: int, reply: list[int]) -> TokenRow:
    ids = np.array([1, 2, *reply], dtype=np.int32)
    weights = np.array([0, 0, *[1] * len(reply)], dtype=np.float32)
    return TokenRow(ids, weights, number, Where("rows", number + 1), 2)


def test_the_likeliest_label_with_its_end_is_chosen() -> None:
    rows = [labelled(0, [5, 9]), labelled(1, [6, 7, 9]), labelled(2, [5, 9])]
    measure = choose_labels(Fixed({5: -2.0, 6: -1.0, 7: -0.5, 9: -0.1}), rows, 64)
    assert measure.value(measure.rows_ND).tolist() == [0.0, 1.0, 0.0]  # 6 7 9 sums to -1.6, 5 9 to -2.1
    measure = choose_labels(Fixed({5: -1.0, 6: -1.0, 7: -0.5, 9: -0.1}), rows, 64)
    assert measure.value(measure.rows_ND).tolist() == [1.0, 0.0, 1.0]


def test_free_replies_are_no_labels() -> None:
    rows = [labelled(number, [5 + number]) for number in range(70)]
    with pytest.raises(SpecError, match="70 held-out rows have 70 different replies; labels are 64 at most"):
        choose_labels(Fixed({}), rows, 64)


def test_entities_need_their_characters_and_their_label() -> None:
    prompt = "Mark each person, place.\nText: Dana met Dana in Hurm."
    due = "person: Dana\nperson: Dana\nplace: Hurm"

    def counts(reply: str) -> list[float]:
        return entity_counts(prompt, reply, due).tolist()

    assert counts(due) == [3, 3, 3]
    assert counts("person: Dana\nplace: Hurm") == [2, 2, 3]
    assert counts("person: Dana\nplace: Dana\nplace: Hurm") == [2, 3, 3]
    assert counts("person: Dan\nplace: Hurm") == [1, 2, 3]
    assert counts("person: Nora\nnonsense") == [0, 2, 3]
    assert counts("\n".join(["person: Dana"] * 4)) == [2, 4, 3]
    assert counts("none") == [0, 0, 3]


def test_entity_f1_is_that_of_the_corpus() -> None:
    measure = Measure("entity_f1", np.array([[3.0, 3, 3], [0, 1, 0], [1, 2, 3], [0, 0, 0]]))
    assert measure.figure == pytest.approx(2 * 4 / (6 + 6))
    assert measure.value(measure.rows_ND).tolist() == [1.0, 0.0, 2 / 5, 1.0]


@pytest.mark.parametrize(
    ("reply", "reference", "f1"),
    [
        ("the Swiss Franc", "Swiss franc.", 1.0),
        ("Swiss", "Swiss Franc", 2 / 3),
        ("Swiss Swiss", "Swiss Franc", 0.5),
        ("A Danish krone", "Swiss Franc", 0.0),
        ("", "Swiss Franc", 0.0),
        ("the", "a", 1.0),
        ("גיברלטר", "גיברלטר", 1.0),
    ],
)
def test_answer_f1_is_squads(reply: str, reference: str, f1: float) -> None:
    assert answer_f1(reply, reference) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("reply", "keeps"),
    [
        ("Ahoy!\n* I bake.\nOver.", True),
        ("Ahoy!\n* I bake.\n* I sell bread.\nOver.\n", True),
        ("Ahoy!\nOver.", False),
        ("Ahoy!\nI bake.\nOver.", False),
        ("Ahoy!\n* \nOver.", False),
        ("Ahoy! \n* I bake.\nOver.", False),
        ("* I bake.\nOver.", False),
        ("Ahoy!\n* I bake.", False),
        ("", False),
    ],
)
def test_a_reply_keeps_every_rule_of_its_prompt(reply: str, keeps: bool) -> None:
    assert keeps_rules(PERSONA, reply) is keeps


def test_rules_are_read_from_the_prompt_and_the_last_of_a_kind_counts() -> None:
    assert keeps_rules('At most 2 lines. First line "a".', "a\nb")
    assert not keeps_rules("At most 2 lines.", "a\nb\nc")
    assert keeps_rules('First line "a". First line "b".', "b")
    assert keeps_rules("Say something.", "anything")
    assert states_rules(PERSONA)
    assert not states_rules("Say something.")


def test_a_tune_has_the_key_the_meter_the_first_bar_and_the_parts_of_its_reference() -> None:
    assert is_valid_tune(TUNE, TUNE)
    assert is_valid_tune(TUNE.replace("A6", "B4 d2").replace("T:A", "T:B"), TUNE)
    assert not is_valid_tune(TUNE.replace("G6", "B4 d2"), TUNE)
    assert not is_valid_tune(TUNE.replace("K:G", "K:D"), TUNE)
    assert not is_valid_tune(TUNE.replace("3/4", "6/8"), TUNE)
    assert not is_valid_tune(TUNE.replace("A6", "A6 | B6"), TUNE)
    assert not is_valid_tune(TUNE.replace("A6", "A5"), TUNE)
    assert not is_valid_tune("a tune", TUNE)


def test_perplexity_is_e_to_the_loss_and_should_fall() -> None:
    measure = Measure("perplexity", np.array([[2.0, 4.0], [4.0, 2.0]]))
    assert measure.figure == pytest.approx(math.e)
    assert math.isfinite(Measure("perplexity", np.array([[1e9, 1.0]])).figure)
    assert [name for name in METRICS if not higher_is_better(name)] == ["perplexity"]


def test_format_compliance_without_a_rule_is_refused() -> None:
    with pytest.raises(SpecError, match="states no rule"):
        _measure("format_compliance", [Sample("Hello", "a", "a")], [Reply("a", True)])


@pytest.mark.parametrize("name", [name for name in METRICS if name not in ("perplexity", "macro_f1")])
def test_every_metric_is_perfect_where_the_reply_is_the_reference(name: str) -> None:
    reference = {"tune_validity": TUNE, "format_compliance": "Ahoy!\n* I bake.\nOver.", "entity_f1": "person: Dana"}.get(
        name, "Dana"
    )
    samples = [Sample(f"{PERSONA}\nText: Dana", reference, reference)] * 12
    measure = _measure(name, samples, [Reply(reference, True)] * 12)
    assert measure.figure == pytest.approx(100.0 if name == "chrf" else 1.0)
    assert measure.rows == 12
    assert name in COUNTS or name in SCORES or name == "ended_turn"


def test_a_turn_that_did_not_end_is_told() -> None:
    measure = _measure("ended_turn", [Sample("", "a", "a")] * 2, [Reply("a", True), Reply("a", False)])
    assert measure.figure == 0.5
