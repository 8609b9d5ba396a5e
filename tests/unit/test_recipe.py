"""The built-in base's corpus: what is held out is not in it, and every row can be made again."""

from __future__ import annotations

import re

import pytest

from kivnun.data.scenarios.cldr import rows
from kivnun.data.scenarios.draws import Draws
from kivnun.data.splits import held_out
from recipes.tiny_phi import cldr_text, corpus, entities, melodies
from recipes.tiny_phi.chat import render_chat
from recipes.tiny_phi.corpus import END_OF_TEXT, makers, pack_rows
from recipes.tiny_phi.evaluate import entity_f1, first_turn, valid_bars
from recipes.tiny_phi.leaks import find_held_out
from recipes.tiny_phi.tokenizer import SPECIAL, train_tokenizer
from recipes.tiny_phi.words import Words, load_words

DOCUMENTED = [
    ("json", "json.dumps(obj)\nSerialize the object to a string and return it."),
    ("os", "os.getcwd()\nReturn the current working directory."),
    ("re", "re.compile(pattern)\nCompile a pattern and give the result."),
    ("csv", "csv.reader(file)\nIterate over the lines of a file that holds comma separated values."),
    ("math", "math.sqrt(x)\nReturn the square root of the number."),
]


@pytest.fixture(scope="module")
def words() -> Words:
    return load_words([text for _, text in DOCUMENTED])


@pytest.mark.parametrize("source", list(corpus.TOKENS))
def test_no_source_shows_what_the_demo_is_tested_on(source: str, words: Words) -> None:
    make = makers(words, DOCUMENTED)[source]
    for number in range(150):
        assert_only_safe_leaks(make(Draws(7, f"train.{source}", number)))


def assert_only_safe_leaks(text: str) -> None:
    """`12 kilometer-per-hour` is read as `12 kilometer` too: the corpus leaves such documents out, though harmless."""
    assert all(re.search(rf"{topic.split()[0]} kilometer-per", text) for kind, topic in find_held_out(text))


def test_the_scan_finds_every_value_of_the_demos_test_rows() -> None:
    for row in rows("test", 200, 7):
        for message in row["messages"]:
            assert find_held_out(message["content"]), message["content"]


def test_the_scan_lets_the_training_side_pass() -> None:
    for row in rows("train", 200, 7):
        for message in row["messages"]:
            assert not find_held_out(message["content"]), message["content"]


def test_no_document_shows_a_value_in_english_and_in_hebrew() -> None:
    for number in range(400):
        text = cldr_text.parallel(Draws(7, "test", number))
        assert not ({"en", "he"} <= set(re.findall(r"^(\w\w): ", text, re.MULTILINE)))


def test_a_document_is_a_function_of_its_number(words: Words) -> None:
    for make in makers(words, DOCUMENTED).values():
        assert make(Draws(7, "again", 3)) == make(Draws(7, "again", 3))
        assert len({make(Draws(7, "again", number)) for number in range(20)}) > 1


def test_people_and_countries_are_of_the_training_side(words: Words) -> None:
    draws = Draws(1, "people")
    assert not any(held_out("person", words.person(draws)) for _ in range(500))
    assert not any(held_out("territory", code) for code, _ in words.territories["en"])
    assert 200 < len(words.territories["en"]) < 260


def test_entities_are_in_the_sentence_they_come_from(words: Words) -> None:
    for number in range(300):
        text, found = entities.sentence(Draws(2, "entities", number), words)
        assert all(name in text for _, name in found)


def test_every_bar_of_every_tune_lasts_as_long_as_its_meter(words: Words) -> None:
    for number in range(200):
        draws = Draws(3, "tunes", number)
        key, meter = melodies.key_and_meter(draws)
        text = f"M:{meter}\nK:{key}\n" + "\n".join(melodies.tune(draws, key, meter))
        assert valid_bars(text, "") == 1.0, text
        assert not held_out("melody", f"{key} {meter}")


def test_a_tune_with_a_broken_bar_is_found_out() -> None:
    assert valid_bars("M:3/4\nK:C\nC2 D2 E2 | C2 D2 | E6 |]", "") == pytest.approx(2 / 3)


def test_rows_hold_as_many_documents_as_fit() -> None:
    packed = list(pack_rows([("a", 100), ("b", 154), ("c", 1), ("d", 255)]))
    assert packed == [(f"a{END_OF_TEXT}b", 255), ("c", 1), ("d", 255)]


def test_digits_are_single_tokens_and_markers_are_one_token_each() -> None:
    tokenizer = train_tokenizer(texts_enough_for_a_vocabulary())
    assert tokenizer.encode("2024").tokens == list("2024")
    text = render_chat([("user", "a"), ("assistant", "b")])
    assert [token for token in tokenizer.encode(text).tokens if token in SPECIAL] == [
        "<|user|>",
        "<|end|>",
        "<|assistant|>",
        "<|end|>",
    ]
    assert tokenizer.decode(tokenizer.encode("שלום, 12 ק״מ!").ids) == "שלום, 12 ק״מ!"


def test_first_turn_splits_a_document_before_its_first_reply() -> None:
    question = first_turn(render_chat([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]))
    assert (question.prompt, question.reply) == ("<|user|>a<|end|><|assistant|>", "b")


def test_entity_f1_counts_whole_lines() -> None:
    assert entity_f1("person: Ada\nplace: Rome", "person: Ada\nplace: Paris") == 0.5
    assert entity_f1("none", "none") == 1.0


def texts_enough_for_a_vocabulary() -> list[str]:
    draws = Draws(5, "vocabulary")
    stock = load_words([text for _, text in DOCUMENTED])
    return [" ".join(stock.pseudo(draws) for _ in range(50)) for _ in range(200)]
