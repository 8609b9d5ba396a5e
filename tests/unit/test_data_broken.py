"""Broken files of every kind: each is refused, or its bad rows are named, and nothing hangs, crashes or is passed over."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import resource
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disks import forbidden_folder
from kivnun.data.formats import read_records, stream_records
from kivnun.errors import DataError, KivnunError, RowProblem, StorageError

ROW = b'{"text": "a"}'
ROWS = [{"text": f"row {number}", "label": "xy"[number % 2], "id": number} for number in range(6)]
DEEP = 100_000


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps({key: row[key] for key in ("text", "label")}) + "\n" for row in rows).encode()


def as_list(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps([{key: row[key] for key in ("text", "label")} for row in rows]).encode()


def as_table(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=2)
    return sink.getvalue()


VALID: dict[str, bytes] = {
    "rows.jsonl": as_jsonl(ROWS),
    "rows.json": as_list(ROWS),
    "rows.csv": as_table(ROWS),
    "rows.tsv": as_table(ROWS, "\t"),
    "rows.parquet": as_parquet(ROWS),
    "rows.jsonl.gz": gzip.compress(as_jsonl(ROWS)),
    "rows.csv.gz": gzip.compress(as_table(ROWS)),
}


@pytest.mark.parametrize("name", VALID)
def test_the_files_that_are_broken_below_are_good_before(tmp_path: Path, name: str) -> None:
    _, records, problems = read_records(write(tmp_path, name, VALID[name]))
    assert (len(records), problems) == (6, [])


# (name, content, words of the error, the line or row it names or None)
WHOLE: dict[str, tuple[str, bytes, str, int | None]] = {
    "utf-16 jsonl": ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16", None),
    "utf-16 json": ("a.json", '[{"text": "a"}]'.encode("utf-16-le"), "UTF-16", None),
    "utf-16 csv": ("a.csv", "text\na\n".encode("utf-16-be"), "UTF-16", None),
    "utf-32 csv": ("a.csv", "text\na\n".encode("utf-32-le"), "UTF-16 or UTF-32", None),
    "latin-1 heading": ("a.csv", "text,caf\xe9\na,b\n".encode("latin-1"), "first line is not UTF-8", None),
    "NUL in a heading": ("a.csv", b"text,la\0bel\na,b\n", "first line is not UTF-8 text", None),
    "empty json": ("a.json", b"", "holds no rows", None),
    "blank json": ("a.json", b"\xef\xbb\xbf \n", "holds no rows", None),
    "empty list": ("a.json", b"[]", "holds no rows", None),
    "empty data": ("a.json", b'{"data": []}', "holds no rows", None),
    "empty csv": ("a.csv", b"", "its columns .none. are not those of any format", None),
    "heading alone": ("a.csv", b"text,label\n", "holds no rows", None),
    "empty gzip": ("a.jsonl.gz", gzip.compress(b""), "holds no rows", None),
    "no bytes of gzip": ("a.jsonl.gz", b"", "holds no rows", None),
    "a number": ("a.json", b"12", "does not begin with", None),
    "a string": ("a.json", b'"[{}]"', "does not begin with", None),
    "not json": ("a.json", b"text: a", "does not begin with", None),
    "lines named json": ("a.json", ROW + b"\n" + ROW, "holds an object with the key 'text'", None),
    "columns of json": ("a.json", b'{"text": {"0": "a"}}', "holds an object with the key 'text'", None),
    "data is no list": ("a.json", b'{"data": {}}', '"data" must be a list', None),
    "more beside data": ("a.json", b'{"data": [{"text": "a"}], "more": 1}', "with the key 'more'", None),
    "data twice": ("a.json", b'{"data": [{"text": "a"}], "data": []}', 'the key "data" twice', None),
    "an object cut off": ("a.json", b'{"data"', "a colon was expected", 1),
    "an empty object": ("a.json", b"{}", "holds an object; only", None),
    "a bad key": ("a.json", b'{"\\ud800": []}', "holds an object; only", None),
    "a list cut off": ("a.json", b'[{"text": "a"}, {"text": "b"}', "ends inside the list", 2),
    "a list cut off after a comma": ("a.json", b'[{"text": "a"},', "ends inside the list", 1),
    "a row cut off": ("a.json", b'[{"text": "a"}, {"text": "b', "ends inside the row", 2),
    "a comma too many": ("a.json", b'[{"text": "a"},]', "a row was expected", 1),
    "a comma too few": ("a.json", b'[{"text": "a"} {"text": "b"}]', "after the row a comma", 1),
    "a bracket too many": ("a.json", b'[{"text": "a"}}]', "after the row a comma", 1),
    "more after the list": ("a.json", b'[{"text": "a"}][]', "something follows the end", 1),
    "a list named jsonl": ("a.jsonl", b' [{"text": "a"}]', "begins with a list", None),
    "deep json": ("a.json", b"[" * DEEP, "ends inside the row", 1),
    "mark in the middle of json": ("a.json", b'[{"text": "a"}, \xef\xbb\xbf{"text": "b"}]', "after the row a comma", 2),
    "json named csv": ("a.csv", b'{"text": "a"}', "is CSV by its name, but begins as JSON", None),
    "parquet named jsonl": ("a.jsonl", VALID["rows.parquet"], "holds Parquet data", None),
    "parquet named csv": ("a.csv", VALID["rows.parquet"], "name it .parquet", None),
    "gzip named jsonl": ("a.jsonl", VALID["rows.jsonl.gz"], "name it .jsonl.gz", None),
    "gzip named csv": ("a.csv", VALID["rows.csv.gz"], "name it .csv.gz", None),
    "jsonl named gzip": ("a.jsonl.gz", ROW, "does not hold gzip data", None),
    "jsonl named parquet": ("a.parquet", ROW, "does not begin as Parquet does", None),
    "empty parquet": ("a.parquet", b"", "does not begin as Parquet does", None),
    "parquet in gzip": ("a.parquet.gz", gzip.compress(VALID["rows.parquet"]), "Parquet is compressed inside", None),
    "parquet cut off": ("a.parquet", VALID["rows.parquet"][:-20], "is damaged", None),
    "parquet of 4 bytes": ("a.parquet", b"PAR1", "is damaged", None),
    "gzip cut off": ("a.jsonl.gz", gzip.compress(os.urandom(9000).hex().encode())[:-30], "it ends too early", None),
    "gzip cut off at its start": ("a.jsonl.gz", VALID["rows.jsonl.gz"][:5], "it ends too early", None),
    "gzip with a wrong sum": ("a.jsonl.gz", VALID["rows.jsonl.gz"][:-8] + b"\0" * 8, "its content is damaged", None),
    "gzip with rubbish behind": ("a.jsonl.gz", VALID["rows.jsonl.gz"] + b"rubbish", "its content is damaged", None),
    "an open quote": ("a.csv", b'text,label\na,b\n"c,d\ne,f\n', "never closed", 3),
    "a quote inside": ("a.csv", b'text,label\na,b\n"c"d,e\n', "after a closing quote", 3),
    "old line ends": ("a.csv", b"text,label\ra,b\r", "carriage return stands alone", 1),
    "a huge row": ("a.csv", b'text\na\n"' + (b"line " * 500 + b"\n") * 8000, "more than 16 MiB begins here", 3),
    "a huge line": ("a.csv", b"text\n" + b"a" * (16 * 2**20 + 1), "more than 16 MiB begins here", 2),
    "names twice": ("a.tsv", b"text\tlabel\ttext\na\tb\tc\n", "names 'text' more than once", None),
    "no names": ("a.csv", b",,\na,b,c\n", "are not those of any format", None),
    "excel": ("a.xlsx", b"PK\x03\x04", "is Excel by its name", None),
    "zip": ("a.csv", b"PK\x03\x04...", "holds zip data", None),
}  # fmt: skip


@pytest.mark.parametrize("case", WHOLE)
def test_a_file_that_cannot_be_used_is_refused_as_a_whole(tmp_path: Path, case: str) -> None:
    name, content, words, line = WHOLE[case]
    with pytest.raises(DataError, match=words) as raised:
        read_records(write(tmp_path, name, content))
    assert [problem.line for problem in raised.value.problems] == ([] if line is None else [line])
    assert raised.value.hint or line is None


FIVE = [(number, "must be one JSON object") for number in (1, 2, 3, 4, 5)]
THREE = [(number, "text must be a string") for number in (1, 2, 3)]
# (name, content, (line or row, words) of each problem, number of good rows)
IN_ROWS: dict[str, tuple[str, bytes, list[tuple[int, str]], int]] = {
    "latin-1 in csv": ("a.csv", "text\ncaf\xe9\nb\n".encode("latin-1"), [(2, "not UTF-8")], 1),
    "latin-1 in json": ("a.json", '[{"text": "caf\xe9"}, {"text": "b"}]'.encode("latin-1"), [(1, "is not UTF-8")], 1),
    "half a surrogate pair": ("a.json", b'[{"text": "\\ud800"}, {"text": "b"}]', [(1, "surrogate")], 1),
    "surrogates in csv": ("a.csv", b"text\n\xed\xa0\x80\nb\n", [(2, "not UTF-8")], 1),
    "NUL in csv": ("a.csv", b"text\na\0\nb\n", [(2, "NUL")], 1),
    "NUL in json": ("a.json", b'[{"text": "\0"}, {"text": "\\u0000"}, {"text": "b"}]', [(1, "NUL"), (2, "NUL")], 1),
    "mixed line ends": ("a.csv", b"text\r\na\nb\r\nc", [], 3),
    "mark in the middle of csv": ("a.csv", b"\xef\xbb\xbftext\na\n\xef\xbb\xbfb\n", [(3, "byte order mark")], 1),
    "1e999": ("a.json", b'[{"text": 1e999}, {"text": NaN}, {"text": "a"}]', [(1, "too large"), (2, "NaN")], 1),
    "deep rows": ("a.json", b'[{"text": ' + b"[" * DEEP + b"]" * DEEP + b'}, {"text": "a"}]', [(1, "deeper than 64")], 1),
    "deep cells": ("a.csv", b"messages\n" + b"[" * DEEP + b'\n[]\n', [(2, "deeper than 64"), (3, "messages is empty")], 0),
    "no rows but values": ("a.json", b'[null, 1, "a", [], true, {"text": "a"}]', FIVE, 1),
    "wrong brackets": ("a.json", b'[{"text": "a"], {"text": "b"}]', [(1, "not valid JSON")], 1),
    "wrong types": ("a.json", b'[{"text": []}, {"text": {}}, {"text": null}]', THREE, 0),
    "too few fields": ("a.csv", b"text,label\na\nb,c\n", [(2, "has 1 of the 2 fields")], 1),
    "too many fields": ("a.tsv", b"text\tlabel\na\tb\tc\nb\tc\n", [(2, "has 3 of the 2 fields")], 1),
    "not json in a cell": ("a.csv", b"tokens,tags\n[a],[]\n", [(2, "tokens must be a list or an object, written as JSON")], 0),
}  # fmt: skip


@pytest.mark.parametrize("case", IN_ROWS)
def test_a_bad_row_is_named_and_the_others_are_read(tmp_path: Path, case: str) -> None:
    name, content, expected, good = IN_ROWS[case]
    _, records, problems = read_records(write(tmp_path, name, content))
    assert len(records) == good
    assert [problem.line for problem in problems] == [line for line, _ in expected]
    for problem, (_, words) in zip(problems, expected, strict=True):
        assert words in problem.message


def test_a_row_group_that_is_damaged_is_refused_from_its_first_row_on(tmp_path: Path) -> None:
    content = bytearray(VALID["rows.parquet"])
    with pq.ParquetFile(io.BytesIO(bytes(content))) as parquet:
        start = parquet.metadata.row_group(1).column(0).data_page_offset
    content[start : start + 12] = b"\xff" * 12
    path = write(tmp_path, "rows.parquet", bytes(content))
    with pytest.raises(DataError, match="from this row on the file is damaged") as raised:
        read_records(path)
    assert [problem.line for problem in raised.value.problems] == [1]
    stream = iter(stream_records(path))
    with pytest.raises(DataError):
        list(stream)


def test_what_is_no_regular_file_is_refused_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.json"))
        for path in (tmp_path / "pipe.csv", tmp_path / "socket.json", Path("/dev/zero"), Path("/dev/null")):
            with pytest.raises(DataError, match="is a pipe, a device or a socket"):
                read_records(path)
    for path in (tmp_path, tmp_path / "rows.parquet"):
        path.mkdir(exist_ok=True)
        with pytest.raises(DataError, match="is a folder, and no data set that save_to_disk wrote"):
            read_records(path)
    for name in ("none.csv", "none.parquet", "pipe.csv/none.json"):
        with pytest.raises(DataError, match="does not exist"):
            read_records(tmp_path / name)


def test_files_that_may_not_be_read_are_storage_errors(tmp_path: Path) -> None:
    loop = tmp_path / "loop.parquet"
    loop.symlink_to(loop)
    with pytest.raises(StorageError, match="cannot be read"):
        read_records(loop)
    path = write(tmp_path, "rows.csv", VALID["rows.csv"])
    path.chmod(0)
    with forbidden_folder(), pytest.raises(StorageError, match="Permission denied"):  # as somebody who is not root
        read_records(path)


@pytest.mark.parametrize("damage", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("change", [lambda raw: b"", lambda raw: raw[: len(raw) // 2], lambda raw: b"[1]" + raw, None])
def test_a_damaged_dataset_is_refused(tmp_path: Path, damage: str, change: Callable[[bytes], bytes] | None) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "rows"))
    path = tmp_path / "rows" / damage
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(KivnunError):
        read_records(tmp_path / "rows")


def outcome(path: Path, format: str = "auto") -> tuple[list[int], list[int]] | None:
    """Return the numbers of the good and of the bad rows, None for a file that is refused; whatever else is raised fails."""
    try:
        _, records, problems = read_records(path, format)
    except KivnunError:
        return None
    return [record.where.line for record in records], sorted({problem.line for problem in problems})


MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "repeat", "delete"]),
        st.integers(0, 10_000),
        st.one_of(
            st.binary(min_size=1, max_size=6), st.sampled_from([b'"', b"{", b"]", b",", b"\n", b"\0", b"\xff", b"\\", b"\r"])
        ),
    ),
    min_size=1,
    max_size=4,
)


def mutated(content: bytes, mutations: list[tuple[str, int, bytes]]) -> bytes:
    for kind, place, piece in mutations:
        at = place % (len(content) + 1)
        match kind:
            case "flip":
                content = content[:at] + bytes(byte ^ 0x5A for byte in content[at : at + len(piece)]) + content[at + len(piece) :]
            case "cut":
                content = content[:at]
            case "insert":
                content = content[:at] + piece + content[at:]
            case "repeat":
                content = content[:at] + content[at : at + 20] + content[at:]
            case _:
                content = content[:at] + content[at + len(piece) :]
    return content


FUZZED = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZED
@given(name=st.sampled_from(sorted(VALID)), mutations=MUTATIONS, format=st.sampled_from(["auto", "classification", "text"]))
def test_mutated_files_give_records_and_problems_or_are_refused(
    tmp_path: Path, name: str, mutations: list[tuple[str, int, bytes]], format: str
) -> None:
    found = outcome(write(tmp_path, name, mutated(VALID[name], mutations)), format)
    if found is None:
        return
    good, bad = found
    assert good == sorted(set(good))
    assert not set(good) & set(bad)
    numbers = sorted([*good, *bad])
    if name == "rows.jsonl":
        lines = (tmp_path / name).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        assert numbers == [number for number, line in enumerate(lines, 1) if line.strip(b" \t\r\n")]
    if name.split(".")[1] in ("json", "parquet"):  # numbered by place: each row is one or the other
        assert numbers == list(range(1, len(numbers) + 1))


@FUZZED
@given(name=st.sampled_from(sorted({*VALID, "rows.JSON"})), content=st.binary(max_size=200), kept=st.integers(0, 40))
def test_random_bytes_raise_nothing_but_our_errors(tmp_path: Path, name: str, content: bytes, kept: int) -> None:
    outcome(write(tmp_path, name, VALID.get(name, b"[")[:kept] + content))


CELLS = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=6),
    st.sampled_from(["", '"', ",", "\n", "\r\n", "[]", "[1", "a\0", "\ufeff", "0"]),
)


@FUZZED
@given(
    rows=st.lists(st.lists(CELLS, min_size=1, max_size=4), max_size=5),
    heading=st.sampled_from(["text,label", "tokens,tags", "text"]),
)
def test_every_row_of_a_table_is_a_record_or_a_problem(tmp_path: Path, rows: list[list[str]], heading: str) -> None:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    reader = csv.reader(re.findall("[^\n]*\n", text.getvalue()))  # lines as editors count them, by their line feeds
    starts: list[int] = []
    while True:
        line = reader.line_num + 2
        fields = next(reader, None)
        if fields is None:
            break
        if fields:
            starts.append(line)
    found = outcome(write(tmp_path, "rows.csv", f"{heading}\r\n{text.getvalue()}".encode()))
    if found is not None:
        assert sorted([*found[0], *found[1]]) == starts


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=MUTATIONS)
def test_mutated_parquet_never_brings_the_process_down(tmp_path: Path, mutations: list[tuple[str, int, bytes]]) -> None:
    outcome(write(tmp_path, "rows.parquet", mutated(VALID["rows.parquet"], mutations)))


def test_a_full_device_and_a_folder_that_vanishes_are_told(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", VALID["rows.jsonl"])
    stream = iter(stream_records(path))
    assert not isinstance(next(stream), RowProblem)
    shutil.rmtree(tmp_path)
    assert len(list(stream)) == 5, "a file that is open is read to its end"
    with pytest.raises(DataError, match="does not exist"):
        read_records(path)


def test_no_reader_leaves_files_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(3):
        for name in VALID:
            next(iter(stream_records(write(tmp_path, name, VALID[name]))))
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > before
