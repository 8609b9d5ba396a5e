"""A clerk that is killed while it judges: the next one takes the file over, and its status ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kivnun.jobs import files, leases
from kivnun.jobs.files import File
from kivnun.service.judging import JudgeFiles
from service_parts import place, service_at

JUDGE = """
import sys
from pathlib import Path
from kivnun.jobs.place import place_in
from kivnun.service.judging import JudgeFiles
from service_parts import service_at
JudgeFiles(service_at(place_in(Path(sys.argv[1]), sys.argv[2]))).turn()
"""


@pytest.mark.slow
def test_a_file_whose_judge_was_killed_is_judged_by_the_next(tmp_path: Path, db_url: str) -> None:
    made = place(tmp_path, db_url)
    service = service_at(made)
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * 200}]}
    content = (json.dumps(row).encode() + b"\n") * 50_000 + b"{"
    file = File("file-1", "default", 1.0, "fine-tune", "a", len(content), service.blobs.put_bytes("default", content))
    service.db.write("add", lambda tx: files.add(tx, file))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # the tests' own modules too
    with subprocess.Popen([sys.executable, "-c", JUDGE, str(tmp_path), made.db_url], env=environment) as process:
        while not service.db.read(lambda tx: leases.look(tx, ["file:file-1"])):
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    now = [0.0]
    duty = JudgeFiles(service, clock=lambda: now[0])
    assert not duty.turn(), "nobody knows yet that the holder is dead"
    now[0] = leases.TERM_S + 1
    assert duty.turn()
    judged = service.db.read(lambda tx: files.find(tx, "file-1", "default"))
    assert judged is not None
    assert (judged.status, (judged.facts or {})["rows"]) == ("error", 50_001)
    assert (judged.status_details or "").startswith("1 problem: line 50001: not valid JSON")
    service.db.close()
