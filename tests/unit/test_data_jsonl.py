"""Reading lines: whatever the bytes, every non-blank line is one record or has a problem, and nothing hangs or blows up."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kivnun.data import jsonl
from kivnun.data.formats import read_records
from kivnun.data.rows import TextRecord
from kivnun.errors import DataError, RowProblem, StorageError

ROW = b'{"prompt": "a", "completion": "b"}'
WORD = "zebrafish"


def write(folder: Path, content: bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def problems_of(folder: Path, content: bytes) -> list[RowProblem]:
    return read_records(write(folder, content))[2]


@pytest.mark.parametrize(
    "content",
    [ROW, ROW + b"\n", ROW + b"\r\n", b"\xef\xbb\xbf" + ROW, b"\n \t\n" + ROW + b"\n\r\n\n", b"  " + ROW + b" \n"],
    ids=["no newline", "newline", "crlf", "bom", "blank lines", "spaces"],
)
def test_one_row_is_read_whatever_surrounds_it(tmp_path: Path, content: bytes) -> None:
    name, records, problems = read_records(write(tmp_path, content))
    assert (name, len(records), problems) == ("prompt_completion", 1, [])


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    _, records, problems = read_records(write(tmp_path, b"\n" + ROW + b"\r\n\r\n{\n" + ROW))
    assert [record.where.line for record in records] == [2, 5]
    assert [problem.line for problem in problems] == [4]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "%s", "text": "b"}', "given twice"),
        (b'{"text": "%s", "x": NaN}', "NaN is not JSON"),
        (b'{"text": "%s", "x": -Infinity}', "-Infinity is not JSON"),
        (b'{"text": "%s", "x": 1e999}', "too large"),
        (b'{"text": "%s", "x": 99999999999999999999}', "64 bits"),
        (b'{"text": "%s", "x": ' + b"9" * 100_000 + b"}", "64 bits"),
        (b'{"text": "%s\\ud800"}', "surrogate"),
        (b'{"text": "%s", "\\udc00": 1}', "surrogate"),
        (b'{"text": "%s\\u0000"}', "a string holds a NUL character"),
        (b'{"text": "%s\x00"}', "NUL character at byte"),
        (b'{"text": "%s\xe9"}', "is not UTF-8"),
        (b'{"text": "%s\xed\xa0\x80"}', "is not UTF-8"),
        (b'\xef\xbb\xbf{"text": "%s"}', "byte order mark"),
        (b'["%s"]', "holds a list"),
        (b'"%s"', "holds a string"),
        (b"12", "holds a number"),
        (b"null", "holds null"),
        (b"true", "holds a boolean"),
        (b'{"text": "%s"', "not valid JSON at column"),
        (b"{'text': '%s'}", "not valid JSON at column 2"),
        (b'{"text": "%s"} {"text": "b"}', "second value"),
        (b'{"text": "%s"}\r{"text": "b"}', "second value"),
        (b'{"text": "%s\t"}', "not valid JSON"),
        (b'{"text": "%s", "x": ' + b"[" * 65 + b"]" * 65 + b"}", "deeper than 64"),
        (b'{"text": "%s", "x": ' + b'{"a":' * 200_000, "deeper than 64"),
        (b"[" * 1_000_000, "deeper than 64"),
    ],
)
def test_a_bad_line_is_a_problem_with_its_number_and_without_its_content(tmp_path: Path, line: bytes, words: str) -> None:
    line = line.replace(b"%s", WORD.encode())
    _, records, problems = read_records(write(tmp_path, ROW + b"\n" + line + b"\n" + ROW))
    assert len(records) == 2
    assert [problem.line for problem in problems] == [2]
    assert words in problems[0].message
    assert WORD not in problems[0].message


def test_depth_counts_brackets_outside_strings_only(tmp_path: Path) -> None:
    text = json.dumps({"text": '[{"\\' * 500})
    assert problems_of(tmp_path, text.encode()) == []
    assert jsonl.parse_value("[" * 64 + "]" * 64) is not None


def test_depth_is_checked_in_linear_time_on_unclosed_strings() -> None:
    with pytest.raises(jsonl.LineProblem):
        jsonl.parse_value("[" * 65 + '"\\"' * 1_000_000)
    with pytest.raises(jsonl.LineProblem):
        jsonl.parse_value('"\\"' * 1_000_000 + "[" * 65)


def test_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    _, records, problems = read_records(write(tmp_path, b'{"text": "\\ud83d\\ude00"}'))
    assert problems == []
    assert isinstance(records[0], TextRecord)
    assert records[0].text == "\U0001f600"


def test_byte_position_of_bad_utf8_counts_from_one(tmp_path: Path) -> None:
    assert "byte 11 " in problems_of(tmp_path, b'{"text": "\xff"}')[0].message


def test_a_line_of_16_mib_is_read_and_one_byte_more_is_a_problem(tmp_path: Path) -> None:
    frame = len(b'{"text": ""}')
    most = b'{"text": "' + b"a" * (jsonl.MAX_LINE_BYTES - frame) + b'"}'
    name, records, problems = read_records(write(tmp_path, b"\xef\xbb\xbf" + most + b"\r\n" + most + b" \r\n" + b'{"text": "b"}'))
    assert (name, [record.where.line for record in records]) == ("text", [1, 3])
    assert [(problem.line, problem.message) for problem in problems] == [(2, "is longer than 16 MiB")]


def test_a_line_too_long_is_never_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "b"}\n')
        file.truncate(400 * 2**20)  # a hole: 400 MB of NUL bytes without a newline
    tracemalloc.start()
    try:
        _, records, problems = read_records(path)
        assert tracemalloc.get_traced_memory()[1] < 80 * 2**20
    finally:
        tracemalloc.stop()
    assert len(records) == 1
    assert [problem.line for problem in problems] == [2]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"  \r\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        read_records(write(tmp_path, content))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_wide_encodings_are_refused_with_advice(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(DataError, match="iconv"):
        read_records(write(tmp_path, '{"text": "a"}\n'.encode(encoding)))


@pytest.mark.parametrize("name", ["rows.tgz", "rows.jsonl.bz2", "rows.XLSX", "rows.parquet", "rows.arrow", "rows.zip"])
def test_other_formats_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="data files are JSONL"):
        read_records(write(tmp_path, ROW, name))


@pytest.mark.parametrize("content", [b"\x1f\x8b\x08\x00rest", b"PK\x03\x04rest", b"PAR1rest", b"\x28\xb5\x2f\xfdrest"])
def test_other_formats_are_refused_by_content(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match="data files are JSONL"):
        read_records(write(tmp_path, content))


def test_what_is_no_regular_file_is_refused_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in [(tmp_path / "pipe", "pipe"), (tmp_path, "folder"), (Path("/dev/zero"), "device")]:
        with pytest.raises(DataError, match=words):
            read_records(path)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", write(tmp_path, ROW) / "below.jsonl", Path("a\0b")):
        with pytest.raises(DataError, match="does not exist"):
            read_records(path)


def test_what_the_system_cannot_read_is_a_storage_error(tmp_path: Path) -> None:
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    with pytest.raises(StorageError, match="cannot be read"):
        read_records(loop)
    with pytest.raises(StorageError, match="cannot be read"):
        read_records(tmp_path / ("n" * 400))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs /proc/self/mem, a regular file whose reading fails")
def test_a_failing_read_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match="cannot be read"):
        read_records(Path("/proc/self/mem"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("messages", "tools", "prompt", "completion", "text", "chosen", "rejected", "input", "preferred_output",
        "non_preferred_output")  # fmt: skip
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=3)}))
FUNCTION = st.fixed_dictionaries({"name": JSON, "arguments": JSON})
CALL = st.fixed_dictionaries({"id": JSON, "type": JSON, "function": JSON | FUNCTION})
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "user", "assistant", "tool", "asistant"]) | JSON,
        "content": st.text(max_size=4) | PARTS | JSON,
        "weight": st.sampled_from([0, 1]) | JSON,
        "tool_calls": JSON | st.lists(CALL, max_size=2),
        "tool_call_id": JSON,
        "refusal": JSON,
        "name": JSON,
    },
)
ROWS = st.one_of(
    st.dictionaries(st.sampled_from(KEYS), JSON | st.lists(MESSAGE, max_size=3), max_size=5),
    st.fixed_dictionaries({"messages": st.lists(MESSAGE, min_size=1, max_size=4)}),
    st.fixed_dictionaries({"prompt": st.text(max_size=3), "completion": st.text(max_size=3)}),
    JSON,
)
LINES = st.one_of(
    st.binary(max_size=40).map(lambda raw: raw.replace(b"\n", b"")),
    ROWS.map(lambda row: json.dumps(row).encode()),
    ROWS.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass").replace(b"\n", b"")),
    st.sampled_from([b"", b" ", b"\r", ROW, b'{"text": "a"}', b"{", b"\xff\xfe"]),
)


@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(LINES, max_size=6),
    ending=st.sampled_from([b"\n", b"\r\n"]),
    format=st.sampled_from(["auto", "messages", "text"]),
)
def test_every_non_blank_line_is_a_record_or_a_problem(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ending: bytes, format: str
) -> None:
    path = write(tmp_path_factory.mktemp("rows"), ending.join(lines))
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    numbers = [number for number, line in enumerate(raw.split(b"\n"), 1) if line.strip(b" \t\r\n")]
    try:
        _, records, problems = read_records(path, format)
    except DataError:  # the file as a whole: no rows, or another encoding or format by its first bytes
        return
    good = [record.where.line for record in records]
    assert good == sorted(set(good))
    assert sorted([*good, *{problem.line for problem in problems}]) == numbers


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_our_errors(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = write(tmp_path_factory.mktemp("bytes"), content)
    try:
        _, records, problems = read_records(path)
    except DataError:
        return
    assert records or problems
