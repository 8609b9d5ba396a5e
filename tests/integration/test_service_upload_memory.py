"""An upload's size is not in the server's memory: not of one file, not of parts put together, not of lines that are judged."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import OpenAI

from service_parts import KEY, place

MIB = 1 << 20
SERVER = """
import sys
from pathlib import Path
from kivnun.jobs.place import place_in
from kivnun.service.judging import JudgeFiles
from kivnun.service.sweeping import Sweep
from service_parts import TOY, api, service_at

limits = TOY.limits.model_copy(update={"file_bytes": 20 << 30, "upload_bytes": 20 << 30})
service = service_at(place_in(Path(sys.argv[1])), TOY.model_copy(update={"limits": limits}))
judge, sweep = JudgeFiles(service), Sweep(service, young_s=-1.0, settle_s=0.0, every_s=0.0)
with api(service) as url:
    print(url, flush=True)
    for line in sys.stdin:
        {"judge": judge.turn, "sweep": sweep.turn}[line.strip()]()
        print("done", flush=True)
"""


class Server:
    """A service in a process of its own, whose memory is the test's to look at."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self._process = process
        self.url = process.stdout.readline().strip()

    def rss(self) -> int:
        return psutil.Process(self._process.pid).memory_info().rss

    def peak(self) -> int:
        """Return the most memory that was resident since the start."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))

    def do(self, duty: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{duty}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"


@contextmanager
def serving(folder: Path) -> Iterator[tuple[Server, OpenAI]]:
    place(folder)
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    ) as process:
        try:
            server = Server(process)
            with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
                client.files.create(file=("warm.txt", b"x" * MIB), purpose="user_data")
                yield server, client
        finally:
            process.terminate()


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as out:
        out.truncate(size)
    return path


def test_an_upload_of_192_mib_takes_a_few_mib_of_memory(tmp_path: Path) -> None:
    with serving(tmp_path) as (server, client):
        before = server.rss()
        file = client.files.create(file=sparse(tmp_path / "large", 192 * MIB), purpose="user_data")
        assert file.bytes == 192 * MIB
        assert server.peak() - before < 48 * MIB
        assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_upload_of_10_gb_takes_less_than_200_mb_of_memory_and_is_erased_after(tmp_path: Path) -> None:
    with serving(tmp_path) as (server, client):
        before = server.rss()
        file = client.files.create(file=sparse(tmp_path / "large", 10 * 10**9), purpose="user_data", timeout=1200)
        assert file.bytes == 10 * 10**9
        assert server.peak() - before < 200e6
        with client.files.with_streaming_response.content(file.id) as answer:
            assert sum(len(piece) for piece in answer.iter_bytes(MIB)) == 10 * 10**9
        assert server.peak() - before < 200e6
        assert client.files.delete(file.id).deleted
        server.do("sweep")
        left = sum(path.stat().st_size for path in (tmp_path / "blobs").rglob("*") if path.is_file())
        assert left <= MIB
        assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_parts_of_3_gib_are_put_together_in_less_than_200_mb_of_memory(tmp_path: Path) -> None:
    with serving(tmp_path) as (server, client):
        before = server.rss()
        large = sparse(tmp_path / "large", 3 << 30)
        digest = hashlib.md5()
        with large.open("rb") as source:
            while piece := source.read(MIB):
                digest.update(piece)
        upload = client.uploads.upload_file_chunked(
            file=large, mime_type="text/plain", purpose="user_data", md5=digest.hexdigest(), part_size=64 * MIB
        )
        assert upload.file is not None
        assert upload.file.bytes == 3 << 30
        assert server.peak() - before < 200e6
        assert client.files.delete(upload.file.id).deleted
        server.do("sweep")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lines_of_300_thousand_examples_are_judged_in_less_than_200_mb_of_memory(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "q" * 100}, {"role": "assistant", "content": "a" * 100}]}
    line = json.dumps(row).encode() + b"\n"
    with (tmp_path / "large.jsonl").open("wb") as out:
        for number in range(300_000):
            out.write(line.replace(b"qqqqqqqq", b"%08d" % number, 1) if number % 1000 else b'{"messages": []}\n')
    with serving(tmp_path) as (server, client):
        before = server.rss()
        file = client.files.create(file=tmp_path / "large.jsonl", purpose="fine-tune")
        assert file.status == "uploaded"
        server.do("judge")
        assert server.peak() - before < 200e6
        report: dict[str, Any] = client.get(f"/files/{file.id}/x_report", cast_to=dict[str, Any])
        assert (report["rows"], report["problems_total"], len(report["problems"])) == (300_000, 300, 100)
        assert client.files.retrieve(file.id).status_details == "300 problems; the first: line 1: messages is empty"
