"""A whole service as its operator runs it: `kivnun serve` in processes of its own, which can be killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import openai
from openai import AzureOpenAI, OpenAI

from toy_jobs import below, is_alive

ADMIN_KEY = "sk-kivnun-admin-key-of-the-tests-CANARY-4711"
TOY = "version: 1\nbases: {toy: {trainer: toy, resident: true, price: {training: 2.0}}, cold: {trainer: toy}}\n"
CANARY = "CANARY-0815"
T = TypeVar("T")


class Running:
    """A service on a folder. Its log goes on in one file over all its starts."""

    def __init__(self, folder: Path, config: str, *options: str) -> None:
        self.data, self.log = folder / "data", folder / "log"
        self._config = folder / "service.yaml"
        self._config.write_text(config, encoding="utf-8")
        self._options = options
        self.data.mkdir(exist_ok=True)
        self.data.chmod(0o755)  # as an operator's `mkdir` leaves it
        self.url = ""

    def start(self) -> None:
        words = [sys.executable, "-m", "kivnun", "serve", "--port", "0", "--json", "--data", self.data, "--config", self._config]
        environment = {**os.environ, "KIVNUN_ADMIN_KEY": ADMIN_KEY, "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*words, *self._options], stdout=subprocess.PIPE, stderr=log, env=environment, umask=0)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text(encoding="utf-8")[-3000:]
        self.url = json.loads(line)["url"]

    def kill(self) -> None:
        """kill -9, and wait until nothing of it lives."""
        under = below(self.process.pid)
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        wait_until(lambda: not any(map(is_alive, under)), "a process of the service lives on")

    def stop(self) -> int:
        """SIGTERM; return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status

    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=ADMIN_KEY, max_retries=8)

    def azure(self) -> AzureOpenAI:
        return AzureOpenAI(azure_endpoint=self.url, api_key=ADMIN_KEY, api_version="2024-10-21", max_retries=8)

    def part(self, *words: str) -> int:
        """Return the process id of a part: `api`, `tune` and so on."""
        found = [pid for pid in below(self.process.pid) if _command(pid)[3 : 4 + len(words)] == ["worker", *words]]
        assert len(found) == 1, (words, found)
        return found[0]


@contextmanager
def running(folder: Path, config: str, *options: str) -> Iterator[Running]:
    """Run a service; kill what is left of it at the end."""
    service = Running(folder, config, *options)
    service.start()
    try:
        yield service
    finally:
        if service.process.poll() is None:
            service.kill()


def wait_until(found: Callable[[], T], what: str, seconds: float = 120.0) -> T:
    until = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < until, what
        time.sleep(0.05)
    return value


def ended(client: OpenAI, job_id: str) -> openai.types.fine_tuning.FineTuningJob:
    """Wait for a job's end."""

    def look() -> openai.types.fine_tuning.FineTuningJob | None:
        job = client.fine_tuning.jobs.retrieve(job_id)
        return job if job.status in ("succeeded", "failed", "cancelled") else None

    return wait_until(look, f"{job_id} does not end", 240.0)


def examples(folder: Path, rows: int = 12) -> Path:
    path = folder / "examples.jsonl"
    lines = (
        {"messages": [{"role": "user", "content": f"{CANARY} {number}"}, {"role": "assistant", "content": f"{CANARY} {number}"}]}
        for number in range(rows)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def create(client: OpenAI, file_id: str, epochs: int = 50, model: str = "toy", **more: Any) -> str:
    numbers = {"n_epochs": epochs, "batch_size": 1}
    method = {"type": "supervised", "supervised": {"hyperparameters": numbers}}
    job = client.fine_tuning.jobs.create(model=model, training_file=file_id, seed=7, method=method, **more)  # type: ignore[arg-type]
    assert job.status == "validating_files"
    return job.id


def adapter_of(client: OpenAI, model: str | None) -> str | None:
    """Return the hash of the adapter that answers under a name; None of a base."""
    assert model is not None
    asked = [{"role": "user", "content": CANARY}]
    answer = client.chat.completions.create(model=model, messages=asked, max_tokens=4)  # type: ignore[arg-type]
    return answer.to_dict()["x_adapter_hash"]  # type: ignore[return-value]


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return []
