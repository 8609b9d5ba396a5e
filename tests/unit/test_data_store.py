"""Rows in a store: the same in memory and on disk, nothing left behind, and a full disk is told of."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_loader import ByteTokenizer, chat, load, spec_of, texts, write

from kivnun.data import spool
from kivnun.data.loader import load_dataset
from kivnun.data.order import RowOrder
from kivnun.data.rows import PreferencePair, TokenRow, Where
from kivnun.data.spool import Spool, Table
from kivnun.data.store import RowStore, StoredRows
from kivnun.data.tokens import Draft
from kivnun.errors import StorageError

weights = st.sampled_from([0.0, 1.0, 0.5, -0.0, 1e-30, float("inf")])
drafts = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), weights), min_size=1, max_size=30).map(
        lambda row: Draft(np.array([t for t, _ in row], np.int32), np.array([w for _, w in row], np.float32), len(row) // 2)
    ),
    max_size=12,
)


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a store hold next to nothing in memory."""
    monkeypatch.setattr(spool, "MEMORY_BYTES", 64)
    monkeypatch.setattr(spool, "WRITE_BYTES", 48)


def stored(rows: list[Draft], folder: Path | None = None) -> RowStore:
    store = RowStore(folder)
    for at, row in enumerate(rows):
        store.append(row, Where("ab"[at % 2], 7 * at))
    return store


def same_row(found: TokenRow, draft: Draft, at: int) -> None:
    assert (found.ids.dtype, found.weights.dtype) == (np.int32, np.float32)
    assert found.ids.tobytes() == draft.ids.tobytes()
    assert found.weights.tobytes() == draft.weights.tobytes()
    assert (found.row, found.where, found.prompt_len) == (at + 3, Where("ab"[at % 2], 7 * at), draft.prompt_len)


@settings(max_examples=50, deadline=None)
@given(drafts)
def test_a_row_comes_back_bit_for_bit(rows: list[Draft]) -> None:
    store = stored(rows)
    assert len(store) == len(rows)
    assert store.lengths().tolist() == [row.length for row in rows]
    assert store.trained().tolist() == [row.trained for row in rows]
    for at, draft in enumerate(rows):
        same_row(store.row(at, at + 3), draft, at)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=20), st.integers(1, 100))
def test_a_spool_gives_back_any_part_whether_in_memory_or_on_disk(parts: list[bytes], limit: int) -> None:
    kept, all_bytes = Spool(memory_bytes=limit), b""
    for part in parts:
        assert kept.append(part) == len(all_bytes)
        all_bytes += part
        middle = len(all_bytes) // 2
        assert kept.read(middle, len(all_bytes) - middle, np.dtype(np.uint8)).tobytes() == all_bytes[middle:]
    assert kept.read(0, len(all_bytes), np.dtype(np.uint8)).tobytes() == all_bytes
    assert kept.is_on_disk == (len(all_bytes) >= limit)


def test_rows_are_the_same_from_disk_and_their_file_has_no_name(on_disk: None, tmp_path: Path) -> None:
    rows = [Draft(np.arange(at, 2 * at + 2, dtype=np.int32), np.ones(at + 2, np.float32), 1) for at in range(40)]
    store = stored(rows, tmp_path)
    for at, draft in enumerate(rows):
        same_row(store.row(at, at + 3), draft, at)
    assert list(tmp_path.iterdir()) == []


def test_what_a_caller_does_to_a_row_stays_with_the_caller(on_disk: None) -> None:
    store = stored([Draft(np.array([5, 6], np.int32), np.array([0, 1], np.float32), 1)] * 9)
    row = store.row(0, 0)
    row.ids[:] = 0
    row.weights[:] = 0
    assert (store.row(0, 0).ids.tolist(), store.row(0, 0).weights.tolist()) == ([5, 6], [0, 1])


def test_rows_are_a_sequence_with_numbers_of_their_own() -> None:
    store = stored([Draft(np.array([at] * (at + 1), np.int32), np.zeros(at + 1, np.float32), 0) for at in range(6)])
    rows = StoredRows(store, np.array([1, 4, 5]), first=10)
    assert [row.row for row in rows] == [10, 11, 12]
    assert [row.length for row in rows[1:]] == [5, 6]
    assert (rows[-1].row, rows[np.int64(0)].length) == (12, 2)  # type: ignore[call-overload]
    assert (rows.lengths.tolist(), rows.longest_side, rows.num_trained) == ([2, 5, 6], 6, 0)
    with pytest.raises(IndexError, match="there are 3 rows"):
        rows[3]
    pairs = StoredRows(store, np.array([2, 0]), first=4, pairs=True)
    assert [(pair.row, [side.row for side in pair.sides]) for pair in pairs] == [(4, [8, 9]), (5, [10, 11])]
    assert isinstance(pairs[0], PreferencePair)
    assert (pairs.lengths.tolist(), pairs.longest_side) == ([11, 3], 6)
    assert not StoredRows(store, np.array([], dtype=np.int64))


def test_a_data_set_on_disk_is_the_one_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [chat("a" * (at % 7 + 1), f"b{at % 40}") for at in range(60)]
    path, other = write(tmp_path, rows), write(tmp_path, rows[:9], "b.jsonl")
    before = load(path, other, shares=(1, 2), validation=0.3)
    monkeypatch.setattr(spool, "MEMORY_BYTES", 100)
    (tmp_path / "run").mkdir()
    after = load_dataset(spec_of(path, other, shares=(1, 2), validation=0.3), ByteTokenizer(), 0, 100, tmp_path / "run")
    assert after.content_hash == before.content_hash
    assert after.report == before.report
    assert list((tmp_path / "run").iterdir()) == []


def test_rows_have_the_hash_they_always_had(tmp_path: Path) -> None:
    """A run goes on after an update only if the same files still give the same rows."""
    rows = [chat(f"question {at}", "yes" * (at % 5 + 1), "and?", f"reply {at % 3}") for at in range(20)]
    first, second = write(tmp_path, rows, "a.jsonl"), write(tmp_path, rows[:5], "b.jsonl")
    pairs = [{"prompt": f"p {at}", "chosen": "yes", "rejected": "n" * (at + 1)} for at in range(9)]
    several = load(first, second, shares=(3, 1), validation=0.2, seed=7, tokenizer=ByteTokenizer(per_turn=True))
    assert several.content_hash == "db54af876d4d0a087113873a1d0cf10d6e51c6f8703996e974de05841104baa0"
    of_pairs = load(write(tmp_path, pairs, "c.jsonl"), validation=0.3, seed=1)
    assert of_pairs.content_hash == "ba7d6d8a2f1466cf88dc1d3032b89a2c95fdfd7b5fa5e10368ef48e1746376e8"


KILLED = """
import os, signal, sys
from pathlib import Path
from kivnun.data import spool
spool.MEMORY_BYTES = 1000
from kivnun.data.spool import Spool
kept = Spool(Path(sys.argv[1]))
kept.append(b"x" * 10_000_000)
assert kept.is_on_disk
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_with_what_to_do(tmp_path: Path) -> None:
    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    program = KILLED.replace("os.kill(", "#")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], timeout=60, check=False, capture_output=True, text=True, preexec_fn=no_room
    )
    assert StorageError.__name__ in done.stderr
    assert "make room or choose another folder" in done.stderr


def test_a_table_of_nothing_is_empty() -> None:
    assert Table(np.dtype("<i4")).read().tolist() == []


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 60), st.floats(0.001, 0.999), st.integers(0, 9), st.booleans())
def test_a_split_is_a_partition_of_the_records(
    tmp_path_factory: pytest.TempPathFactory, count: int, share: float, seed: int, two_files: bool
) -> None:
    folder = tmp_path_factory.mktemp("split")
    rows = texts(*(f"row {at}" for at in range(count)))
    cut = count // 2 if two_files else count
    paths = [write(folder, part, f"{at}.jsonl") for at, part in enumerate((rows[:cut], rows[cut:])) if part]
    dataset = load(*paths, validation=share, seed=seed)
    train, held = ([(row.where.path, row.where.line) for row in side] for side in (dataset.train.rows, dataset.validation))
    numbered = [(str(path), line) for path in paths for line in range(1, path.read_text().count("\n") + 1)]
    assert sorted(train + held) == sorted(numbered)
    assert len(held) == min(max(round(count * share), 1), count - 1)
    assert (sorted(train), sorted(held)) == (train, held)


def test_what_is_sampled_follows_the_shares(tmp_path: Path, on_disk: None) -> None:
    small, large = write(tmp_path, texts(*"abcdefg"), "small.jsonl"), write(tmp_path, texts(*map(str, range(50))), "large.jsonl")
    train = load(small, large, shares=(3, 1)).train
    order = RowOrder(train.lengths, train.sizes, train.shares, batch_rows=5, batch_tokens=None, epochs=4, num_steps=None, seed=2)
    drawn = [[train.rows[row].where for row in order.epoch_rows(epoch)] for epoch in range(4)]
    for wheres in drawn:
        assert Counter(Path(where.path).name for where in wheres) == {"small.jsonl": 43, "large.jsonl": 14}  # 57 rows, 3 to 1
    times = Counter(where.line for wheres in drawn for where in wheres if Path(where.path).name == "small.jsonl")
    assert max(times.values()) - min(times.values()) <= 1  # none comes again before all have come
