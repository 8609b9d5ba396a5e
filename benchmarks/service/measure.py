"""A whole service in its processes, and what its callers wait for: creates while a job trains, cancels, answers.

Every figure is a client's: the time from sending a request over HTTP on this machine to what it asked for. Next: `__main__.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from openai import BadRequestError, OpenAI

KEY = "sk-kivnun-key-of-the-benchmark"
BASE = "kivnun/tiny-phi"
CONFIG = f"""version: 1
bases: {{{BASE}: {{}}, toy: {{trainer: toy, resident: true}}}}
limits: {{requests_per_minute: 10000000, tokens_per_minute: 1000000000, waiting_jobs: 1000000, answers_at_once: 1000}}
"""
LONG_EPOCHS = 50
ROWS = 400
ANSWER_TOKENS = 16
ASKED = [{"role": "user", "content": "When does the ferry leave?"}]
PATIENCE_S = 180.0
LONG_S = 1200.0  # a whole job's


@dataclass(frozen=True, slots=True)
class Service:
    url: str
    pid: int
    client: OpenAI


@contextmanager
def service(folder: Path) -> Iterator[Service]:
    """Run `kivnun serve` in a folder; end it at the end."""
    config = folder / "service.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    words = [sys.executable, "-m", "kivnun", "serve", "--port", "0", "--json", "--data", folder / "data", "--config", config]
    environment = {**os.environ, "KIVNUN_ADMIN_KEY": KEY}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, env=environment)
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        yield Service(url, process.pid, OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0))
    finally:
        process.terminate()
        process.wait(60)


def creates_while_a_job_trains(service: Service, folder: Path, times: int) -> list[float]:
    """Return the seconds of so many creates, made while a job of the built-in base trains."""
    client, file_id = service.client, upload(service.client, folder)
    training = create(client, file_id, BASE)
    _until(lambda: step_of(client, training) >= 1)
    create(client, file_id, "toy")  # the first one of all opens connections
    seconds = [_timed(lambda: create(client, file_id, "toy")) for _ in range(times)]
    assert client.fine_tuning.jobs.retrieve(training).status == "running", "the job ended while creates were timed"
    client.fine_tuning.jobs.cancel(training)
    return seconds


def cancels(service: Service, folder: Path, times: int) -> list[float]:
    """Return, so many times, the seconds from sending a cancel until the process that trained the job is gone."""
    client, file_id = service.client, upload(service.client, folder)
    for job in client.fine_tuning.jobs.list(limit=100):
        if job.status in ("queued", "validating_files"):
            with suppress(BadRequestError):  # it has ended meanwhile
                client.fine_tuning.jobs.cancel(job.id)
    seconds: list[float] = []
    for _ in range(times):
        job_id = create(client, file_id, BASE)
        _until(lambda job_id=job_id: step_of(client, job_id) >= 1)
        (trainer,) = trainers(service.pid)
        began = time.perf_counter()
        client.fine_tuning.jobs.cancel(job_id)
        while _computes(trainer):
            time.sleep(0.002)
        seconds.append(time.perf_counter() - began)
    return seconds


def answers_while_a_job_trains(service: Service, folder: Path, times: int) -> list[float]:
    """Return the seconds of so many chats with the built-in base, made while a job of it trains on the same cores."""
    client, file_id = service.client, upload(service.client, folder)
    chat = lambda: client.chat.completions.create(model=BASE, messages=ASKED, max_tokens=ANSWER_TOKENS, temperature=0)  # type: ignore[arg-type] # noqa: E731
    chat()  # loads the base
    training = create(client, file_id, BASE)
    _until(lambda: step_of(client, training) >= 1)
    seconds = [_timed(chat) for _ in range(times)]
    assert client.fine_tuning.jobs.retrieve(training).status == "running", "the job ended while chats were timed"
    client.fine_tuning.jobs.cancel(training)
    return seconds


def estimates(service: Service, folder: Path, epochs: Sequence[int]) -> list[float]:
    """Return, for a job of each number of epochs, how far the first `estimated_finish` after a tenth of its steps was off.

    The unit is the time that was left then."""
    client, file_id = service.client, upload(service.client, folder)
    off: list[float] = []
    for count in epochs:
        job_id = create(client, file_id, BASE, count)
        _until(lambda job_id=job_id: 10 * step_of(client, job_id) >= total_steps(client, job_id) > 0)
        seen_at, estimated = time.time(), client.fine_tuning.jobs.retrieve(job_id).estimated_finish
        assert estimated is not None, "a job that trains says when it will end"
        _until(lambda job_id=job_id: client.fine_tuning.jobs.retrieve(job_id).finished_at is not None, LONG_S)
        job = client.fine_tuning.jobs.retrieve(job_id)
        assert job.status == "succeeded", job.error
        assert job.finished_at is not None
        off.append(abs(estimated - job.finished_at) / (job.finished_at - seen_at))
    return off


def answers(service: Service, at_once: int, times: int) -> list[float]:
    """Return the seconds of `times` chats in each of `at_once` threads, with a worker whose model costs nothing."""

    def ask() -> list[float]:
        client = OpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0)
        chat = lambda: client.chat.completions.create(model="toy", messages=ASKED, max_tokens=ANSWER_TOKENS)  # type: ignore[arg-type] # noqa: E731
        chat()
        return [_timed(chat) for _ in range(times)]

    with ThreadPoolExecutor(at_once) as pool:
        return [seconds for of_thread in pool.map(lambda _number: ask(), range(at_once)) for seconds in of_thread]


def upload(client: OpenAI, folder: Path) -> str:
    path = folder / "examples.jsonl"
    rows = (
        {"messages": [{"role": "user", "content": f"What is {n} and {n}?"}, {"role": "assistant", "content": str(2 * n)}]}
        for n in range(ROWS)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return client.files.create(file=path, purpose="fine-tune").id


def create(client: OpenAI, file_id: str, model: str, epochs: int = LONG_EPOCHS) -> str:
    numbers = {"n_epochs": epochs, "batch_size": 8}
    method = {"type": "supervised", "supervised": {"hyperparameters": numbers}}
    return client.fine_tuning.jobs.create(model=model, training_file=file_id, method=method).id  # type: ignore[arg-type]


def step_of(client: OpenAI, job_id: str) -> int:
    """Return the last step that a job told; 0 before the first."""
    return _told(client, job_id)[0]


def total_steps(client: OpenAI, job_id: str) -> int:
    """Return how many steps a job has; 0 before its first."""
    return _told(client, job_id)[1]


def _told(client: OpenAI, job_id: str) -> tuple[int, int]:
    for event in client.fine_tuning.jobs.list_events(job_id, limit=3).data:
        if event.message.startswith("Step "):
            step, steps = event.message.removeprefix("Step ").partition(":")[0].split("/")
            return int(step), int(steps)
    return 0, 0


def trainers(pid: int) -> list[int]:
    """Return the trainers below a service: forked, so with their parent's own command line."""
    found: list[int] = []
    for below in _children(pid):
        line = _command(below)
        found += [below] if "kivnun.worker.trainer" in line and _command(_parent(below)) == line else trainers(below)
    return found


def percentile(seconds: Sequence[float], share: float) -> float:
    """Return the smallest figure that `share` of them do not exceed."""
    ordered = sorted(seconds)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _until(found: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    until = time.monotonic() + patience_s
    while not found():
        assert time.monotonic() < until, "the service does not come on; its log says why"
        time.sleep(0.1)


def _children(pid: int) -> list[int]:
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if _parent(int(path.parent.name)) == pid]


def _parent(pid: int) -> int:
    return int(_stat(pid)[1]) if _stat(pid) else 0


def _computes(pid: int) -> bool:
    return bool(_stat(pid)) and _stat(pid)[0] != "Z"


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""
