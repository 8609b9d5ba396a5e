"""A job as those who asked for it see it: made, listed, commanded, its events read. Every function is part of one transaction.

What a worker does to a job is in `running.py`. Each change of a status writes its event, and what others are told, in the same
transaction. Next: `states.py`, `leases.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import sqlalchemy as sa

from kivnun.jobs import queue
from kivnun.jobs.database import Transaction, holds
from kivnun.jobs.ids import NewId
from kivnun.jobs.schema import commands, files, job_events, jobs, models, outbox
from kivnun.jobs.states import ACTIVE, TERMINAL, Command, Status, after_command, may_follow

Level = Literal["info", "warn", "error"]
TOLD: dict[Status, str] = {
    "succeeded": "fine_tuning.job.succeeded", "failed": "fine_tuning.job.failed", "cancelled": "fine_tuning.job.cancelled",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """A row of `jobs`; see the comments in `schema.py`. Times in seconds since 1970.

    `facts` is what judging the files came to: learning_rate, examples, tokens, trained_tokens (of one epoch), held_out, overlap,
    truncated, refused, price (of a million trained tokens, as it was then), and report_file, the id of the file that tells it line
    by line."""

    id: str
    tenant: str
    created_at: float
    model: str
    base: str
    training_file: str
    method: dict[str, Any]
    seed: int
    status: Status = "validating_files"
    validation_file: str | None = None
    suffix: str | None = None
    metadata: dict[str, str] | None = None
    integrations: list[dict[str, Any]] | None = None
    extensions: dict[str, Any] = field(default_factory=dict[str, Any])
    hyperparameters: dict[str, Any] = field(default_factory=dict[str, Any])
    spec: str | None = None
    total_steps: int | None = None
    planned_tokens: int | None = None
    planned_seconds: float | None = None
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    queued_at: float | None = None
    started_at: float | None = None
    finished_at: float | None = None
    estimated_finish: float | None = None
    step: int = 0
    trained_tokens: int = 0
    crashes: int = 0
    num_events: int = 0
    tuned_model: str | None = None
    result_files: list[str] = field(default_factory=list[str])
    error: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class JobEvent:
    """A row of `job_events`. `number` counts from 1 without gaps."""

    job: str
    number: int
    id: str
    created_at: float
    level: Level
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any]


def create(tx: Transaction, job: Job, new_id: NewId) -> None:
    """Record a new job and that it was made."""
    tx.execute(sa.insert(jobs).values(**{column.name: getattr(job, column.name) for column in fields(Job)}))
    append_event(tx, job.id, job.created_at, f"Created fine-tuning job: {job.id}", new_id)


def find(tx: Transaction, job_id: str, tenant: str | None = None) -> Job | None:
    """Return a job by its id; with `tenant`, None where it is another's."""
    query = sa.select(jobs).where(jobs.c.id == job_id)
    if tenant is not None:
        query = query.where(jobs.c.tenant == tenant)
    row = tx.execute(query).mappings().one_or_none()
    return None if row is None else Job(**row)


def page(
    tx: Transaction, tenant: str, limit: int, after: str | None = None, metadata: Mapping[str, str] | None = None
) -> tuple[list[Job], bool]:
    """Return a tenant's jobs, newest first, and whether more follow. `after` is the id of the last one already had.

    `metadata` keeps the jobs that hold each of its pairs; an empty mapping, those that hold none."""
    query = sa.select(jobs).where(jobs.c.tenant == tenant).order_by(jobs.c.created_at.desc(), jobs.c.id.desc())
    if after is not None:
        last = find(tx, after, tenant)
        if last is None:
            return [], False
        query = query.where(sa.tuple_(jobs.c.created_at, jobs.c.id) < sa.tuple_(sa.literal(last.created_at), sa.literal(last.id)))
    if metadata is not None:
        query = query.where(_holds(tx, metadata))
    found = [Job(**row) for row in tx.execute(query.limit(limit + 1)).mappings()]
    return found[:limit], len(found) > limit


def _holds(tx: Transaction, wanted: Mapping[str, str]) -> sa.ColumnElement[bool]:
    """Return that a job's metadata holds pairs, or has none where none are wanted. A key is compared as a value, never as a path
    of JSON: it may hold any letters."""
    each = sa.func.json_each if tx.dialect.name == "sqlite" else sa.func.json_each_text
    known = sa.cast(jobs.c.metadata, sa.Text).startswith("{")  # else it is null, which PostgreSQL takes no pairs from
    pair = each(sa.case((known, jobs.c.metadata), else_=sa.literal_column("'{}'"))).table_valued("key", "value")
    held = sa.select(sa.literal(1)).select_from(pair)
    if not wanted:
        return ~held.exists()
    if not all(map(holds, (*wanted.keys(), *wanted.values()))):
        return sa.false()
    return sa.and_(*(held.where(pair.c.key == key, pair.c.value == value).exists() for key, value in wanted.items()))


def update(tx: Transaction, job_id: str, **values: Any) -> None:
    """Change columns of a job. Its status is changed by `move` alone."""
    assert "status" not in values
    tx.execute(sa.update(jobs).where(jobs.c.id == job_id).values(**values))


def move(tx: Transaction, job: Job, status: Status, now: float, new_id: NewId, **values: Any) -> Job:
    """Change a job's status and columns with it; at an end, write to the outbox who is to hear of it."""
    assert may_follow(job.status, status), f"{job.status} -> {status}"
    if status in TERMINAL:
        values = {"finished_at": now, "estimated_finish": None, **values}
    tx.execute(sa.update(jobs).where(jobs.c.id == job.id).values(status=status, **values))
    if status in TOLD:
        tx.execute(
            sa.insert(outbox).values(id=new_id("evt_"), tenant=job.tenant, created_at=now, type=TOLD[status], data={"id": job.id})
        )
    moved = find(tx, job.id)
    assert moved is not None
    return moved


def command(tx: Transaction, job: Job, kind: Command, now: float, new_id: NewId) -> Job | None:
    """Carry out a command and return the job as it then is; None where its status does not allow it.

    A worker that runs the job finds the command by `unapplied`, and stops computing."""
    status = after_command(job.status, kind)
    if status is None or status == job.status:
        return None if status is None else job
    # A worker stops the trainer; and it charges what was trained of a job that is cancelled, whether that runs now or waits.
    working = job.status in ("running", "pausing") or (kind == "cancel" and job.step > 0)
    tx.execute(
        sa.insert(commands).values(id=new_id("cmd_"), job=job.id, created_at=now, kind=kind, applied_at=None if working else now)
    )
    if kind == "cancel" and job.status in ACTIVE:  # one that waits gave back what is left of it when it stopped
        queue.give_back(tx, job.tenant, queue.left_of(job.planned_tokens, job.trained_tokens))
    values: dict[str, Any] = {"queued_at": now} if status == "queued" else {}
    job = move(tx, job, status, now, new_id, **values)
    said = {"pausing": "Job is pausing: the step in progress is finished and saved", "paused": "Job paused",
            "queued": "Job resumed, moving job to queued state", "cancelled": "Job cancelled"}  # fmt: skip
    append_event(tx, job.id, now, said[status], new_id)
    return job


def last_command(tx: Transaction, job_id: str) -> str | None:
    """Return the kind of a job's newest command; None where it had none."""
    query = sa.select(commands.c.kind).where(commands.c.job == job_id)
    return tx.execute(query.order_by(commands.c.created_at.desc(), commands.c.id.desc()).limit(1)).scalar_one_or_none()


def append_event(
    tx: Transaction,
    job_id: str,
    now: float,
    message: str,
    new_id: NewId,
    *,
    level: Level = "info",
    type: Literal["message", "metrics"] = "message",
    data: Mapping[str, Any] | None = None,
) -> None:
    """Add an event to a job, with the next number."""
    number = tx.execute(
        sa.update(jobs).where(jobs.c.id == job_id).values(num_events=jobs.c.num_events + 1).returning(jobs.c.num_events)
    ).scalar_one()
    tx.execute(
        sa.insert(job_events).values(
            job=job_id,
            number=number,
            id=new_id("ftevent-"),
            created_at=now,
            level=level,
            type=type,
            message=message,
            data=dict(data or {}),
        )
    )


def events_page(tx: Transaction, job_id: str, limit: int, after: str | None = None) -> tuple[list[JobEvent], bool]:
    """Return a job's events, newest first, and whether older ones follow. `after` is the id of the last one already had."""
    query = sa.select(job_events).where(job_events.c.job == job_id).order_by(job_events.c.number.desc()).limit(limit + 1)
    if after is not None:
        number = tx.execute(sa.select(job_events.c.number).where(job_events.c.job == job_id, job_events.c.id == after)).scalar()
        if number is None:
            return [], False
        query = query.where(job_events.c.number < number)
    found = [JobEvent(**row) for row in tx.execute(query).mappings()]
    return found[:limit], len(found) > limit


def unapplied(tx: Transaction, job_id: str) -> Sequence[str]:
    """Return the kinds of the commands that a worker has yet to act upon, the oldest first."""
    query = sa.select(commands.c.kind).where(commands.c.job == job_id, commands.c.applied_at.is_(None))
    return list(tx.execute(query.order_by(commands.c.created_at, commands.c.id)).scalars())


def apply_commands(tx: Transaction, job_id: str, now: float) -> None:
    """Mark a job's commands as acted upon."""
    tx.execute(sa.update(commands).where(commands.c.job == job_id, commands.c.applied_at.is_(None)).values(applied_at=now))


def num_waiting(tx: Transaction, tenant: str) -> int:
    """Return how many of a tenant's jobs have neither begun nor ended."""
    waiting = ("validating_files", "queued", "paused")
    return tx.execute(sa.select(sa.func.count()).where(jobs.c.tenant == tenant, jobs.c.status.in_(waiting))).scalar_one()


def to_validate(tx: Transaction, least_bytes: int = 0, below_bytes: int | None = None, of_each: int = 1) -> list[Job]:
    """Return jobs whose files are judged and that have not been validated themselves: the oldest `of_each` tenant.

    The bounds are of its training file, one that was deleted counting as empty."""
    of_job = sa.or_(files.c.id == jobs.c.training_file, files.c.id == jobs.c.validation_file)
    unjudged = sa.exists().where(of_job, files.c.status == "uploaded", files.c.deleted_at.is_(None))
    size = sa.func.coalesce(files.c.bytes, 0)
    order = (jobs.c.created_at, jobs.c.id)
    place = sa.func.row_number().over(partition_by=jobs.c.tenant, order_by=order).label("place")
    query = sa.select(jobs.c.id, place).outerjoin(files, files.c.id == jobs.c.training_file).where(size >= least_bytes)
    if below_bytes is not None:
        query = query.where(size < below_bytes)
    # The subquery looks at the files of its job again, not at the row that is joined.
    placed = query.where(jobs.c.status == "validating_files", sa.not_(unjudged.correlate(jobs))).subquery()
    first = sa.select(jobs).join(placed, placed.c.id == jobs.c.id).where(placed.c.place <= of_each)
    return [Job(**row) for row in tx.execute(first.order_by(*order)).mappings()]


def model_of_checkpoint(tx: Transaction, checkpoint: str, tenant: str) -> str | None:
    """Return the name of a tenant's model by its checkpoint's id; None where there is none."""
    mine = (models.c.checkpoint == checkpoint, models.c.tenant == tenant, models.c.deleted_at.is_(None))
    return tx.execute(sa.select(models.c.id).where(*mine)).scalar_one_or_none()
