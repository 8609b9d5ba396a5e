"""What takes minutes of a whole service: a model in place of the toy, a hundred kills, fifty tenants, clients of earlier years."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import openai
import pytest
from openai import OpenAI

from pages import ROOT
from service_process import ADMIN_KEY, TOY, Running, adapter_of, create, ended, examples, running, wait_until
from toy_jobs import below

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

EXAMPLE = ROOT / "examples" / "openai_finetune.py"
MODEL = "version: 1\nbases: {kivnun/tiny-phi: {resident: true}}\nlimits: {active_jobs: 8, requests_per_minute: 100000}\n"
KILLS = int(os.environ.get("KIVNUN_KILLS", "100"))
T = TypeVar("T")
CLIENTS = ("openai<2", "openai<3")


@pytest.fixture(scope="module")
def model_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("service"), MODEL) as service:
        yield service


def environment(service: Running, *, azure: bool) -> dict[str, str]:
    address = (
        {"AZURE_OPENAI_ENDPOINT": service.url, "AZURE_OPENAI_API_KEY": ADMIN_KEY}
        if azure
        else {"OPENAI_BASE_URL": f"{service.url}/v1", "OPENAI_API_KEY": ADMIN_KEY}
    )
    return {**os.environ, **address, "EPOCHS": "2"}


def adapter_said(python: str | Path, service: Running, folder: Path, *, azure: bool) -> str:
    """Run the example script; return the hash of the adapter that it was answered with."""
    done = subprocess.run(
        [python, EXAMPLE],
        env=environment(service, azure=azure),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The job has successfully completed" in done.stdout
    last = done.stdout.splitlines()[-1].split()
    assert last[0] == "adapter"
    return last[1]


def test_a_script_written_for_openai_and_for_azure_runs_to_the_same_adapter(model_service: Running, tmp_path: Path) -> None:
    by_openai = adapter_said(sys.executable, model_service, tmp_path, azure=False)
    assert len(by_openai) == 64
    assert adapter_said(sys.executable, model_service, tmp_path, azure=True) == by_openai


@pytest.mark.parametrize("wanted", CLIENTS)
def test_clients_of_earlier_years_run_the_script_to_the_same_adapter(wanted: str, model_service: Running, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    got = subprocess.run([python, "-m", "pip", "install", "--quiet", wanted], capture_output=True, text=True, check=False)
    if got.returncode:
        pytest.skip(f"{wanted} cannot be installed: {got.stderr.strip().splitlines()[-1]}")
    newest = adapter_said(sys.executable, model_service, tmp_path, azure=False)
    for azure in (False, True):
        assert adapter_said(python, model_service, tmp_path, azure=azure) == newest


def test_a_model_trained_through_two_kills_of_everything_has_the_bits_of_one_left_alone(tmp_path: Path) -> None:
    with running(tmp_path, MODEL) as service:
        client = service.openai()
        file_id = client.files.create(file=examples(tmp_path), purpose="fine-tune").id
        alone = ended(client, create(client, file_id, epochs=2, model="kivnun/tiny-phi"))
        expected = adapter_of(client, alone.fine_tuned_model)
        job_id = create(client, file_id, epochs=2, model="kivnun/tiny-phi")
        for step in (3, 14):
            wait_until(lambda step=step, client=client: steps_of(client, job_id) >= step, "it does not train")
            service.kill()
            service.start()
            client = service.openai()
        job = ended(client, job_id)
        assert job.status == "succeeded", job.error
        assert adapter_of(service.azure(), job.fine_tuned_model) == expected
        assert "torch" not in Path(f"/proc/{service.part('api')}/maps").read_text()


def steps_of(client: OpenAI, job_id: str) -> int:
    """Return how many steps a job has told."""
    for event in client.fine_tuning.jobs.list_events(job_id, limit=5).data:
        if event.message.startswith("Step "):
            return int(event.message.removeprefix("Step ").split("/")[0])
    return 0


def test_a_hundred_kills_of_workers_and_server_change_no_bit(tmp_path: Path) -> None:
    chance = random.Random(20)
    with running(tmp_path, TOY, "--workers", "2") as service:
        client = service.openai()
        file_id = client.files.create(file=examples(tmp_path, 40), purpose="fine-tune").id
        expected = adapter_of(client, ended(client, create(client, file_id)).fine_tuned_model)
        jobs = [create(client, file_id) for _ in range(2)]
        for number in range(KILLS):
            time.sleep(chance.uniform(0.0, 0.6))
            if number % 10 == 9:
                service.kill()
                service.start()
                client = service.openai()
            else:
                victims = below(service.process.pid)
                if victims:
                    kill(chance.choice(victims))
            # Jobs that have ended make room for others: something is always being trained.
            going_on = sum(
                job.finished_at is None for job in retried(lambda client=client: client.fine_tuning.jobs.list(limit=5).data)
            )
            jobs += [retried(lambda client=client: create(client, file_id)) for _ in range(2 - going_on)]
        for job_id in jobs:
            job = ended(client, job_id)
            assert job.status == "succeeded", job.error
            assert adapter_of(client, job.fine_tuned_model) == expected
            made = [event for event in client.fine_tuning.jobs.list_events(job_id, limit=100) if "New fine-tuned" in event.message]
            assert len(made) == 1
        assert service.stop() == 0


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it has ended by itself meanwhile


def retried(call: Callable[[], T]) -> T:
    """Return what a call gives once the API answers again: it may just have been killed."""
    until = time.monotonic() + 60
    while True:
        try:
            return call()
        except (openai.APIConnectionError, openai.InternalServerError):
            assert time.monotonic() < until
            time.sleep(0.2)


@pytest.mark.parametrize(("config", "model", "epochs"), [(TOY, "toy", 5), (MODEL, "kivnun/tiny-phi", 1)], ids=["toy", "tiny-phi"])
def test_fifty_tenants_with_two_hundred_jobs_get_each_its_own(config: str, model: str, epochs: int, tmp_path: Path) -> None:
    with running(tmp_path, config, "--workers", "2") as service:
        operator = service.openai()
        made: dict[str, tuple[OpenAI, list[str]]] = {}
        for number in range(50):
            tenant = f"tenant-{number}"
            operator.post("/x_tenants", cast_to=object, body={"id": tenant})
            asked = {"name": "its own", "scopes": ["read", "data", "tune", "chat", "admin"], "tenant": tenant}
            key = operator.post("/x_keys", cast_to=dict, body=asked)["key"]  # type: ignore[index]
            client = OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=8)
            file_id = client.files.create(file=examples(tmp_path, 10 + number), purpose="fine-tune").id
            made[tenant] = client, [create(client, file_id, epochs, model) for _ in range(4)]
        seen: set[str] = set()
        for number, (client, jobs) in enumerate(made.values()):
            done = [wait_for_end(client, job_id) for job_id in jobs]
            assert [job.status for job in done] == ["succeeded"] * 4
            adapters = {adapter_of(client, job.fine_tuned_model) for job in done}
            assert len(adapters) == 1, "one file and one seed, one adapter"
            assert not adapters & seen, "each tenant's file is another"
            seen |= adapters
            assert {job.id for job in client.fine_tuning.jobs.list(limit=100)} == set(jobs)
            other, theirs = made[f"tenant-{(number + 1) % 50}"]
            with pytest.raises(openai.NotFoundError):
                client.fine_tuning.jobs.retrieve(theirs[0])
            usage = client.get("/x_usage", cast_to=dict, options={"params": {"group_by": "kind"}})
            trained = sum(group["tokens"] for group in usage["data"] if group["kind"] == "training")  # type: ignore[index]
            assert trained == sum(job.trained_tokens or 0 for job in done)
            assert other is not client


def wait_for_end(client: OpenAI, job_id: str) -> openai.types.fine_tuning.FineTuningJob:
    """Wait long: two hundred jobs are before it."""

    def look() -> openai.types.fine_tuning.FineTuningJob | None:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.5)
        return None

    return wait_until(look, f"{job_id} does not end", 3000.0)
