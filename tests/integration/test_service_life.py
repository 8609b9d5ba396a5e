"""The whole life of a job by every stock client, over real HTTP, with a real worker and the clerk's duty: from an upload to a model
that is listed, and to its end. What the objects hold is held against the client's own types."""

from __future__ import annotations

import asyncio
import base64
import csv
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.fine_tuning import FineTuningJob
from pydantic import BaseModel

from kivnun.jobs import states, tuning
from kivnun.jobs.states import COMMANDS, STATUSES
from kivnun.service.context import Service
from kivnun.service.validating import ValidateJobs
from service_jobs import azure_client, azure_v1_client, conversations, openai_client, refusal, uploaded
from service_parts import KEY, OTHER_KEY, api, place, service_at
from toy_jobs import toy_place, worker_thread

ENDED = ("succeeded", "failed", "cancelled")
SOON_S = 60.0
COLUMNS = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
AZURE_COLUMNS = (
    "step,train_loss,train_mean_token_accuracy,valid_loss,validation_mean_token_accuracy,full_valid_loss,"
    "full_valid_mean_token_accuracy"
)


@dataclass(frozen=True)
class Living:
    """A service in which jobs are validated and trained."""

    service: Service
    address: str


@pytest.fixture(scope="module")
def living(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Living]:
    made = toy_place(tmp_path_factory.mktemp("service"))
    service = service_at(made, made.service_config())
    with api(service) as address, validated(service), worker_thread(made, concurrency=2):
        yield Living(service, address)


@contextmanager
def validated(service: Service) -> Iterator[None]:
    """Do the duty of validating in a thread."""
    stop, duty = threading.Event(), ValidateJobs(service)

    def serve() -> None:
        while not stop.is_set():
            if not duty.turn():
                stop.wait(0.1)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)


def until(found: Callable[[], FineTuningJob], *statuses: str) -> FineTuningJob:
    """Poll a job until it has one of the statuses."""
    end = time.monotonic() + SOON_S
    while (job := found()).status not in statuses:
        assert job.status not in ENDED, f"{job.status}: {job.error}"
        assert time.monotonic() < end, f"still {job.status}"
        time.sleep(0.1)
    return job


CLIENTS: dict[str, Callable[[str], OpenAI]] = {
    "OpenAI": openai_client,
    "AzureOpenAI": azure_client,
    "OpenAI on /openai/v1": azure_v1_client,
}


@pytest.mark.parametrize("kind", CLIENTS)
def test_a_stock_client_goes_from_an_upload_to_a_model_and_its_end(living: Living, kind: str) -> None:
    client, azure = CLIENTS[kind](living.address), kind != "OpenAI"
    training, held = uploaded(client, conversations(12)), uploaded(client, conversations(3, first=20), "held.jsonl")
    job = client.fine_tuning.jobs.create(
        model="toy", training_file=training, validation_file=held, suffix="Life_1", hyperparameters={"n_epochs": 3, "batch_size": 4}
    )
    assert job.status == ("pending" if azure else "validating_files")
    job = until(lambda: client.fine_tuning.jobs.retrieve(job.id), "succeeded")
    check_required(job)
    assert job.fine_tuned_model == f"ft:toy:kivnun:life-1:{job.id[-8:]}"
    assert job.finished_at is not None
    assert job.estimated_finish is None
    assert job.trained_tokens == job.to_dict()["x_progress"]["planned_tokens"]  # type: ignore[index]
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (3, 4)
    check_events(client, job, training, held)
    check_checkpoints(client, job)
    check_results(client, job, azure)
    assert job.fine_tuned_model in [model.id for model in client.models.list()]
    # The model is gone on with, and an earlier step of it is too.
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    further = client.fine_tuning.jobs.create(
        model=checkpoints[-1].fine_tuned_model_checkpoint, training_file=training, hyperparameters={"n_epochs": 1, "batch_size": 12}
    )
    assert until(lambda: client.fine_tuning.jobs.retrieve(further.id), "succeeded").fine_tuned_model != job.fine_tuned_model
    assert client.models.delete(job.fine_tuned_model or "").deleted
    gone = refusal(client.fine_tuning.jobs.create, model=job.fine_tuned_model, training_file=training)
    assert (gone.status_code, gone.code) == (400, "model_not_found")
    for file_id in (training, held, *job.result_files):
        assert client.files.delete(file_id).deleted


def test_the_asynchronous_client_sees_the_same_life(living: Living) -> None:
    async def life() -> FineTuningJob:
        async with AsyncOpenAI(base_url=f"{living.address}/v1", api_key=KEY, max_retries=0) as client:
            file = await client.files.create(file=("t.jsonl", conversations(10)), purpose="fine-tune")
            job = await client.fine_tuning.jobs.create(model="toy", training_file=file.id, hyperparameters={"n_epochs": 1})
            end = time.monotonic() + SOON_S
            while job.status not in ENDED and time.monotonic() < end:
                await asyncio.sleep(0.1)
                job = await client.fine_tuning.jobs.retrieve(job.id)
            events = [event.message async for event in client.fine_tuning.jobs.list_events(job.id, limit=2)]
            assert events[0] == "The job has successfully completed"
            assert events[-1] == f"Created fine-tuning job: {job.id}"
            return job

    assert asyncio.run(life()).status == "succeeded"


def check_events(client: OpenAI, job: FineTuningJob, training: str, held: str) -> None:
    pages = client.fine_tuning.jobs.list_events(job.id, limit=3)
    events = list(pages)[::-1]  # page by page, newest first
    for event in events:
        check_required(event)
    said = [event.message for event in events if event.type == "message"]
    wanted = [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {training} and validation file: {held}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Checkpoint created at step 3",
        "Checkpoint created at step 9",
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed",
    ]
    assert [message for message in said if message in wanted] == wanted
    steps = [event.data for event in events if event.type == "metrics"]
    assert [data["step"] for data in steps] == list(range(1, 10))  # type: ignore[index]
    assert all(data["total_steps"] == 9 and data["train_loss"] > 0 for data in steps)  # type: ignore[index]


def check_checkpoints(client: OpenAI, job: FineTuningJob) -> None:
    found = client.fine_tuning.jobs.checkpoints.list(job.id).data
    for checkpoint in found:
        check_required(checkpoint)
    assert [checkpoint.step_number for checkpoint in found] == [9, 6, 3]
    assert [checkpoint.fine_tuned_model_checkpoint for checkpoint in found] == [
        f"{job.fine_tuned_model}:ckpt-step-{step}" for step in (9, 6, 3)
    ]
    assert all(checkpoint.metrics.full_valid_loss is not None for checkpoint in found)
    page = client.fine_tuning.jobs.checkpoints.list(job.id, limit=1)
    assert [checkpoint.id for checkpoint in page] == [checkpoint.id for checkpoint in found], "one by one"


def check_results(client: OpenAI, job: FineTuningJob, azure: bool) -> None:
    table, report = job.result_files
    content = client.files.content(table).read()
    text = (content if azure else base64.b64decode(content)).decode()
    assert text.splitlines()[0] == (AZURE_COLUMNS if azure else COLUMNS)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 10)]
    assert all(float(row["train_loss"]) > 0 for row in rows)
    assert client.files.retrieve(table).filename == ("results.csv" if azure else "step_metrics.csv")
    assert client.files.retrieve(table).purpose == "fine-tune-results"
    assert client.files.retrieve(report).filename == "report.jsonl"


def check_required(found: BaseModel) -> None:
    """Hold an object against its type: every field without a default is there, and each is of the type that is declared, but for
    the words that Azure and newer services have of their own."""
    content: dict[str, Any] = found.model_dump()
    wire = found.to_dict()  # type: ignore[attr-defined]
    for name, field in type(found).model_fields.items():
        assert not field.is_required() or name in wire, f"{name} is missing"
    if content.get("status") in ("pending", "pausing", "paused"):
        content["status"] = "queued"
    if content.get("level") == "warning":
        content["level"] = "warn"
    type(found).model_validate(content, strict=True)


# --- commands ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Living]:
    """A service in which nothing moves by itself."""
    service = service_at(place(tmp_path_factory.mktemp("still")))
    with api(service) as address:
        yield Living(service, address)


@pytest.fixture(scope="module")
def file_id(still: Living) -> str:
    return uploaded(openai_client(still.address), conversations(10))


# One way to each status.
WAYS: dict[states.Status, tuple[states.Status, ...]] = {
    "validating_files": (),
    "queued": ("queued",),
    "running": ("queued", "running"),
    "pausing": ("queued", "running", "pausing"),
    "paused": ("queued", "paused"),
    "succeeded": ("queued", "running", "succeeded"),
    "failed": ("failed",),
    "cancelled": ("cancelled",),
}
REFUSALS = {
    ("pause", "validating_files"): "job_not_pausable",
    **{("resume", status): "job_not_resumable" for status in ("validating_files", "queued", "running", "pausing")},
    **{(kind, status): "job_terminal" for kind in ("pause", "resume") for status in ENDED},
    **{("cancel", status): "job_terminal" for status in ("succeeded", "failed")},
}


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("kind", COMMANDS)
def test_each_command_does_in_each_status_what_the_table_says(
    still: Living, file_id: str, status: states.Status, kind: states.Command
) -> None:
    client = openai_client(still.address)
    job_id = client.fine_tuning.jobs.create(model="toy", training_file=file_id).id
    for step in WAYS[status]:
        move(still.service, job_id, step)
    before = client.fine_tuning.jobs.retrieve(job_id)
    call = getattr(client.fine_tuning.jobs, kind)
    wanted = states.after_command(status, kind)
    if wanted is None:
        error = refusal(call, job_id)
        refused = (error.status_code, error.code, error.param)
        assert refused == (400, REFUSALS.pop((kind, status), None), "fine_tuning_job_id")
        assert client.fine_tuning.jobs.retrieve(job_id) == before
        return
    assert (kind, status) not in REFUSALS
    after = call(job_id)
    assert after.status == wanted
    if states.after_command(wanted, kind) == wanted:
        assert call(job_id).status == wanted, "a repeated command is no error, and changes nothing"
    assert len(client.fine_tuning.jobs.list_events(job_id).data) == (3 if wanted != status else 2), "a change has one event"


@pytest.mark.parametrize("then", ["queued", "running", "succeeded"])
def test_a_resume_whose_answer_was_lost_is_no_error_when_it_comes_again(still: Living, file_id: str, then: states.Status) -> None:
    client = openai_client(still.address)
    job_id = client.fine_tuning.jobs.create(model="toy", training_file=file_id).id
    first: tuple[states.Status, ...] = ("queued", "running")
    for step in first:
        move(still.service, job_id, step)
    retried = {"x-stainless-retry-count": "1"}
    assert refusal(client.fine_tuning.jobs.resume, job_id, extra_headers=retried).code == "job_not_resumable"
    client.fine_tuning.jobs.pause(job_id)
    move(still.service, job_id, "paused")
    client.fine_tuning.jobs.resume(job_id)
    for step in WAYS[then][1:] if then != "queued" else ():
        move(still.service, job_id, step)
    assert client.fine_tuning.jobs.resume(job_id, extra_headers=retried).status == then
    assert refusal(client.fine_tuning.jobs.resume, job_id).code == ("job_terminal" if then == "succeeded" else "job_not_resumable")


def move(service: Service, job_id: str, status: states.Status) -> None:
    def work(tx: tuning.Transaction) -> None:
        job = tuning.find(tx, job_id)
        assert job is not None
        tuning.move(tx, job, status, time.time(), service.new_id)

    service.db.write("move", work)


def test_azure_says_pending_and_warning_where_openai_says_queued_and_warn(still: Living, file_id: str) -> None:
    ours, azure = openai_client(still.address), azure_client(still.address)
    job_id = ours.fine_tuning.jobs.create(model="toy", training_file=file_id).id
    still.service.db.write("warn", lambda tx: tuning.append_event(tx, job_id, 1.0, "careful", still.service.new_id, level="warn"))
    assert [client.fine_tuning.jobs.list_events(job_id).data[0].level for client in (ours, azure)] == ["warn", "warning"]
    assert [client.fine_tuning.jobs.retrieve(job_id).status for client in (ours, azure)] == ["validating_files", "pending"]
    move(still.service, job_id, "queued")
    assert [client.fine_tuning.jobs.retrieve(job_id).status for client in (ours, azure)] == ["queued", "pending"]


def test_jobs_are_listed_by_pages_and_by_metadata(still: Living, file_id: str) -> None:
    client = openai_client(still.address, OTHER_KEY)
    theirs = uploaded(client, conversations(10))
    metadata = [None, *({"odd": str(n % 2), "a[b]": "c"} for n in range(1, 5))]
    made = [client.fine_tuning.jobs.create(model="toy", training_file=theirs, metadata=pairs).id for pairs in metadata][::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == made, "pages follow one another"
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"odd": "1"})] == [made[1], made[3]]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"odd": "1", "a[b]": "c"}, limit=1)] == [made[1], made[3]]
    none: dict[str, object] = {"metadata": "null"}
    assert [job.id for job in client.fine_tuning.jobs.list(extra_query=none)] == [made[-1]]
    assert client.fine_tuning.jobs.list(after="ftjob-none").data == []
    foreign = openai_client(still.address).fine_tuning.jobs.create(model="toy", training_file=file_id).id
    assert client.fine_tuning.jobs.list(after=foreign).data == []
    assert [job.id for job in client.fine_tuning.jobs.list(limit=10**30)] == made, "a page has 100 at most, whatever is asked for"
    for bad in ({"limit": 0}, {"limit": "x"}):
        assert refusal(client.fine_tuning.jobs.list, extra_query=bad).status_code == 400


def test_another_tenants_job_answers_as_one_that_is_not_there(still: Living, file_id: str) -> None:
    mine, theirs = openai_client(still.address), openai_client(still.address, OTHER_KEY)
    job_id = mine.fine_tuning.jobs.create(model="toy", training_file=file_id).id
    jobs = theirs.fine_tuning.jobs
    for call in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list):
        errors = [refusal(call, name) for name in (job_id, "ftjob-" + "0" * 24, "x" * 65)]
        assert {(error.status_code, error.code) for error in errors} == {(404, "not_found")}
        assert errors[0].message.replace(job_id, "X") == errors[1].message.replace("ftjob-" + "0" * 24, "X")
    assert mine.fine_tuning.jobs.retrieve(job_id).status == "validating_files"
