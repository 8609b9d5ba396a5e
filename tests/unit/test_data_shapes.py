"""Every shape of rows becomes records by its rule, loses nothing, and is scored by the metric that is made for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kivnun.cli.data import FORMATS as CLI_FORMATS
from kivnun.data.entity_spans import as_answer, from_answer, text_of_prompt
from kivnun.data.entity_tags import text_and_spans
from kivnun.data.formats import FORMATS, read_records
from kivnun.data.rows import ChatRecord
from kivnun.data.scenarios import find_scenario
from kivnun.data.shapes import ALL_KEYS, SHAPES
from kivnun.data.task_shapes import CLASSIFY
from kivnun.errors import SpecError
from kivnun.evaluate.metrics import entity_counts, exact_match
from kivnun.spec.data import DataFormat, DataKey
from kivnun.spec.tune import OBJECTIVE_OF_FORMAT

SECRET = "zebrafish"


def read(folder: Path, *rows: Any, **options: Any) -> tuple[str, list[Any], list[str]]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    format, records, problems = read_records(path, **options)
    assert not any(SECRET in str(problem) for problem in problems)
    return format, records, [problem.message for problem in problems]


def turns(record: Any) -> list[tuple[str, str]]:
    assert isinstance(record, ChatRecord)
    return [(message["role"], message["content"]) for message in record.messages]


def one(folder: Path, row: Any, **options: Any) -> tuple[str, list[tuple[str, str]]]:
    format, records, problems = read(folder, row, **options)
    assert problems == []
    return format, turns(records[0])


def test_spec_command_and_objective_name_every_format() -> None:
    assert set(get_args(DataFormat)) == {"auto", *FORMATS} == set(CLI_FORMATS)
    assert set(get_args(DataKey)) == set(ALL_KEYS)
    assert set(OBJECTIVE_OF_FORMAT) == set(FORMATS)


@pytest.mark.parametrize(
    ("row", "format", "expected"),
    [
        ({"prompt": " p", "response": "r "}, "prompt_response", [("user", " p"), ("assistant", "r ")]),
        (
            {"system": "s", "prompt": "p", "response": ""},
            "prompt_response",
            [("system", "s"), ("user", "p"), ("assistant", "")],
        ),
        ({"instruction": "i", "input": "x", "output": "o"}, "instruction", [("user", "i\n\nx"), ("assistant", "o")]),
        ({"instruction": "i", "input": "", "output": "o"}, "instruction", [("user", "i"), ("assistant", "o")]),
        ({"instruction": "i", "output": "o"}, "instruction", [("user", "i"), ("assistant", "o")]),
        ({"instruction": "", "input": "x", "output": "o"}, "instruction", [("user", "x"), ("assistant", "o")]),
        ({"text": "t", "label": "pos"}, "classification", [("user", "Which label? t"), ("assistant", "pos")]),
        ({"text1": "t", "text2": "u", "label": 1}, "classification", [("user", "Which label? t\nu"), ("assistant", "1")]),
        ({"text1": "t", "text2": None, "label": True}, "classification", [("user", "Which label? t"), ("assistant", "true")]),
        ({"text": "t", "label": 4.5}, "classification", [("user", "Which label? t"), ("assistant", "4.5")]),
        (
            {"text": "Dan is in Haifa", "entities": [{"start": 10, "end": 15, "label": "city"}, [0, 3, "person"]]},
            "entities",
            [("user", "Mark each entity.\nText: Dan is in Haifa"), ("assistant", "person: Dan\ncity: Haifa")],
        ),
        (
            {"text": "no", "entities": [], "labels": ["city", "person"]},
            "entities",
            [("user", "Mark each city, person.\nText: no"), ("assistant", "none")],
        ),
        (
            {"tokens": ["Dan", "Bar", "in", "Tel", "Aviv"], "tags": ["B-person", "I-person", "O", "B-city", "I-city"]},
            "entities",
            [("user", "Mark each entity.\nText: Dan Bar in Tel Aviv"), ("assistant", "person: Dan Bar\ncity: Tel Aviv")],
        ),
        (
            {"question": "q?", "choices": ["a", "b"], "answer": 1},
            "multiple_choice",
            [("user", "q?\nOptions:\n- a\n- b"), ("assistant", "b")],
        ),
        (
            {"question": "q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
            "multiple_choice",
            [("user", "q?\nOptions:\n- x\n- y"), ("assistant", "y")],
        ),
        (
            {
                "id": "7",
                "system": "s",
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b", "weight": 0},
                    {"from": "tool", "value": "c"},
                    {"from": "gpt", "value": "d"},
                ],
            },
            "sharegpt",
            [("system", "s"), ("user", "a"), ("assistant", "b"), ("tool", "c"), ("assistant", "d")],
        ),
    ],
)
def test_a_row_becomes_its_conversation(tmp_path: Path, row: Any, format: str, expected: Any) -> None:
    assert one(tmp_path, row) == (format, expected)
    assert one(tmp_path, row, format=format) == (format, expected)


@pytest.mark.parametrize(
    ("answer", "reply"), [(0, "B"), (2, "x"), ("x", "x"), ("B", "B"), ("C", "x"), ("A", "B")], ids=lambda value: repr(value)
)
def test_an_answer_is_a_number_a_letter_or_a_text(tmp_path: Path, answer: Any, reply: str) -> None:
    choices = ["B", "y", "x"] if answer != "B" else ["y", "B", "x"]
    row = {"question": "q?", "choices": choices, "answer": answer}
    assert one(tmp_path, row)[1][-1] == ("assistant", reply)


def test_digits_in_a_csv_count_the_choices_and_are_refused_where_they_are_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    lines = ['"[""a"", ""b""]",1', '"[""a"", ""b""]",b', '"[""1"", ""2""]",1', '"[""0"", ""9""]",9', '"[a]",1']
    path.write_text("question,choices,answer\n" + "".join(f"q,{line}\n" for line in lines), encoding="utf-8")
    _, records, problems = read_records(path)
    assert [turns(record)[-1][1] for record in records] == ["b", "b", "9"]
    assert [problem.line for problem in problems] == [4, 6]
    assert "the text of one choice and the number of another" in problems[0].message
    assert "choices must be a list or an object, written as JSON" in problems[1].message


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "", "response": SECRET}, "prompt is empty"),
        ({"prompt": SECRET, "response": 3}, "response must be a string, got a number"),
        ({"instruction": "", "input": None, "output": SECRET}, "instruction and input are both empty"),
        ({"input": SECRET, "output": "o"}, "the key 'instruction' is missing"),
        ({"instruction": SECRET, "output": "o", "histroy": []}, "keys that would have no effect: 'histroy'"),
        ({"text": SECRET, "label": None}, "label must be a string, a number or a boolean, got null"),
        ({"text": SECRET, "label": ""}, "label is empty"),
        ({"text": SECRET, "label": " pos"}, "label has white space at an end"),
        ({"text": SECRET, "label": ["a"]}, "label must be a string, a number or a boolean, got a list"),
        ({"text": " ", "label": SECRET}, "text is empty: there is nothing to classify"),
        ({"text": "a", "text1": "b", "label": SECRET}, "unknown key 'text'"),
        ({"text2": SECRET, "label": "a"}, "the key 'text' is missing"),
        ({"text": SECRET, "entities": None}, "entities must be a list of objects with start, end"),
        ({"text": SECRET, "entities": [{"start": 0, "end": 99, "label": "x"}]}, "has the span 0 to 99, the text has 9"),
        ({"text": SECRET, "entities": [{"start": 0, "end": 1, "label": "a: b"}]}, "a label must be text without"),
        ({"text": SECRET, "entities": {"start": [0], "end": [], "label": []}}, "entities must be a list"),
        ({"text": SECRET, "entities": [[0, 1, "x"]], "labels": ["y"]}, "1 labels of entities are not among labels"),
        ({"text": SECRET, "entities": [], "labels": [3]}, "labels must be a list of strings"),
        ({"text": "", "entities": []}, "the text is empty"),
        ({"text": SECRET, "tokens": ["a"], "tags": ["O"]}, "no effect"),
        ({"tokens": [SECRET]}, "the key 'tags' is missing"),
        ({"tokens": [SECRET], "tags": ["O", "O"]}, "1 tokens and 2 tags"),
        ({"tokens": [SECRET], "tags": [1]}, "tags must be a list of strings"),
        ({"tokens": [SECRET], "tags": ["I-x"]}, "tags[0] is I- of an entity that was not begun"),
        ({"tokens": [SECRET, "b"], "tags": ["B-x", "I-y"]}, "tags[1] is I- of an entity that was not begun"),
        ({"tokens": [SECRET, "b"], "tags": ["B-x", "E-x"]}, "tags[1] must be O, or B- or I- before a label"),
        ({"tokens": [SECRET], "tags": ["B-"]}, "tags[0] must be O"),
        ({"tokens": ["", SECRET], "tags": ["O", "O"]}, "tokens[0] is empty"),
        ({"question": SECRET, "choices": ["a"], "answer": 0}, "choices must be at least two, got 1"),
        ({"question": SECRET, "choices": ["a", "a"], "answer": 0}, "two choices are the same"),
        ({"question": SECRET, "choices": ["a", "b"], "answer": 2}, "answer must be from 0 to 1"),
        ({"question": SECRET, "choices": ["a", "b"], "answer": -1}, "answer must be from 0 to 1"),
        ({"question": SECRET, "choices": ["a", "b"], "answer": True}, "answer must be the number"),
        ({"question": SECRET, "choices": ["a", "b"], "answer": "zebrafish "}, "neither the text nor the letter of a choice"),
        ({"question": SECRET, "choices": ["B", "x"], "answer": "B"}, "the text of one choice and the name of another"),
        ({"question": SECRET, "choices": ["a", None], "answer": 0}, "choices[1] must be a string"),
        ({"question": SECRET, "choices": {"text": ["a", "b"], "label": ["1"]}, "answerKey": "1"}, "must name each choice"),
        ({"question": SECRET, "choices": "a,b", "answer": 0}, "choices must be a list"),
        ({"question": SECRET, "choices": ["a", "b"]}, "the key 'answer' is missing"),
        ({"question": " ", "choices": ["a", SECRET], "answer": 0}, "question is empty"),
        ({"conversations": []}, "conversations is empty"),
        ({"conversations": SECRET}, "conversations must be a list, got a string"),
        ({"conversations": [SECRET]}, "conversations[0] must be an object"),
        ({"conversations": [{"from": "humann", "value": SECRET}]}, "did you mean 'human'"),
        ({"conversations": [{"from": "human", "value": SECRET}]}, "there is nothing to train"),
        (
            {"conversations": [{"from": "gpt", "value": SECRET}, {"from": "human", "value": "a"}]},
            "the last message must be the assistant's",
        ),
        ({"conversations": [{"from": "gpt", "value": None}]}, "conversations[0].value must be a string, got null"),
        ({"conversations": [{"from": "gpt", "value": SECRET, "weight": 2}]}, "weight must be 0"),
        (
            {"conversations": [{"from": "human", "value": SECRET, "weight": 1}, {"from": "gpt", "value": ""}]},
            "for gpt's turns only",
        ),
        ({"conversations": [{"from": "gpt", "value": SECRET, "image": "x"}]}, "no effect in conversations[0]: 'image'"),
        ({"conversations": [{"role": "user", "content": SECRET}]}, "these are messages"),
        ({"conversations": [{"from": "gpt", "value": SECRET}], "images": ["x.png"]}, "no effect: 'images'"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": SECRET}}]},
                    {"role": "assistant", "content": "a"},
                ]
            },
            "messages[0].content[0] is an image, which cannot be trained",
        ),
    ],
)
def test_a_broken_row_is_a_problem_in_words_that_tell_no_content(tmp_path: Path, row: Any, words: str) -> None:
    _, records, problems = read(tmp_path, row)
    assert records == []
    assert any(words in problem for problem in problems), problems


@pytest.mark.parametrize("name", ["classification", "entities"])
def test_rows_read_directly_are_those_that_the_scenario_converts(tmp_path: Path, name: str) -> None:
    rows: list[dict[str, Any]] = (
        [{"text": "a b", "label": "x"}, {"text1": "a", "text2": "b", "label": "y"}]
        if name == "classification"
        else [{"text": "Dan, Dan", "entities": [{"start": 5, "end": 8, "label": "person"}], "labels": ["person", "city"]}]
    )
    _, records, problems = read(tmp_path, *rows)
    assert problems == []
    convert = find_scenario(name).recipe.convert
    assert [list(record.messages) for record in records] == [convert(row)["messages"] for row in rows]


def test_the_question_of_a_spec_stands_before_each_text(tmp_path: Path) -> None:
    ask = "What is the mood?"
    assert one(tmp_path, {"text": "t", "label": "x"}, instruction=ask)[1][0] == ("user", "What is the mood? t")
    assert one(tmp_path, {"text": "t", "label": "x"}, instruction=ask + "\n")[1][0] == ("user", "What is the mood?\nt")
    row = {"text": "t", "entities": [], "labels": ["x"]}
    assert one(tmp_path, row, instruction="Mark places.")[1][0] == ("user", "Mark places.\nText: t")
    row = {"question": "q?", "choices": ["a", "b"], "answer": 0}
    assert one(tmp_path, row, instruction="Choose.")[1][0] == ("user", "Choose.\nq?\nOptions:\n- a\n- b")
    with pytest.raises(SpecError, match="asked of rows of the formats multiple_choice, entities, classification"):
        read(tmp_path, {"text": "t"}, instruction=ask)
    with pytest.raises(SpecError, match="these rows are messages"):
        read(tmp_path, {"text": "t"}, instruction=ask, format="messages")
    assert "which begins the text itself" in read(tmp_path, {"text": "t", "entities": []}, instruction="Text: what?")[2][0]


def test_the_metric_of_entities_reads_these_rows(tmp_path: Path) -> None:
    row = {"tokens": ["May", "met", "May", "in", "May"], "tags": ["B-person", "O", "B-person", "O", "B-month"]}
    (_, prompt), (_, reply) = one(tmp_path, row)[1]
    assert text_of_prompt(prompt) == "May met May in May"
    assert entity_counts(prompt, reply, reply).tolist() == [3, 3, 3]
    assert entity_counts(prompt, "person: May", reply).tolist() == [1, 1, 3]
    assert exact_match(reply, reply)


WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc", "Z")), min_size=1, max_size=5).filter(
    lambda word: word == word.strip()
)
TAGS = st.sampled_from(["O", "B-a", "B-b", "I"])


@given(st.lists(st.tuples(WORDS, TAGS), min_size=1, max_size=8))
def test_tags_come_back_from_the_reply_as_they_were(pairs: list[tuple[str, str]]) -> None:
    tags: list[str] = []
    for _, tag in pairs:
        before = tags[-1] if tags else "O"
        tags.append(tag if tag != "I" else "O" if before == "O" else f"I-{before[2:]}")
    tokens = [word for word, _ in pairs]
    complaints: list[str] = []
    found = text_and_spans(tokens, tags, complaints.append)
    assert found is not None
    assert complaints == []
    text, spans = found
    assert text.split(" ") == tokens
    again: list[str] = []
    at = 0
    for token in tokens:
        span = next((span for span in spans if span.start <= at < span.end), None)
        again.append("O" if span is None else f"{'B' if span.start == at else 'I'}-{span.label}")
        at += len(token) + 1
    assert again == tags
    assert list(from_answer(text, as_answer(text, spans)).spans) == spans


def test_one_file_holds_one_shape(tmp_path: Path) -> None:
    format, records, problems = read(tmp_path, {"text": "a", "label": "b"}, {"text": "a"}, {"prompt": "a", "response": "b"})
    assert (format, len(records)) == ("classification", 1)
    assert [problem.split(",")[0] for problem in problems] == [
        "the row's keys are those of text",
        "the row's keys are those of prompt_response",
    ]


def test_every_shape_is_told_by_its_own_example() -> None:
    assert CLASSIFY == "Which label?"
    for shape in SHAPES.values():
        assert shape.signs
        assert all(sign in shape.keys for sign in shape.signs)
        for variant in shape.variants:
            told = next(other.name for other in SHAPES.values() if any(sign in variant.needs for sign in other.signs))
            assert told == shape.name
