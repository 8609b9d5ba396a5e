"""Every kind of file holds the same rows: JSONL, JSON, CSV, TSV, Parquet, Hugging Face datasets, and what gzip packs."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kivnun.data import json_list
from kivnun.data.formats import RecordStream, read_records, stream_records
from kivnun.data.rows import ChatRecord, PreferenceRecord, TextRecord
from kivnun.errors import DataError, KivnunError, RowProblem, SpecError, StorageError
from kivnun.spec import parse_spec

Rows = list[dict[str, Any]]

TASKS: Rows = [
    {"instruction": 'Translate, "please"', "input": "two\ndays", "output": "יומיים"},
    {"instruction": "Say hello", "input": "", "output": "שלום, עולם"},
    {"instruction": "A tab\tand a comma, here", "input": "\u2028 odd \u00a0 space ", "output": "'quoted'\r\nlines"},
]


def jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def listed(path: Path, rows: Rows) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8-sig")
    return path


def below_data(path: Path, rows: Rows) -> Path:
    path.write_text(json.dumps({"data": rows}), encoding="utf-8")
    return path


def table(path: Path, rows: Rows) -> Path:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def parquet(path: Path, rows: Rows, **more: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **more)
    return path


def saved(path: Path, rows: Rows, features: Any = None) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(path))
    return path


def packed(write: Callable[[Path, Rows], Path]) -> Callable[[Path, Rows], Path]:
    def written(path: Path, rows: Rows) -> Path:
        plain = write(path.with_suffix(""), rows)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        return path

    return written


KINDS = {
    "rows.jsonl": jsonl,
    "rows.json": listed,
    "rows.JSON": below_data,
    "rows.csv": table,
    "rows.tsv": table,
    "rows.parquet": parquet,
    "rows": saved,
    "rows.jsonl.gz": packed(jsonl),
    "rows.json.gz": packed(listed),
    "rows.csv.gz": packed(table),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, name: str) -> None:
    format, records, problems = read_records(KINDS[name](tmp_path / name, TASKS))
    assert (format, problems) == ("instruction", [])
    turns = [[message["content"] for message in record.messages] for record in records if isinstance(record, ChatRecord)]
    assert turns == [["\n\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]] for row in TASKS]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows"])
def test_lists_and_objects_come_through_every_kind_that_has_them(tmp_path: Path, name: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    rows: Rows = [
        {"messages": [{"role": "user", "content": "שלום"}, {"role": "assistant", "content": "hi", "weight": 1}], "tools": None},
        {
            "messages": [
                {"role": "user", "content": "Sun?"},
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c", "content": "yes"},
                {"role": "assistant", "content": "Yes."},
            ],
            "tools": [tool],
        },
    ]
    _, records, problems = read_records(KINDS[name](tmp_path / name, rows))
    assert problems == []
    assert [record.tools for record in records if isinstance(record, ChatRecord)] == [None, (tool,)]
    assert list(records[0].messages) == rows[0]["messages"]  # type: ignore[union-attr]
    assert records[1].messages[1] == {"role": "assistant", "content": None, "tool_calls": [call]}  # type: ignore[union-attr]


def test_a_stream_gives_records_and_problems_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": 3}\n\n{"text": "a"}\n{\n{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    stream = stream_records(path)
    assert isinstance(stream, RecordStream)
    assert stream.format == "unknown"
    said: list[tuple[str, int, str]] = []
    for item in stream:
        line = item.line if isinstance(item, RowProblem) else item.where.line
        said.append((type(item).__name__, line, stream.format))
    kinds = [("RowProblem", 1), ("TextRecord", 3), ("RowProblem", 4), ("RowProblem", 5)]
    assert said == [(kind, line, "text") for kind, line in kinds]
    assert len(list(stream)) == 4, "a stream may be read again"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_a_stream_holds_a_row_and_not_the_file(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"{number} " + "word " * 2000} for number in range(1500)]
    path = KINDS[name](tmp_path / name, rows)
    next(iter(stream_records(path)))  # what is imported once is not counted
    tracemalloc.start()
    try:
        assert sum(isinstance(item, TextRecord) for item in stream_records(path)) == len(rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * 2**20, f"{peak:,} bytes for a file of {sum(len(row['text']) for row in rows):,}"


def test_a_csv_row_is_named_by_the_line_it_begins_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'text,label\n"one\ntwo\n\nthree",a\n\nfour,b\n"fi\r\nve",\nsix\nseven,c,d\n')
    _, records, problems = read_records(path)
    assert [record.where.line for record in records] == [2, 7]
    assert [problem.line for problem in problems] == [8, 10, 11]
    assert "label is empty" in problems[0].message
    assert "has 1 of the 2 fields that the first line names" in problems[1].message
    assert "has 3 of the 2 fields" in problems[2].message


def test_rows_of_a_list_are_numbered_by_their_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"text": "a"}, 7, {"text": "b", "text": "c"}, {"text": 3},\n{"text": "]}[{\\"\\\\"}]', encoding="utf-8")
    _, records, problems = read_records(path)
    assert [(record.where.line, record.text) for record in records if isinstance(record, TextRecord)] == [(1, "a"), (5, ']}[{"\\')]
    assert [problem.line for problem in problems] == [2, 3, 4]


TEXTS = st.lists(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1), min_size=1, max_size=5)
TRICKY = st.sampled_from(['\\"[{', "\\", "\\\\", '"', "]}", "é" * 9, ",:"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=TEXTS,
    tricky=TRICKY,
    piece=st.integers(1, 40),
    indent=st.sampled_from([None, 1]),
    ascii=st.booleans(),
    below=st.booleans(),
)
def test_a_list_is_read_as_json_reads_it_wherever_the_pieces_of_the_file_end(
    tmp_path: Path, texts: list[str], tricky: str, piece: int, indent: int | None, ascii: bool, below: bool
) -> None:
    rows = [{"text": text + tricky} for text in texts]
    path = tmp_path / "rows.json"
    whole = json.dumps({"data": rows} if below else rows, indent=indent, ensure_ascii=ascii)
    path.write_text(whole, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "CHUNK", piece)
        _, records, problems = read_records(path)
    assert problems == []
    assert [record.text for record in records if isinstance(record, TextRecord)] == [row["text"] for row in rows]


def test_a_list_with_a_row_over_the_limit_goes_on_after_it(tmp_path: Path) -> None:
    path = listed(tmp_path / "rows.json", [{"text": "a"}, {"text": "b" * (16 * 2**20)}, {"text": "c"}])
    _, records, problems = read_records(path)
    assert [record.where.line for record in records] == [1, 3]
    assert [(problem.line, problem.message) for problem in problems] == [(2, "is longer than 16 MiB")]


def test_columns_that_no_key_takes_are_named_in_a_note(tmp_path: Path) -> None:
    rows = [{"id": 1, "text": "a", "label": "x", "day": "Monday"}, {"id": 2, "text": "b", "label": "y", "day": ""}]
    for name in ("rows.csv", "rows.parquet", "rows"):
        stream = stream_records(KINDS[name](tmp_path / name, rows))
        assert len(list(stream)) == 2
        assert stream.format == "classification"
        assert stream.notes == (f"{name}: columns not used: id, day",)


def test_the_format_asked_for_decides_which_columns_are_taken(tmp_path: Path) -> None:
    stream = stream_records(table(tmp_path / "rows.csv", [{"text": "a", "label": "x"}]), "text")
    assert [item.text for item in stream if isinstance(item, TextRecord)] == ["a"]
    assert stream.notes == ("rows.csv: columns not used: label",)


def test_columns_map_the_keys_of_a_format_to_those_of_a_file(tmp_path: Path) -> None:
    rows = [{"review": "fine", "stars": "5", "text": "", "label": ""}]
    for name in ("rows.csv", "rows.parquet"):
        stream = stream_records(KINDS[name](tmp_path / name, rows), columns={"text": "review", "label": "stars"})
        (record,) = stream
        assert isinstance(record, ChatRecord)
        assert [message["content"] for message in record.messages] == ["Which label? fine", "5"]
        assert stream.notes == (f"{name}: columns not used: text, label",)
    path = jsonl(tmp_path / "rows.jsonl", [{"review": "fine", "stars": 5}, {"review": "bad"}, {"review": "x", "stars": 1, "id": 3}])
    format, records, problems = read_records(path, columns={"text": "review", "label": "stars"})
    assert (format, len(records)) == ("classification", 1)
    assert [problem.line for problem in problems] == [2, 2, 3]
    assert "the key 'stars', which data.columns gives for label, is missing" in problems[0].message
    assert "no effect: 'id'" in problems[2].message


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"label": "star"}, "no column 'star', which data.columns gives for label; did you mean 'stars'"),
        ({"lable": "stars"}, "no format has the key 'lable'; did you mean 'label'"),
        ({"text": "stars", "label": "stars"}, "gives the column 'stars' to two keys"),
        ({"completion": "stars"}, "gives completion the column 'stars', but rows of the format text have no such key"),
    ],
)
def test_columns_that_fit_nothing_are_refused(tmp_path: Path, columns: dict[str, str], words: str) -> None:
    with pytest.raises(KivnunError, match=words):
        read_records(table(tmp_path / "rows.csv", [{"text": "a", "stars": "1"}]), columns=columns)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("text,lable", "are not those of the format classification, which needs text, label or text1, label"),
        ("text,label,text", "names 'text' more than once"),
        ("messages,images", "images, sound or video, which are not read"),
    ],
)
def test_a_heading_that_cannot_be_used_is_refused_before_the_rows(tmp_path: Path, head: str, words: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"{head}\na,b,c\n", encoding="utf-8")
    with pytest.raises(DataError, match=words):
        read_records(path, "classification" if "label" in head or "lable" in head else "auto")


def test_near_names_of_columns_and_other_separators_are_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text;label\na;b\n", encoding="utf-8")
    with pytest.raises(DataError, match="the first line has semicolons"):
        read_records(path)
    path.write_text("instruction,outputs\na,b\n", encoding="utf-8")
    with pytest.raises(DataError, match="'outputs' is near 'output'"):
        read_records(path)


def test_class_labels_come_out_as_their_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["רע", "טוב"]),
        }
    )
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": -1}, {"text": "d", "label": None}]
    folder = saved(tmp_path / "rows", rows, features)
    datasets.load_from_disk(str(folder)).to_parquet(tmp_path / "rows.parquet")
    for path in (folder, tmp_path / "rows.parquet"):
        _, records, problems = read_records(path)
        assert [record.messages[-1]["content"] for record in records if isinstance(record, ChatRecord)] == ["טוב", "רע"]
        assert [(problem.line, problem.message[:20]) for problem in problems] == [
            (3, "'label' holds -1, wh"),
            (4, "label must be a stri"),
        ]


def test_class_labels_in_lists_and_old_lists_of_objects_are_read(tmp_path: Path) -> None:
    import datasets

    tags = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "tags": datasets.List(datasets.ClassLabel(names=["O", "B-x", "I-x"]))}
    )
    (record,) = read_records(saved(tmp_path / "tags", [{"tokens": ["to", "Tel", "Aviv"], "tags": [0, 1, 2]}], tags))[1]
    assert isinstance(record, ChatRecord)
    assert record.messages[-1]["content"] == "x: Tel Aviv"
    spans = pa.Table.from_pylist([{"text": "to Haifa", "entities": {"start": [3], "end": [8], "label": ["place"]}}])
    pq.write_table(spans, tmp_path / "rows.parquet")
    (record,) = read_records(tmp_path / "rows.parquet")[1]
    assert isinstance(record, ChatRecord)
    assert record.messages[-1]["content"] == "place: Haifa"


def test_a_preference_is_read_from_a_table(tmp_path: Path) -> None:
    rows = [{"prompt": "Two and two?", "chosen": "Four.", "rejected": "Five.", "score": 0.5}]
    (record,) = read_records(parquet(tmp_path / "rows.parquet", rows))[1]
    assert record == PreferenceRecord("Two and two?", "Four.", "Five.", record.where)


def test_values_that_json_cannot_say_are_problems_of_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a", "b", "c\0", None], "label": [1.5, float("nan"), 2.0, 1.0]}), path)
    _, records, problems = read_records(path)
    assert [record.messages[-1]["content"] for record in records if isinstance(record, ChatRecord)] == ["1.5"]
    assert [problem.line for problem in problems] == [2, 3, 4]
    assert "NaN" in problems[0].message
    assert "NUL" in problems[1].message
    assert "text must be a string, got null" in problems[2].message


def test_text_that_is_not_utf_8_in_parquet_is_a_problem_of_its_row(tmp_path: Path) -> None:
    raw = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "rows.parquet")
    _, records, problems = read_records(tmp_path / "rows.parquet")
    assert [record.where.line for record in records] == [1, 3]
    assert [problem.line for problem in problems] == [2]


@pytest.mark.parametrize(
    "values",
    [pa.array([1, 2], pa.timestamp("us")), pa.array([b"a", b"b"]), pa.array([[(b"a", 1)], []], pa.map_(pa.binary(), pa.int8()))],
)
def test_columns_of_other_types_are_refused_only_where_they_are_used(tmp_path: Path, values: Any) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "more": values}), tmp_path / "rows.parquet")
    assert len(read_records(tmp_path / "rows.parquet")[1]) == 2
    with pytest.raises(DataError, match="the column 'more' is of the type"):
        read_records(tmp_path / "rows.parquet", columns={"text": "more"})


def test_rows_of_several_row_groups_are_numbered_through(tmp_path: Path) -> None:
    path = parquet(tmp_path / "rows.parquet", [{"text": str(number)} for number in range(1000)], row_group_size=7)
    assert [record.where.line for record in read_records(path)[1]] == list(range(1, 1001))


def test_splits_of_a_saved_dataset_are_named_where_one_must_be_chosen(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    one = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(DataError, match="the splits test, train"):
        read_records(tmp_path / "rows")
    assert len(read_records(tmp_path / "rows" / "train")[1]) == 1


def test_a_dataset_that_is_streamed_is_read_like_a_saved_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    path = parquet(tmp_path / "rows.parquet", [{"text": str(number), "label": "x"} for number in range(600)])
    asked: dict[str, Any] = {}

    def load_dataset(*name: str, **more: Any) -> Any:
        asked.update(more, name=name)
        return loaded("parquet", data_files=str(path), split="train", streaming=True, cache_dir=str(tmp_path / "cache"))

    loaded = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    stream = stream_records(Path("hf://org/name@v1/plain#test"))
    records = list(stream)
    assert asked == {"name": ("org/name", "plain"), "split": "test", "revision": "v1", "streaming": True}
    assert [record.where.line for record in records if isinstance(record, ChatRecord)] == list(range(1, 601))
    assert isinstance(records[0], ChatRecord)
    assert str(records[0].where) == "hf://org/name@v1/plain#test:1"


def test_a_hub_that_cannot_be_reached_and_a_name_that_is_none_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises((DataError, StorageError), match="hf://no-such-org/no-such-data"):
        read_records(Path("hf://no-such-org/no-such-data"))
    with pytest.raises(DataError, match="ORG/NAME"):
        read_records(Path("hf://lonely"))


def test_a_missing_library_is_told_with_what_to_install(tmp_path: Path) -> None:
    path = parquet(tmp_path / "rows.parquet", [{"text": "a"}])
    script = (
        "import sys; sys.modules['pyarrow.parquet'] = sys.modules['pyarrow'] = None\n"
        "from pathlib import Path\nfrom kivnun.data.formats import read_records\n"
        f"read_records(Path({str(path)!r}))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "reading this data needs pyarrow, which is not installed" in ended.stderr
    assert "pip install 'kivnun[data]'" in ended.stderr


def test_reading_text_files_loads_no_table_library(tmp_path: Path) -> None:
    names = ("rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz")
    paths = [str(KINDS[name](tmp_path / name, TASKS)) for name in names]
    script = (
        f"from pathlib import Path\nfrom kivnun.data.formats import read_records\nfor path in {paths!r}: read_records(Path(path))\n"
        "import sys; sys.exit(bool({'pyarrow', 'datasets', 'pandas', 'torch', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_a_spec_names_files_of_every_kind_and_reads_back_equal(tmp_path: Path) -> None:
    text = (
        "version: 1\nbase: kivnun/tiny-phi\ndata:\n  train: [rows.csv, 'hf://org/name#train']\n  validation: 'hf://org/name#test'\n"
        "  columns: {text: review, label: stars}\n  instruction: How many stars?\n"
    )
    spec = parse_spec(text, folder=tmp_path)
    assert [str(source.path) for source in spec.data.train] == [str(tmp_path / "rows.csv"), "hf:/org/name#train"]
    assert "hf://org/name#test" in spec.to_yaml()
    assert parse_spec(spec.to_yaml(), folder=tmp_path / "elsewhere") == spec
    for wrong, words in [
        ("columns: {lable: stars}", "data.columns has the key 'lable'.*did you mean 'label'"),
        ("columns: {text: a, label: a}", "data.columns gives one column to two keys"),
        ("columns: {text: 3}", "data.columns must give text the name of a column"),
        ("columns: [text]", "data.columns must be a mapping"),
        ("instruction: ' '", "data.instruction must be text"),
    ]:
        with pytest.raises(SpecError, match=words):
            parse_spec("version: 1\nbase: kivnun/tiny-phi\ndata:\n  train: rows.csv\n  " + wrong + "\n", folder=tmp_path)
