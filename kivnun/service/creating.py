"""From a wish to a recorded job: the base below the model that is named, files that are the tenant's own, room in its queue.

Everything is asked and written in one transaction, in which the same create sent again finds the job it made.
Next: `validating.py` (what happens to the job then).
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator
from typing import Any

from kivnun.data.chat_shape import nearest
from kivnun.jobs import files, models, retries, tuning
from kivnun.jobs.config import ServiceConfig
from kivnun.jobs.database import Transaction
from kivnun.jobs.files import File
from kivnun.jobs.retries import KeyReused, Sent
from kivnun.jobs.tenants import limits_of
from kivnun.jobs.tuning import Job
from kivnun.service.context import Service
from kivnun.service.errors import ApiError, bad_request
from kivnun.service.sent import key_reused
from kivnun.service.tuning_request import MAX_SEED, CreateJob

ROUTE = "fine_tuning.jobs"
TOLD = 5  # problems of a file that an answer names


def create_job(service: Service, tenant: str, body: CreateJob, sent: Sent) -> Job:
    """Return the job that a create made, now or when it came before. Raises ApiError."""
    now = service.clock()

    def work(tx: Transaction) -> Job:
        def make() -> str:
            _check_room(tx, tenant, service.config)
            return _made(tx, service, wished(tx, service, tenant, body, now))

        job_id, _ = retries.accept(tx, tenant, ROUTE, sent, now, service.new_id, make)
        found = tuning.find(tx, job_id, tenant)
        assert found is not None
        return found

    try:
        with telling_problems(service):
            return service.db.write("create job", work)
    except KeyReused:
        raise key_reused() from None


def wished(tx: Transaction, service: Service, tenant: str, body: CreateJob, now: float) -> Job:
    """Return the job that a body asks for, not recorded yet. Raises ApiError where there is no such model or file."""
    model, base = _model(tx, service.config, tenant, body.model)
    _check_lora(body, service.config, base, continues=model.startswith("ft:"))
    for param in ("training_file", "validation_file"):
        file_id = getattr(body, param)
        if file_id is not None:
            usable_file(tx, tenant, file_id, param)
    if body.training_file == body.validation_file:
        raise bad_request("validation_file is the training file: what is trained on says nothing", "validation_file")
    return Job(
        id=service.new_id("ftjob-"),
        tenant=tenant,
        created_at=now,
        model=model,
        base=base,
        training_file=body.training_file,
        validation_file=body.validation_file,
        method={"type": body.kind, body.kind: {"hyperparameters": body.asked()}},
        suffix=body.suffix,
        seed=secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed,
        metadata=body.metadata,
        extensions=body.extensions(),
    )


def usable_file(tx: Transaction, tenant: str, file_id: str, param: str) -> File:
    """Return a tenant's file for tuning. Raises ApiError where there is none, or it holds something else."""
    found = files.find(tx, file_id, tenant)
    if found is None:
        raise bad_request(f"{param}: there is no file {file_id!r}", param, "invalid_file")
    if found.purpose != "fine-tune":
        raise bad_request(
            f"{param}: the file {file_id} has the purpose {found.purpose}; upload it with the purpose fine-tune",
            param,
            "invalid_file",
        )
    if found.status == "error":
        raise _FileBroken(found, param)
    return found


class _FileBroken(Exception):
    """A file whose judgement found problems, which are in the store."""

    def __init__(self, file: File, param: str) -> None:
        super().__init__(file.id)
        self.file, self.param = file, param


@contextlib.contextmanager
def telling_problems(service: Service) -> Iterator[None]:
    """Turn a file that was refused into the answer that says why, by line."""
    try:
        yield
    except _FileBroken as broken:
        file, param = broken.file, broken.param
        report: dict[str, Any] = {} if file.report is None else json.loads(b"".join(service.blobs.read(file.report)))
        found = [f"line {it['line']}: {it['message']}" for it in report.get("problems", [])]
        more = f"; {len(found) - TOLD} more are in GET /files/{file.id}/x_report" if len(found) > TOLD else ""
        why = "; ".join(found[:TOLD]) or file.status_details or "its lines cannot be used"
        raise bad_request(f"{param}: the file {file.id} cannot be used: {why}{more}", param, "invalid_file") from None


def _made(tx: Transaction, service: Service, job: Job) -> str:
    tuning.create(tx, job, service.new_id)
    also = f" and validation file: {job.validation_file}" if job.validation_file is not None else ""
    message = f"Validating training file: {job.training_file}{also}"
    tuning.append_event(tx, job.id, job.created_at, message, service.new_id)
    return job.id


def _check_room(tx: Transaction, tenant: str, config: ServiceConfig) -> None:
    most = limits_of(tx, tenant, config.limits).waiting_jobs
    if tuning.num_waiting(tx, tenant) >= most:
        raise ApiError(
            429, f"{most:,} jobs wait already, and no more may: cancel one, or wait until one has begun", type="requests",
            code="exceeded_active_job_limit", headers={"x-should-retry": "false"},
        )  # fmt: skip


def _model(tx: Transaction, config: ServiceConfig, tenant: str, name: str) -> tuple[str, str]:
    """Return the model as a job records it and the base below. Raises ApiError."""
    base = config.base_id(name)
    if base is not None:
        return name, base
    if name in config.refused:
        raise bad_request(f"{name} is not supported: {config.refused[name]}", "model", "model_not_supported")
    found = models.find(tx, tuning.model_of_checkpoint(tx, name, tenant) or name, tenant)
    if found is None:
        near = nearest(name, [*config.bases, *config.aliases])
        hint = f"did you mean {near}?" if near is not None else f"models that can be tuned: {', '.join([*config.bases][:20])}"
        raise bad_request(f"there is no model {name!r}; {hint}", "model", "model_not_found")
    if found.base not in config.bases:
        raise bad_request(f"{name} was tuned from {found.base}, which is not offered any more", "model", "model_not_supported")
    return found.id, found.base


def _check_lora(body: CreateJob, config: ServiceConfig, base: str, *, continues: bool) -> None:
    if body.x_lora is None:
        return
    if continues:
        raise bad_request("x_lora is given, but a tuned model keeps the rank, alpha and targets it has: leave it out", "x_lora")
    most = config.bases[base].max_rank
    if body.x_lora.rank is not None and body.x_lora.rank > most:
        raise bad_request(f"x_lora.rank must be at most {most} for {base}, got {body.x_lora.rank}", "x_lora.rank")
