"""Runs on rows that lie on disk: to the bit the run whose rows are in memory, and the record tells what the rows are like."""

from __future__ import annotations

from pathlib import Path

import pytest

from kivnun.data import spool
from kivnun.events import DataLoaded, read_events
from runs import chats, pairs, result_hashes, run_spec, write_spec


@pytest.mark.parametrize("kind", ["chats", "pairs"])
def test_rows_on_disk_train_to_the_same_bits(base: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = chats(24) if kind == "chats" else pairs(12)
    spec = write_spec(tmp_path, base, rows, schedule={"epochs": 1})
    run_spec(spec, tmp_path / "memory")
    monkeypatch.setattr(spool, "MEMORY_BYTES", 100)
    run_spec(spec, tmp_path / "disk")
    assert result_hashes(tmp_path / "disk") == result_hashes(tmp_path / "memory")
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == sorted(
        path.name for path in (tmp_path / "memory").iterdir()
    )


def test_the_record_says_what_repeats_and_how_long_rows_are(base: Path, tmp_path: Path) -> None:
    rows = chats(20)
    nearly = {
        "messages": [{"role": "user", "content": "a sentence that is long enough to be nearly told twice"}, rows[0]["messages"][1]]
    }
    again = {"messages": [{"role": "user", "content": nearly["messages"][0]["content"] + "!"}, rows[0]["messages"][1]]}
    bad = {"messages": []}
    (tmp_path / "held").mkdir()
    spec = write_spec(
        tmp_path,
        base,
        [*rows, rows[3], nearly, again, bad],
        data={"validation": "held.jsonl", "bad_rows": "skip"},
        schedule={"epochs": 1},
    )
    write_spec(tmp_path / "held", base, [rows[5], {"messages": [rows[7]["messages"][0], rows[8]["messages"][1]]}])
    (tmp_path / "held" / "train.jsonl").rename(tmp_path / "held.jsonl")
    run_spec(spec, tmp_path / "run")
    (told,) = [event for event in read_events(tmp_path / "run" / "events.jsonl") if isinstance(event, DataLoaded)]
    findings = told.findings
    assert (findings["duplicates"], findings["near_duplicates"], findings["overlap"]) == (1, 1, 1)
    assert (findings["problems"], findings["reasons"]) == (1, {"messages is empty": 1})
    lengths = findings["lengths"]
    assert isinstance(lengths, list)
    assert (
        (sum(step[1] for step in lengths), sum(step[2] for step in lengths)) == (told.train_rows, told.validation_rows) == (23, 2)
    )
