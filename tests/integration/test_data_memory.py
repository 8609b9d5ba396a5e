"""Memory does not grow with a data file: four times the file, the same memory within a few MiB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

MIB = 2**20
# A tokenizer of one id per four bytes, so that the test measures the reading and not a tokenizer.
LOAD = """
import json, resource, sys
from pathlib import Path
import numpy as np
from kivnun.data import spool
from kivnun.data.checks import check_files
from kivnun.data.loader import load_dataset
from kivnun.spec import DataSpec
import kivnun.evaluate.data_page

what, path, small, limit = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
spool.MEMORY_BYTES = limit or spool.MEMORY_BYTES

class Fours:
    eos_id = 0
    def encode(self, text): return np.frombuffer(text.encode()[::4], np.uint8).tolist()

def load(path):
    if what == "check":
        return check_files([path]).train.rows
    data = load_dataset(DataSpec.model_validate({"train": str(path), "validation": 0.1}), Fours(), 0, 10**6)
    for row in data.train.rows:  # what a run touches
        assert row.length
    return len(data.train) + len(data.validation)

def most(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

load(small)  # what is loaded once stays
before = most()
rows = load(path)
print(json.dumps([rows, most() - before]))
"""


def write(path: Path, num_rows: int, row_bytes: int) -> Path:
    draws = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghij ", np.uint8)
    with open(path, "w", encoding="ascii") as file:
        for _ in range(num_rows):
            file.write('{"text": "' + letters[draws.integers(0, 11, row_bytes - 13)].tobytes().decode() + '"}\n')
    return path


def growth(what: str, path: Path, warm: Path, limit: int) -> tuple[int, int]:
    """Return how many rows a process of its own loaded, and by how many bytes its most memory grew with that."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, what, str(path), str(warm), str(limit)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows, grown = json.loads(done.stdout)
    return rows, grown


@pytest.mark.parametrize("what", ["load", "check"])
def test_four_times_the_file_takes_the_same_memory(tmp_path: Path, what: str) -> None:
    warm = write(tmp_path / "warm.jsonl", 20, 4_000)
    small, large = write(tmp_path / "small.jsonl", 500, 8_000), write(tmp_path / "large.jsonl", 2_000, 8_000)
    (rows, of_small), (more_rows, of_large) = (growth(what, path, warm, MIB // 4) for path in (small, large))
    assert (rows, more_rows) == (500, 2_000)
    print(f"{what}: memory grows by {of_small / MIB:.1f} and {of_large / MIB:.1f} MiB")
    assert large.stat().st_size - small.stat().st_size > 11 * MIB
    assert of_large - of_small < 4 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("what", ["load", "check"])
def test_a_file_of_128_mib_takes_the_memory_of_one_of_32(tmp_path: Path, what: str) -> None:
    warm = write(tmp_path / "warm.jsonl", 20, 4_000)
    small, large = write(tmp_path / "small.jsonl", 2_048, 16_384), write(tmp_path / "large.jsonl", 8_192, 16_384)
    (_, of_small), (_, of_large) = (growth(what, path, warm, 0) for path in (small, large))
    print(f"{what}: memory grows by {of_small / MIB:.1f} and {of_large / MIB:.1f} MiB")
    assert large.stat().st_size - small.stat().st_size > 95 * MIB
    assert of_large - of_small < 24 * MIB
    assert of_large < 96 * MIB
