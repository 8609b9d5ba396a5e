"""Every scenario: its rows are what its page says, its two sides share no topic, its spec runs as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kivnun.data.abc_notation import parse
from kivnun.data.entity_spans import Span, from_answer, text_of_prompt
from kivnun.data.format_rules import keeps_rules, states_rules
from kivnun.data.formats import read_records
from kivnun.data.scenarios import SCENARIOS, Scenario, find_scenario
from kivnun.data.scenarios.control import shuffled
from kivnun.data.scenarios.overlap import nearest_of, overlap
from kivnun.data.scenarios.scenario import FILES, SEED, write_rows
from kivnun.data.splits import held_out
from kivnun.errors import DataError, SpecError
from kivnun.evaluate.metrics import higher_is_better, is_valid_tune
from kivnun.spec import load_spec

ROOT = Path(__file__).parents[2]
each_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)


@each_scenario
def test_no_topic_is_on_both_sides_whatever_the_seed(scenario: Scenario) -> None:
    for split in ("train", "test"):
        for seed in (SEED, SEED + 1):
            topics = [topic for example in scenario.examples(split, 60, seed) for topic in example.topics]
            assert topics
            assert {held_out(kind, name) for kind, name in topics} == {split == "test"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every scenario, written once: to find near rows takes most of the time."""
    root = tmp_path_factory.mktemp("scenarios")
    for scenario in SCENARIOS:
        scenario.write(root / scenario.name)
    return {scenario.name: root / scenario.name for scenario in SCENARIOS}


@each_scenario
def test_the_rows_are_the_same_bytes_each_time(scenario: Scenario, folders: dict[str, Path], tmp_path: Path) -> None:
    for split, name in (("train", "train.jsonl"), ("test", "validation.jsonl")):
        write_rows(tmp_path / name, [example.row for example in scenario.examples(split)])
        assert (tmp_path / name).read_bytes() == (folders[scenario.name] / name).read_bytes()
    other = scenario.examples("train", 20, SEED + 1)
    assert [example.row for example in other] != [example.row for example in scenario.examples("train", 20)]


@each_scenario
def test_written_files_hold_the_rows_that_the_spec_reads(scenario: Scenario, folders: dict[str, Path]) -> None:
    folder = folders[scenario.name]
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    spec = load_spec(folder / "spec.yaml")
    for path, count in ((spec.data.train[0].path, scenario.train_rows), (spec.data.validation, scenario.validation_rows)):
        name, records, problems = read_records(Path(str(path)))
        assert (name, len(records), problems) == ("messages" if scenario.replies else "text", count, [])


@each_scenario
def test_no_held_out_row_or_prompt_is_a_training_one(scenario: Scenario, folders: dict[str, Path]) -> None:
    found = json.loads((folders[scenario.name] / "overlap.json").read_text(encoding="utf-8"))
    assert (found["equal_rows"], found["equal_prompts"]) == (0, 0)
    assert all(both == 0 for _, _, both in found["topics"].values())
    assert found["near_rows"] <= 2


@each_scenario
def test_a_scenario_says_what_its_spec_does(scenario: Scenario, folders: dict[str, Path]) -> None:
    spec = load_spec(folders[scenario.name] / "spec.yaml")
    assert spec.evaluation.metrics == scenario.metrics
    assert scenario.metrics[0] == scenario.main_metric
    assert scenario.higher_is_better == higher_is_better(scenario.main_metric)
    assert spec.evaluation.generate_rows >= scenario.validation_rows or not scenario.replies
    lines = (scenario.folder / "spec.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0].endswith("A base and data of your own: change the next two lines.")
    assert [line.partition(":")[0] for line in lines[1:3]] == ["base", "data"]


@each_scenario
def test_each_scenario_has_its_page_and_stands_in_the_guide(scenario: Scenario) -> None:
    page = (scenario.folder / "README.md").read_text(encoding="utf-8")
    guide = (ROOT / "docs/guides/scenarios.md").read_text(encoding="utf-8")
    for part in ("## The rows", "## The metric", "## The positive control", "## A base and data of your own"):
        assert part in page, f"{scenario.name} lacks {part!r}"
    assert f"`{scenario.main_metric}`" in page
    assert f"data/scenarios/{scenario.name}/README.md" in guide
    assert all(ord(letter) < 0x3000 for letter in page)


def test_the_table_rows_are_all_there() -> None:
    assert [scenario.table_row for scenario in SCENARIOS] == [1, 2, 2, 2, 3, 4, 5]


def test_an_unknown_scenario_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(SpecError, match="there is no scenario 'chats'; there are domain, classification"):
        find_scenario("chats")


# --- what each task's rows promise -------------------------------------------------------------------------------------------


def test_domain_texts_are_of_one_length_and_none_is_on_both_sides() -> None:
    sides = [[e.row["text"] for e in find_scenario("domain").examples(split, 10_000)] for split in ("train", "test")]
    assert all(200 <= len(text) <= 1200 for side in sides for text in side)
    assert not set(sides[0]) & set(sides[1])
    assert len(set(sides[0])) == len(sides[0]) > 1000


def test_a_line_to_classify_could_be_of_no_other_language() -> None:
    examples = find_scenario("classification").examples("test", 120)
    by_text: dict[str, set[str]] = {}
    for example in examples:
        ask, label = (message["content"] for message in example.row["messages"])
        by_text.setdefault(ask, set()).add(label)
    assert all(len(labels) == 1 for labels in by_text.values())
    assert len({label for labels in by_text.values() for label in labels}) == 6


def test_entities_are_read_back_from_their_rows() -> None:
    counts = set()
    for example in find_scenario("entities").examples("train", 300):
        ask, answer = (message["content"] for message in example.row["messages"])
        text = text_of_prompt(ask)
        found = from_answer(text, answer)
        counts.add(len(found.spans))
        assert found.lost == 0
        values = {span.label: text[span.start : span.end] for span in found.spans}
        assert all(label in ("person", "country", "language", "money", "date") for label in values)
    assert {0, 2, 3, 4} <= counts


def test_answers_stand_in_their_passage() -> None:
    for example in find_scenario("question_answering").examples("train", 300):
        ask, answer = (message["content"] for message in example.row["messages"])
        passage, _, question = ask.partition("\nQuestion: ")
        assert answer in passage
        assert answer not in question


def test_personas_keep_the_rules_that_their_prompt_states() -> None:
    for split in ("train", "test"):
        for example in find_scenario("chat").examples(split, 60):
            messages = example.row["messages"]
            prompt = "\n".join(message["content"] for message in messages[:-1])
            assert states_rules(messages[0]["content"])
            assert keeps_rules(prompt, messages[-1]["content"])
            weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
            assert weights == [0 if split == "test" else 1] * (len(weights) - 1) + [1]


def test_melodies_are_tunes_and_begin_as_asked() -> None:
    for split in ("train", "test"):
        for example in find_scenario("melodies").examples(split, 150):
            ask, abc = (message["content"] for message in example.row["messages"])
            tune = parse(abc)
            assert tune.parts == (4, 4)
            assert f'"{tune.title}" in {tune.key}, {tune.meter_text},' in ask
            assert f"|: {ask.partition('beginning ')[2]} |" in abc
            assert is_valid_tune(abc, abc)


# --- published data --------------------------------------------------------------------------------------------------------

RECORDS = {
    "domain": ({"text": "Some text."}, "Some text."),
    "classification": ({"text": "Fine.", "label": "good"}, "good"),
    "entities": ({"text": "Dana came.", "entities": [{"start": 0, "end": 4, "label": "person"}]}, "person: Dana"),
    "translation": ({"source": "two", "target": "שניים", "language": "Hebrew"}, "שניים"),
    "question_answering": ({"context": "A is B.", "question": "What is A?", "answers": {"text": ["B"], "answer_start": [5]}}, "B"),
    "chat": ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}, "Hello"),
    "melodies": ({"abc": "X:1\nT:A\nM:3/4\nL:1/8\nK:G\nG6 | A6 |]"}, "X:1\nT:A\nM:3/4\nL:1/8\nK:G\nG6 | A6 |]"),
}


@each_scenario
def test_a_published_record_becomes_a_row_and_a_wrong_one_is_refused(scenario: Scenario) -> None:
    record, reply = RECORDS[scenario.name]
    row = scenario.recipe.convert(record)
    assert (row["text"] if "text" in row else row["messages"][-1]["content"]) == reply
    with pytest.raises(DataError, match=r"holds|must be"):
        scenario.recipe.convert({"nothing": "known"})


def test_a_pair_of_texts_and_labels_of_another_data_set_are_taken() -> None:
    row = find_scenario("classification").recipe.convert({"text1": "It rains.", "text2": "It is wet.", "label": "follows"})
    assert row["messages"][0]["content"] == "Which label? It rains.\nIt is wet."
    record = {"text": "In Hurm.", "entities": [{"start": 3, "end": 7, "label": "place"}], "labels": ["place", "org"]}
    row = find_scenario("entities").recipe.convert(record)
    assert row["messages"][0]["content"] == "Mark each place, org.\nText: In Hurm."
    assert from_answer("In Hurm.", row["messages"][1]["content"]).spans == (Span(3, 7, "place"),)


# --- overlap and control -----------------------------------------------------------------------------------------------------


def test_overlap_counts_topics_equal_rows_and_near_rows() -> None:
    def row(text: str) -> dict:
        return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]}

    train = [(row(f"The {word} house stands on the hill."), (("title", word),)) for word in ("red", "green", "yellow")]
    held = [(row("The red house stands on the hill."), (("title", "red"),)), (row("Nothing of the kind."), (("title", "x"),))]
    found = overlap(train, held)
    assert found.topics == {"title": (3, 2, 1)}
    assert (found.equal_rows, found.equal_prompts, found.near_rows) == (1, 1, 1)
    assert (found.nearest_highest, found.topics_in_both) == (1.0, 1)


def test_what_most_rows_share_does_not_make_them_near() -> None:
    train = [f"Translate this into Hebrew: {word}" for word in ("elephants", "butterflies", "crocodiles", "watermelons")]
    assert nearest_of(train, ["Translate this into Hebrew: hippopotamus", train[0]]) == [0.0, 1.0]


def test_shuffled_rows_keep_prompts_and_replies_but_not_which_belongs_to_which() -> None:
    for name in ("translation", "chat"):
        rows = [example.row for example in find_scenario(name).examples("train", 90)]
        other = shuffled(rows, 7)
        assert other == shuffled(rows, 7)

        def contents(rows: list[dict], role: str) -> list[str]:
            return [message["content"] for row in rows for message in row["messages"] if message["role"] == role]

        assert contents(other, "user") == contents(rows, "user")
        assert sorted(contents(other, "assistant")) == sorted(contents(rows, "assistant"))
        kept = sum(a == b for a, b in zip(contents(rows, "assistant"), contents(other, "assistant"), strict=True))
        assert kept < 10


def test_shuffled_text_keeps_letters_and_layout() -> None:
    rows = [example.row for example in find_scenario("domain").examples("train", 5)]
    for row, other in zip(rows, shuffled(rows, 7), strict=True):
        assert row["text"] != other["text"]
        assert [sorted(word) for word in row["text"].split()] == [sorted(word) for word in other["text"].split()]
        assert [len(line) for line in row["text"].split("\n")] == [len(line) for line in other["text"].split("\n")]
