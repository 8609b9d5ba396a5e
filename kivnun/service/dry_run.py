"""A create that makes nothing: what the job would be, what it would cost, how long it would wait, whether it fits.

The same checks and the same plan as a job's own (`planning.py`), on the beginning of a large training file. Next: `creating.py`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kivnun.artifacts import storage_errors
from kivnun.jobs import files, models, queue
from kivnun.jobs.blobs import BlobStore
from kivnun.jobs.database import Transaction
from kivnun.jobs.files import File
from kivnun.jobs.snapshots import fetch_folder
from kivnun.jobs.tenants import limits_of
from kivnun.jobs.tuning import Job
from kivnun.plan.verdict import Plan
from kivnun.service.context import Service
from kivnun.service.creating import telling_problems, wished
from kivnun.service.planning import (
    START,
    TRAINING,
    VALIDATION,
    JobRefused,
    Machine,
    Outlook,
    check_quota,
    outlook,
    this_machine_asked,
)
from kivnun.service.tuning_request import CreateJob

READ_BYTES = 4 << 20  # of each file: a second or two


@dataclass(frozen=True, slots=True)
class _Sources:
    """The job that is asked about, and what it would begin from. `start` is the manifest of the adapter it would continue."""

    job: Job
    training: File
    validation: File | None
    start: str | None
    most_tokens: int | None


def dry_run(service: Service, tenant: str, body: CreateJob, machine: Machine = this_machine_asked) -> dict[str, Any]:
    """Return what a create would come to. Raises ApiError as the create would."""
    now = service.clock()
    with telling_problems(service):
        sources = service.db.read(lambda tx: _sources(tx, service, tenant, body, now))
    job = sources.job
    folder = Path(tempfile.mkdtemp(prefix="dry-run-", dir=service.scratch))
    try:
        whole = _fetch_beginning(service.blobs, sources.training, folder / TRAINING)
        if sources.validation is not None:
            _fetch_beginning(service.blobs, sources.validation, folder / VALIDATION)
        if sources.start is not None:
            fetch_folder(service.blobs, sources.start, folder / START)
        with (folder / "report.jsonl").open("x", encoding="utf-8") as report:
            found = outlook(job, service.config, folder, report, machine, whole)
        check_quota(found, sources.most_tokens)
    except JobRefused as refused:
        error = {"code": refused.code, "message": refused.message, "param": refused.param}
        return {**_head(job), "verdict": "refused", "fits": False, "reason": refused.message, "error": error, "warnings": []}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    new = queue.Waiting(job.id, tenant, found.planned_tokens, now)
    place = service.db.read(lambda tx: queue.position_of_new(tx, new, service.config.limits))
    refusal = None if found.plan is None else found.plan.refusal()
    return {
        **_head(job, found),
        "verdict": "fits" if found.plan is None else found.plan.verdict,
        "fits": refusal is None,
        "reason": None if refusal is None else refusal.message,
        "error": None,
        **_figures(found, service.config.bases[job.base].price.training, service.config.currency),
        "queue": None if place is None else _wait(found, place, now),
        "warnings": list(_warnings(found, whole)),
    }


def _sources(tx: Transaction, service: Service, tenant: str, body: CreateJob, now: float) -> _Sources:
    job = wished(tx, service, tenant, body, now)
    training = files.find(tx, job.training_file, tenant)
    validation = None if job.validation_file is None else files.find(tx, job.validation_file, tenant)
    assert training is not None, "wished() has found it"
    model = models.find(tx, job.model, tenant) if job.model.startswith("ft:") else None
    most = limits_of(tx, tenant, service.config.limits).training_tokens
    return _Sources(job, training, validation, None if model is None else model.manifest, most)


def _head(job: Job, found: Outlook | None = None) -> dict[str, Any]:
    kind = job.method["type"]
    shown = job.method[kind]["hyperparameters"] if found is None else found.hyperparameters.shown()
    return {
        "object": "fine_tuning.job.dry_run",
        "model": job.model,
        "base": job.base,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "method": {"type": kind, kind: {"hyperparameters": shown}},
        "hyperparameters": shown,
    }


def _figures(found: Outlook, price: float, currency: str) -> dict[str, Any]:
    rows, plan = found.examples.rows, found.plan
    assert rows is not None
    epochs = found.hyperparameters.n_epochs
    return {
        "learning_rate": found.hyperparameters.learning_rate,
        "examples": found.examples.examples,
        "held_out": found.examples.held_out,
        "longest_example": rows.longest,
        "truncated": found.examples.truncated,
        "tokens": epochs * rows.tokens,
        "trained_tokens": found.planned_tokens,
        "counted": found.counted,
        "steps": found.total_steps,
        "seconds": None if found.seconds is None else round(found.seconds, 1),
        "cost": round(found.planned_tokens * price / 1e6, 6),
        "currency": currency,
        "price_per_million_tokens": price,
        "memory": None if plan is None else _memory(plan),
        "changes": [] if plan is None else _changes(plan),
    }


def _memory(plan: Plan) -> dict[str, Any] | None:
    figures = plan.figures()
    return None if figures is None else {"bytes": figures["peak_bytes"], "available": round(plan.limit)}


def _changes(plan: Plan) -> list[dict[str, Any]]:
    return [{"what": change.what, "bytes": round(change.peak)} for change in plan.changes]


def _wait(found: Outlook, place: queue.Place, now: float) -> dict[str, Any]:
    """Return where the job would stand, and how long it would wait there."""
    wait = place.wait(found.seconds, found.planned_tokens)
    seconds, start = (None, None) if wait is None else (round(wait, 1), int(now + wait))
    return {"position": place.position, "tokens_ahead": place.tokens_ahead, "seconds": seconds, "estimated_start": start}


def _warnings(found: Outlook, whole: float) -> Iterator[str]:
    if whole > 1:
        yield f"the first {READ_BYTES >> 20} MiB of the training file were read; its figures are estimates from these"
    if not found.counted:
        yield "tokens are estimated: the base is not on this machine yet"
    if found.examples.overlap:
        yield f"{found.examples.overlap:,} validation examples are training examples too"
    if found.plan is not None:
        yield from found.plan.urgent


def _fetch_beginning(blobs: BlobStore, file: File, target: Path) -> float:
    """Write a file's first lines; return how many times as long the whole of it is."""
    if file.bytes <= READ_BYTES:
        blobs.fetch(file.blob, target)
        return 1.0
    content = b"".join(blobs.read(file.blob, 0, READ_BYTES))
    end = content.rfind(b"\n") + 1
    if not end:  # one line that is longer than all that is read: it is judged as it is
        blobs.fetch(file.blob, target)
        return 1.0
    with storage_errors(target):
        target.write_bytes(content[:end])
    return file.bytes / end
