"""The quick table, from the command to 54 cells, stopped on the way and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kivnun.matrix.table import ROWS, TECHNIQUES

VERDICTS = {"supported", "contradicted", "no_detectable_effect", "not_applicable"}
KEYS = ["row", "technique", "document", "upstream", "measured", "baseline", "interval", "verdict", "runs"]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_quick_table_is_whole_and_rests_on_runs_that_are_there(tmp_path: Path) -> None:
    table = tmp_path / "table"
    command = [sys.executable, "-m", "kivnun", "matrix", "--quick", "--output", str(table), "--json"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list(table.glob("runs/base/*/*.json")):
        assert first.poll() is None
        time.sleep(0.5)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = {file: file.stat().st_mtime_ns for file in table.glob("runs/**/*.json")}
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(said.stdout.splitlines()[-1])["cells"] == 54
    assert {file: file.stat().st_mtime_ns for file in done} == done  # nothing was measured again
    held = json.loads((table / "matrix.json").read_text(encoding="utf-8"))
    assert [(cell["row"], cell["technique"]) for cell in held["cells"]] == [(row, t) for row in ROWS for t in TECHNIQUES]
    for cell in held["cells"]:
        assert list(cell) == KEYS
        assert cell["verdict"] in VERDICTS
        assert (cell["interval"] is None) == (cell["verdict"] == "not_applicable")
        for name in cell["runs"]:
            folder, _, _ = name.partition("/")
            if folder not in ("memory", "counts", "law"):
                assert (table / "runs" / f"{name}.json").is_file(), name
        if cell["row"] <= 5 and cell["technique"] in ("DeepSpeed", "ZeRO"):
            assert cell["measured"]["equal"]
    page = (table / "matrix.html").read_text(encoding="utf-8")
    assert page.count("<td class=") == 54
