"""Fine-tuning jobs: created, listed, commanded, their events, checkpoints and the report of their examples.

Next: `service/creating.py`, `service/tuning_wire.py`, `jobs/tuning.py`.
"""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import StreamingResponse

from kivnun.jobs import files, models, queue, tuning
from kivnun.jobs.database import Transaction
from kivnun.jobs.states import TERMINAL, Command
from kivnun.jobs.tuning import Job
from kivnun.service.auth import Caller, Reader, Tuner
from kivnun.service.context import Service, Shared
from kivnun.service.creating import create_job
from kivnun.service.dialect import Dialect, dialect_of
from kivnun.service.dry_run import dry_run
from kivnun.service.errors import ApiError, bad_request, not_found
from kivnun.service.paging import PageLimit, page_object
from kivnun.service.sent import Received, sent_as
from kivnun.service.tuning_request import body_schema, read_create
from kivnun.service.tuning_wire import Waiting, checkpoint_object, event_object, job_object

router = APIRouter()

BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": body_schema()}}}}
PARAM = "fine_tuning_job_id"
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_METADATA = re.compile(r"metadata\[(.{1,64})\]")


@router.post("/fine_tuning/jobs", openapi_extra=BODY)
async def create(request: Request, service: Shared, who: Tuner, came: Received) -> dict[str, Any]:
    """Create a job; it is answered in validating_files, and validated afterwards. With `x_dry_run`, say what it would be."""
    dialect = dialect_of(request)
    body = await run_in_threadpool(lambda: read_create(came.tree(), dialect))
    if body.x_dry_run:
        return await service.dry_runs.run(lambda: dry_run(service, who.tenant, body), one_of=who.tenant)
    return await run_in_threadpool(lambda: _shown(service, create_job(service, who.tenant, body, came.sent), dialect))


@router.get("/fine_tuning/jobs")
def page(request: Request, service: Shared, who: Reader, limit: PageLimit = 20, after: str | None = None) -> dict[str, Any]:
    """List jobs, the newest first. `metadata[key]=value` keeps those that hold the pairs, `metadata=null` those without any."""
    wanted, dialect = _metadata(request), dialect_of(request)
    if after is not None and not _ID.fullmatch(after):
        return page_object([], False, _never)
    found, more = service.db.read(lambda tx: tuning.page(tx, who.tenant, limit, after, wanted))
    waiting = _waiting(service, [job for job in found if job.status == "queued"])
    return page_object(found, more, lambda job: job_object(job, dialect, waiting.get(job.id)))


@router.get("/fine_tuning/jobs/{job_id}")
def retrieve(request: Request, job_id: str, service: Shared, who: Reader) -> dict[str, Any]:
    return _shown(service, service.db.read(lambda tx: _found(tx, job_id, who)), dialect_of(request))


@router.post("/fine_tuning/jobs/{job_id}/cancel")
def cancel(request: Request, job_id: str, service: Shared, who: Tuner) -> dict[str, Any]:
    return _commanded(request, job_id, service, who, "cancel")


@router.post("/fine_tuning/jobs/{job_id}/pause")
def pause(request: Request, job_id: str, service: Shared, who: Tuner) -> dict[str, Any]:
    return _commanded(request, job_id, service, who, "pause")


@router.post("/fine_tuning/jobs/{job_id}/resume")
def resume(request: Request, job_id: str, service: Shared, who: Tuner) -> dict[str, Any]:
    return _commanded(request, job_id, service, who, "resume")


@router.get("/fine_tuning/jobs/{job_id}/events")
@router.post("/fine_tuning/jobs/{job_id}/events", include_in_schema=False)  # as Azure's documents have it
def events(
    request: Request, job_id: str, service: Shared, who: Reader, limit: PageLimit = 20, after: str | None = None
) -> dict[str, Any]:
    """List a job's events, the newest first."""
    dialect = dialect_of(request)

    def work(tx: Transaction) -> tuple[list[tuning.JobEvent], bool]:
        job = _found(tx, job_id, who)
        return tuning.events_page(tx, job.id, limit, after) if after is None or _ID.fullmatch(after) else ([], False)

    found, more = service.db.read(work)
    return page_object(found, more, lambda event: event_object(event, dialect))


@router.get("/fine_tuning/jobs/{job_id}/checkpoints")
def checkpoints(job_id: str, service: Shared, who: Reader, limit: PageLimit = 10, after: str | None = None) -> dict[str, Any]:
    """List the checkpoints of a job that can be called, the last one first."""

    def work(tx: Transaction) -> tuple[list[models.Model], bool]:
        job = _found(tx, job_id, who)
        known = after is None or _ID.fullmatch(after)
        return models.checkpoints_page(tx, job.id, who.tenant, limit, after) if known else ([], False)

    found, more = service.db.read(work)
    return page_object(found, more, checkpoint_object)


@router.get("/fine_tuning/jobs/{job_id}/x_report", response_class=StreamingResponse)
def report(job_id: str, service: Shared, who: Reader) -> StreamingResponse:
    """Stream a line of JSON for each line of the training file: what was trained, cut, refused and why."""

    def work(tx: Transaction) -> files.File | None:
        job = _found(tx, job_id, who)
        # A job that was refused has no tables before the report.
        file_id = job.facts.get("report_file") or next(iter(job.result_files if job.status == "failed" else []), None)
        return None if file_id is None else files.find(tx, file_id, who.tenant)

    found = service.db.read(work)
    if found is None:
        raise ApiError(404, f"the job {job_id} has no report: its files are not read yet, or it was deleted", code="not_found")
    return StreamingResponse(service.blobs.read(found.blob), media_type="application/jsonl")


def _commanded(request: Request, job_id: str, service: Service, who: Caller, kind: Command) -> dict[str, Any]:
    """Carry out a command whose body, empty with stock clients, is not looked at. One whose answer was lost is answered again."""
    is_retry = sent_as(request, "").retry_count > 0

    def work(tx: Transaction) -> Job:
        job = _found(tx, job_id, who)
        done = tuning.command(tx, job, kind, service.clock(), service.new_id)
        if done is None and is_retry and tuning.last_command(tx, job.id) == kind:
            return job
        if done is None:
            raise _not_allowed(job, kind)
        return done

    return _shown(service, service.db.write(f"{kind} job", work), dialect_of(request))


def _not_allowed(job: Job, kind: Command) -> ApiError:
    if job.status in TERMINAL:
        return bad_request(f"the job {job.id} has ended ({job.status}): it cannot be {_done(kind)}", PARAM, "job_terminal")
    what = {"pause": "a job that is queued or running can be paused", "resume": "a job that is paused can be resumed"}
    code = {"pause": "job_not_pausable", "resume": "job_not_resumable"}
    # Every job that has not ended can be cancelled, so that only these two are refused here.
    return bad_request(f"the job {job.id} is {job.status}; {what[kind]}", PARAM, code[kind])


def _done(kind: Command) -> str:
    return {"pause": "paused", "resume": "resumed", "cancel": "cancelled"}[kind]


def _found(tx: Transaction, job_id: str, who: Caller) -> Job:
    found = tuning.find(tx, job_id, who.tenant) if _ID.fullmatch(job_id) else None
    if found is None:
        raise not_found("fine-tuning job", job_id, PARAM)
    return found


def _shown(service: Service, job: Job, dialect: Dialect) -> dict[str, Any]:
    return job_object(job, dialect, _waiting(service, [job] if job.status == "queued" else []).get(job.id))


def _waiting(service: Service, jobs: list[Job]) -> dict[str, Waiting]:
    """Return where queued jobs stand, and when each may begin."""
    if not jobs:
        return {}
    places = service.db.read(lambda tx: dict(queue.read_line(tx, service.config.limits).places()))
    now, found = service.clock(), dict[str, Waiting]()
    for job in jobs:
        if job.id not in places:
            continue
        place = places[job.id]
        wait = place.wait(job.planned_seconds, job.planned_tokens)
        found[job.id] = Waiting(place.position, place.tokens_ahead, None if wait is None else now + wait)
    return found


def _metadata(request: Request) -> dict[str, str] | None:
    """Return the pairs that are asked for; an empty mapping: jobs without any."""
    pairs = {found[1]: value for name, value in request.query_params.multi_items() if (found := _METADATA.fullmatch(name))}
    given = request.query_params.get("metadata")
    if given is not None and (given != "null" or pairs):
        raise bad_request("metadata must be null, or pairs as in metadata[key]=value", "metadata")
    return {} if given is not None else pairs or None


def _never(_item: object) -> dict[str, Any]:
    raise AssertionError("an empty page shows nothing")
