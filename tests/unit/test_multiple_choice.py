"""MC1 and MC2 by hand, and a TruthfulQA file beside transformers' own logits; what must not change them does not."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from kivnun.data.choices import ChoiceQuestion, read_choices
from kivnun.data.rows import Where
from kivnun.data.template import ChatTokenizer, load_tokenizer
from kivnun.errors import DataError
from kivnun.evaluate.multiple_choice import Choices, answer_log_probs, chat, mc1, mc2, plain_text
from kivnun.evaluate.truthfulqa import PRIMER, prompt_of, score_truthfulqa
from kivnun.model.load import load_base
from kivnun.train.engine import FixedModel, TorchEngine
from tiny_task import make_base

ROWS = (
    (
        "What happens if you put a spoon in cold soup?",
        "The spoon gets cold",
        "The spoon gets cold.; Nothing special happens",
        "The soup boils; The spoon melts; The soup turns into bread",
    ),
    (
        "Can a lighthouse walk, if nobody looks?",
        "No, a lighthouse cannot walk.",
        "No, a lighthouse cannot walk; Lighthouses stay where they are;",
        "Yes, at night; Yes, to the sea",
    ),
    ("מה צבעו של ענן?", "לבן", "לבן; אפור", "ירוק; סגול"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(base: Path) -> FixedModel:
    return TorchEngine(load_base(base, "fp32")).base_model()


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> ChatTokenizer:
    return load_tokenizer(base)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "questions.csv"
    with path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"])
        writer.writerows(("Invented", "Soup", *row, "nowhere") for row in ROWS)
    return path


def by_hand(folder: Path, question: str, answer: str, primer: str) -> float:
    """Return the answer's summed log-probability with transformers alone, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(folder)
    prompt = tokens(f"{primer}Q: {question}\nA:")["input_ids"]
    ids = tokens(f"{primer}Q: {question}\nA: {answer}")["input_ids"]
    assert ids[: len(prompt)] == prompt
    log_probs = tiny.reference_logits(model, ids).double().log_softmax(-1)
    return float(sum(log_probs[place - 1, ids[place]] for place in range(len(prompt), len(ids))))


def test_mc1_wants_the_best_answer_above_every_false_one() -> None:
    assert mc1(-3.0, np.array([-3.5, -9.0])) == 1.0
    assert mc1(-3.0, np.array([-9.0, -2.5])) == 0.0
    assert mc1(-3.0, np.array([-3.0])) == 0.0  # a tie is no answer


def test_mc2_is_the_share_of_the_true_answers() -> None:
    true, false = np.log([0.2, 0.1]), np.log([0.3, 0.4])
    assert mc2(true, false) == pytest.approx(0.3)
    assert mc2(true - 900, false - 900) == pytest.approx(0.3)  # where exp() gives 0
    assert mc2(np.array([-5.0]), np.array([-5.0, -5.0, -5.0])) == pytest.approx(0.25)


@pytest.mark.parametrize("primer", [PRIMER[-120:], ""], ids=["primer", "bare"])
def test_a_file_gets_what_transformers_logits_give(
    base: Path, model: FixedModel, tokenizer: ChatTokenizer, file: Path, primer: str
) -> None:
    asked = read_choices(file)
    found = score_truthfulqa(model, asked, tokenizer, 256, primer=primer)
    for number, (question, best, true, false) in enumerate(ROWS):
        answers = {part.strip().rstrip(".") + "." for text in (true, false) for part in text.split(";") if part.strip()}
        sums = {answer: by_hand(base, question, answer, primer) for answer in answers}
        assert found.answers[number] == pytest.approx(sums, abs=1e-3)
        wrong = [sums[part.strip() + "."] for part in false.split(";")]
        right = [value for answer, value in sums.items() if answer not in {part.strip() + "." for part in false.split(";")}]
        assert found.mc1_N[number] == float(sums[best.rstrip(".") + "."] > max(wrong))
        share = sum(map(math.exp, right)) / sum(map(math.exp, [*right, *wrong]))
        assert found.mc2_N[number] == pytest.approx(share, abs=1e-4)


def test_order_of_answers_and_of_questions_changes_nothing(model: FixedModel, tokenizer: ChatTokenizer, file: Path) -> None:
    asked = read_choices(file)
    turned = [
        ChoiceQuestion(q.question, q.category, q.best, q.rivals[::-1], q.true[::-1], q.false[::-1], q.where) for q in asked[::-1]
    ]
    one, other = (score_truthfulqa(model, part, tokenizer, 512, primer="") for part in (asked, turned))
    assert one.mc1_N.tolist() == other.mc1_N[::-1].tolist()
    assert one.mc2_N == pytest.approx(other.mc2_N[::-1], abs=1e-5)


def test_sharing_the_prompt_changes_nothing(model: FixedModel, tokenizer: ChatTokenizer, file: Path) -> None:
    asked = read_choices(file)
    shared, apart = (
        score_truthfulqa(model, asked, tokenizer, 600, primer=PRIMER[-150:], share_prefixes=share) for share in (True, False)
    )
    for one, other in zip(shared.answers, apart.answers, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


def test_a_chat_answer_is_weighed_with_its_end_marker(model: FixedModel, tokenizer: ChatTokenizer) -> None:
    asked = Choices("one 3", ("אחת 3", "שתיים"))
    sums = answer_log_probs(model, [asked], chat(tokenizer), 256)[0]
    for answer, value in zip(asked.answers, sums, strict=True):
        ids, prompt_len = chat(tokenizer)(asked.prompt, answer)
        assert ids[-1] in tokenizer.stop_ids
        assert ids[:prompt_len] == tokenizer.prompt_ids([{"role": "user", "content": asked.prompt}])
        logits = tiny.packed_logits(model._base, [ids])[0]
        expected = sum(logits.double().log_softmax(-1)[at - 1, ids[at]] for at in range(prompt_len, len(ids)))
        assert value == pytest.approx(float(expected), abs=1e-3)


def test_a_plain_answer_has_no_marker(tokenizer: ChatTokenizer) -> None:
    prompt = prompt_of("Is it?")
    ids, prompt_len = plain_text(tokenizer)(prompt, " It is.")
    assert tokenizer.decode(ids[prompt_len:]) == " It is."
    assert prompt.endswith("Barcelona, Spain.\n\nQ: Is it?\nA:")


# --- files -------------------------------------------------------------------------------------------------------------------


def test_the_csv_is_read_as_its_authors_read_it(file: Path) -> None:
    first, second, third = read_choices(file)
    assert first.best == "The spoon gets cold."
    assert first.true == ("The spoon gets cold.", "Nothing special happens.")
    assert first.false == first.rivals == ("The soup boils.", "The spoon melts.", "The soup turns into bread.")
    assert (first.category, first.where.line) == ("Soup", 2)
    assert second.true == ("No, a lighthouse cannot walk.", "Lighthouses stay where they are.")
    assert third.question == "מה צבעו של ענן?"


@pytest.mark.parametrize("as_pairs", [False, True], ids=["hub", "authors"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_targets_are_taken_as_they_are(tmp_path: Path, suffix: str, as_pairs: bool) -> None:
    def targets(true: list[str], false: list[str]) -> object:
        labelled = {**dict.fromkeys(true, 1), **dict.fromkeys(false, 0)}
        return labelled if as_pairs else {"choices": list(labelled), "labels": list(labelled.values())}

    row = {
        "question": "Is it?",
        "mc1_targets": targets(["It is"], ["No"]),
        "mc2_targets": targets(["It is", "Yes"], ["No", "Never"]),
    }
    path = tmp_path / f"q{suffix}"
    path.write_text(json.dumps([row]) if suffix == ".json" else json.dumps(row) + "\n", encoding="utf-8")
    (found,) = read_choices(path)
    assert (found.best, found.rivals, found.true, found.false) == ("It is", ("No",), ("It is", "Yes"), ("No", "Never"))


def test_the_hubs_generation_shape_is_read(tmp_path: Path) -> None:
    row = {"question": "Is it?", "best_answer": "It is", "correct_answers": ["It is", "Yes"], "incorrect_answers": ["No"]}
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert read_choices(path) == [
        ChoiceQuestion("Is it?", "", "It is.", ("No.",), ("It is.", "Yes."), ("No.",), Where(str(path), 1))
    ]


GOOD = {"question": "Is it?", "best_answer": "It is", "correct_answers": ["It is"], "incorrect_answers": ["No"]}
BAD_ROWS = [
    ({**GOOD, "question": " "}, "question must be a text that is not empty"),
    ({key: value for key, value in GOOD.items() if key != "best_answer"}, "best_answer is missing"),
    ({**GOOD, "best_answer": "Perhaps"}, "best_answer must be one of correct_answers"),
    ({**GOOD, "incorrect_answers": []}, "needs at least one true answer and one false one"),
    ({**GOOD, "incorrect_answers": ["It is."]}, "given as true and as false"),
    ({"question": "?", "mc1_targets": {"choices": ["a", "b"], "labels": [1]}}, "2 choices and 1 labels"),
    ({"question": "?", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 1]}}, "one answer with label 1, got 2"),
    ({"question": "?", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 2]}}, "label must be 0 or 1"),
    ({"question": "?", "mc1_targets": ["a"]}, "must be an object with choices and labels"),
]


@pytest.mark.parametrize(("row", "words"), BAD_ROWS, ids=[words for _, words in BAD_ROWS])
def test_a_broken_question_is_told_by_its_line(tmp_path: Path, row: object, words: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(row)}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_choices(path)
    (problem,) = caught.value.problems
    assert problem.line == 2
    assert words in problem.message
    assert caught.value.hint is not None


BAD_FILES = [
    ("q.csv", "Question,Best Answer\nx,y\n", 1, "lacks Correct Answers, Incorrect Answers"),
    ("q.csv", "Question,Best Answer,Correct Answers,Incorrect Answers\na,b,b,c\na,b,b,c,d\n", 3, "has 5 fields where"),
    ("q.csv", 'Question,Best Answer,Correct Answers,Incorrect Answers\n"a\nb",b,b,c\nd,,e,f\n', 4, "Best Answer must be"),
    ("q.csv", 'Question,Best Answer,Correct Answers,Incorrect Answers\na,"b"x,b,c\n', 2, "the CSV breaks off"),
    ("q.json", '[{"question": "a",\n}]', 2, "not valid JSON"),
    ("q.json", "[3]", 1, "must be an object"),
    ("q.json", '{"question": "a"}', 1, "must be a list of questions"),
    ("q.json", '{"a": 1}\n{"a": 2}\n', 2, "one object per line is .jsonl"),
]


@pytest.mark.parametrize(("name", "text", "line", "words"), BAD_FILES, ids=[case[3] for case in BAD_FILES])
def test_a_broken_file_is_told_by_its_line(tmp_path: Path, name: str, text: str, line: int, words: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_choices(path)
    assert [problem.line for problem in caught.value.problems] == [line]
    assert words in caught.value.problems[0].message


def test_a_file_that_is_empty_absent_or_not_utf8_is_refused(tmp_path: Path) -> None:
    empty, latin = tmp_path / "empty.json", tmp_path / "latin.csv"
    empty.write_text("[]", encoding="utf-8")
    latin.write_bytes("Question,Best Answer,Correct Answers,Incorrect Answers\nWer fällt?,a,a,b\n".encode("latin-1"))
    for path, words in ((empty, "holds no question"), (latin, "is not UTF-8"), (tmp_path / "none.csv", "cannot be read")):
        with pytest.raises((DataError, OSError), match=words):
            read_choices(path)
