"""A job as its worker sees it: claimed, told about, saved, ended. Every function is part of one transaction.

Whoever writes here shows a lease, which is checked first: a worker that lost its job writes nothing (StaleLease). Each function may
find that the job was cancelled meanwhile; then it writes nothing either, and the caller learns it from the status it returns. Next:
`queue.py` (whose turn it is), `tuning.py` (the job as its owner sees it), `leases.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa

from kivnun.jobs import deployments, files, leases, models, naming, queue, tuning, usage
from kivnun.jobs.config import Limits, Price
from kivnun.jobs.database import Transaction
from kivnun.jobs.files import File
from kivnun.jobs.ids import NewId
from kivnun.jobs.leases import Lease, Seen
from kivnun.jobs.models import Model
from kivnun.jobs.schema import commands, job_events, jobs, snapshots
from kivnun.jobs.schema import models as model_rows
from kivnun.jobs.states import ACTIVE, Status
from kivnun.jobs.tuning import Job, Level

SNAPSHOTS_KEPT = 2  # the newest, and one more should a blob of it turn out to be damaged
EXPOSED = 3  # last checkpoints of a job that can be called, the final one among them; the best one beside them
MAX_CRASHES = 3  # of a trainer, without a snapshot between them


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that this worker now holds."""

    lease: Lease
    job: Job


@dataclass(frozen=True, slots=True)
class Told:
    """What the owner of a job is told. With `step`, it is told once: again only what comes after `jobs.step`."""

    message: str
    level: Level = "info"
    type: Literal["message", "metrics"] = "message"
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    step: int | None = None
    trained_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A row of `snapshots`."""

    step: int
    manifest: str


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that is in the store: the blob of its manifest, its content hash, what was measured at its step."""

    step: int
    manifest: str
    content_hash: str
    metrics: Mapping[str, Any]


def lease_name(job_id: str) -> str:
    return f"job:{job_id}"


# --- which job --------------------------------------------------------------------------------------------------------------


def left_alone(tx: Transaction) -> list[tuple[str, Seen]]:
    """Return the jobs that a worker holds or held, with their leases: those that run, and those cancelled and not yet settled."""
    unsettled = sa.select(commands.c.job).where(commands.c.applied_at.is_(None), commands.c.kind == "cancel")
    query = sa.select(jobs.c.id).where(jobs.c.status.in_([*ACTIVE]) | ((jobs.c.status == "cancelled") & jobs.c.id.in_(unsettled)))
    ids = list(tx.execute(query.order_by(jobs.c.started_at, jobs.c.id)).scalars())
    seen = leases.look(tx, [lease_name(job_id) for job_id in ids])
    return [(job_id, seen.get(lease_name(job_id), Seen(lease_name(job_id), 0, None, 0))) for job_id in ids]


def take_over(
    tx: Transaction, job_id: str, seen: Seen, owner: str, prices: Mapping[str, Price], now: float, new_id: NewId
) -> Claim | None:
    """Take a job whose holder is dead. One that only had to be stopped is stopped; return the claim of one that is to go on."""
    lease = leases.claim(tx, lease_name(job_id), owner, seen)
    job = tuning.find(tx, job_id)
    if lease is None or job is None:
        return None
    if job.status == "running":
        at = newest_step(tx, job_id)
        tuning.append_event(tx, job_id, now, f"Worker lost, resumed from step {at}", new_id, level="warn")
        return Claim(lease, job)
    if job.status == "pausing":
        pause(tx, lease, job_id, now, new_id)
    elif job.status == "cancelled":
        settle_cancelled(tx, lease, job_id, prices, now)
    else:
        leases.release(tx, lease)
    return None


def something_waits(tx: Transaction, limits: Limits) -> bool:
    """Return whether there is a queued job that may begin."""
    return queue.read_line(tx, limits).next() is not None


def claim_next(tx: Transaction, owner: str, limits: Limits, now: float, new_id: NewId) -> Claim | None:
    """Take the job whose turn it is; None where there is none."""
    job_id = queue.begin_next(tx, limits)
    if job_id is None:
        return None
    lease = leases.claim(tx, lease_name(job_id), owner)
    assert lease is not None, "a queued job is held by nobody"
    job = tuning.find(tx, job_id)
    assert job is not None
    began = job.started_at is not None
    job = tuning.move(tx, job, "running", now, new_id, started_at=job.started_at if began else now)
    said = f"Fine-tuning job resumed from step {newest_step(tx, job_id)}" if began else "Fine-tuning job started"
    tuning.append_event(tx, job_id, now, said, new_id)
    return Claim(lease, job)


def cancelled(tx: Transaction, held: Iterable[Lease]) -> list[Lease]:
    """Return those of a worker's leases whose jobs were cancelled."""
    names = {lease.name.partition(":")[2]: lease for lease in held}
    query = sa.select(jobs.c.id).where(jobs.c.id.in_(list(names)), jobs.c.status == "cancelled")
    return [names[job_id] for job_id in tx.execute(query).scalars()]


# --- as it goes -------------------------------------------------------------------------------------------------------------


def held(tx: Transaction, lease: Lease, job_id: str) -> Job:
    """Return the job as it is. Raises StaleLease: the first statement of all that follows."""
    leases.check(tx, lease)
    job = tuning.find(tx, job_id)
    assert job is not None, "jobs are never deleted"
    return job


def tell(
    tx: Transaction, lease: Lease, job_id: str, told: Iterable[Told], estimated_finish: float | None, now: float, new_id: NewId
) -> Status:
    """Add what is told to the job's events, and its steps and their tokens to the job; return the job's status."""
    job = held(tx, lease, job_id)
    if job.status not in ACTIVE:
        return job.status
    step, tokens = job.step, job.trained_tokens
    for item in told:
        if item.step is not None and item.step <= step:
            continue
        tuning.append_event(tx, job_id, now, item.message, new_id, level=item.level, type=item.type, data=item.data)
        if item.step is not None:
            step, tokens = item.step, tokens + item.trained_tokens
    tuning.update(tx, job_id, step=step, trained_tokens=tokens, estimated_finish=estimated_finish)
    return job.status


def metrics_told(tx: Transaction, job_id: str, after: int = 0) -> dict[int, dict[str, Any]]:
    """Return what was told of each step after one, up to `jobs.step`; of one told again after a job was started over the last."""
    step = job_events.c.data["step"].as_integer()
    last = sa.select(jobs.c.step).where(jobs.c.id == job_id).scalar_subquery()
    query = sa.select(job_events.c.data).where(
        job_events.c.job == job_id, job_events.c.type == "metrics", step > after, step <= last
    )
    return {data["step"]: data for data in tx.execute(query.order_by(job_events.c.number)).scalars()}


def first_step_at(tx: Transaction, job_id: str) -> int:
    """Return the number of the event that told of the first step, the last such where a job was started over; 0: none did."""
    first = (job_events.c.job == job_id) & (job_events.c.type == "metrics") & (job_events.c.data["step"].as_integer() == 1)
    return tx.execute(sa.select(sa.func.max(job_events.c.number)).where(first)).scalar() or 0


def metrics_page(tx: Transaction, job_id: str, number: int, limit: int) -> list[tuple[int, dict[str, Any]]]:
    """Return what was told of steps from an event's number on, in order, each with its event's number."""
    at = job_events.c
    query = sa.select(at.number, at.data).where(at.job == job_id, at.type == "metrics", at.number >= number)
    return [(row.number, row.data) for row in tx.execute(query.order_by(at.number).limit(limit))]


def messages_told(tx: Transaction, job_id: str) -> frozenset[str]:
    """Return every message of the job's events that is no step's."""
    query = sa.select(job_events.c.message).where(job_events.c.job == job_id, job_events.c.type == "message")
    return frozenset(tx.execute(query).scalars())


def newest(tx: Transaction, job_id: str) -> Sequence[Snapshot]:
    """Return the job's snapshots, the one to go on from first."""
    query = sa.select(snapshots.c.step, snapshots.c.manifest).where(snapshots.c.job == job_id)
    rows = tx.execute(query.order_by(snapshots.c.step.desc(), snapshots.c.epoch.desc()))
    return [Snapshot(row.step, row.manifest) for row in rows]


def newest_step(tx: Transaction, job_id: str) -> int:
    return tx.execute(sa.select(sa.func.max(snapshots.c.step)).where(snapshots.c.job == job_id)).scalar() or 0


def commit(
    tx: Transaction,
    lease: Lease,
    job_id: str,
    snapshot: Snapshot | None,
    exposed: Adapter | None,
    organization: str,
    now: float,
    new_id: NewId,
) -> Status:
    """Record a snapshot, and with it the checkpoint that can be called from now on. Older snapshots than the last two go.

    Either may be None: a run that saves faster than it is read has replaced the one, or is not at an epoch's end."""
    job = held(tx, lease, job_id)
    if job.status not in ACTIVE:
        return job.status
    if snapshot is not None:
        _add_snapshot(tx, lease, job_id, snapshot, now)
    if exposed is not None:
        expose(tx, job, exposed, organization, now, new_id)
    return job.status


def _add_snapshot(tx: Transaction, lease: Lease, job_id: str, snapshot: Snapshot, now: float) -> None:
    key = (snapshots.c.job == job_id) & (snapshots.c.epoch == lease.epoch) & (snapshots.c.step == snapshot.step)
    if tx.execute(sa.select(snapshots.c.step).where(key)).first() is None:
        row = {"job": job_id, "epoch": lease.epoch, "created_at": now, "step": snapshot.step, "manifest": snapshot.manifest}
        tx.execute(sa.insert(snapshots).values(**row))
        tuning.update(tx, job_id, crashes=0)
    query = sa.select(snapshots.c.epoch, snapshots.c.step).where(snapshots.c.job == job_id)
    rows = tx.execute(query.order_by(snapshots.c.step.desc(), snapshots.c.epoch.desc())).all()
    for row in rows[SNAPSHOTS_KEPT:]:
        key = (snapshots.c.job == job_id) & (snapshots.c.epoch == row.epoch) & (snapshots.c.step == row.step)
        tx.execute(sa.delete(snapshots).where(key))


def expose(tx: Transaction, job: Job, adapter: Adapter, organization: str, now: float, new_id: NewId) -> None:
    """Make a checkpoint of the job callable, unless it is; of those before it the last ones stay, the one of the lowest loss on all
    validation examples, and any that is still used."""
    name = naming.checkpoint_name(job, organization, adapter.step)
    if tx.execute(sa.select(model_rows.c.id).where(model_rows.c.id == name)).first() is not None:
        return
    models.add(tx, _model(name, job, adapter, now, new_id("ftckpt_")))
    tuning.append_event(tx, job.id, now, f"Checkpoint created at step {adapter.step}", new_id, data={"step": adapter.step})
    of_job = (model_rows.c.job == job.id) & model_rows.c.checkpoint.is_not(None) & model_rows.c.deleted_at.is_(None)
    shown = tx.execute(sa.select(model_rows.c.id, model_rows.c.metrics).where(of_job).order_by(model_rows.c.step.desc())).all()
    losses = {row.id: row.metrics["full_valid_loss"] for row in shown if row.metrics.get("full_valid_loss") is not None}
    best = min(losses, key=losses.__getitem__, default=None)  # of equal ones the last
    for old in (row.id for row in shown[EXPOSED:] if row.id != best):
        if not models.jobs_from(tx, old, job.tenant) and not deployments.of_model(tx, job.tenant, old):
            models.delete(tx, old, job.tenant, now)


def _model(name: str, job: Job, adapter: Adapter, now: float, checkpoint: str | None) -> Model:
    return Model(
        name,
        job.tenant,
        now,
        job.id,
        job.base,
        adapter.step,
        adapter.manifest,
        adapter.content_hash,
        checkpoint,
        dict(adapter.metrics),
    )


def start_over(tx: Transaction, lease: Lease, job_id: str, now: float, new_id: NewId) -> Status:
    """Forget how far a job is: what runs it now could not go on to the same bits. Its steps are told anew, and charged once.

    Its checkpoints go too, so that the new run's are under their names; those that are in use stay as they are."""
    job = held(tx, lease, job_id)
    if job.status in ACTIVE:
        tx.execute(sa.delete(snapshots).where(snapshots.c.job == job_id))
        for shown in tx.execute(sa.select(model_rows.c.id).where(model_rows.c.job == job_id)).scalars().all():
            if not models.jobs_from(tx, shown, job.tenant) and not deployments.of_model(tx, job.tenant, shown):
                tx.execute(sa.delete(model_rows).where(model_rows.c.id == shown))
        tuning.update(tx, job_id, step=0, trained_tokens=0, estimated_finish=None)
        said = (
            "The service's machine or software has changed: the training starts over, so that its result is that of one whole run;"
            " its checkpoints are made anew, but for those that a deployment or another job uses"
        )
        tuning.append_event(tx, job_id, now, said, new_id, level="warn")
    return job.status


def crashed(tx: Transaction, lease: Lease, job_id: str) -> int:
    """Count a crash of the job's trainer; return how many there were since its last snapshot."""
    job = held(tx, lease, job_id)
    tuning.update(tx, job_id, crashes=job.crashes + 1)
    return job.crashes + 1


# --- ends -------------------------------------------------------------------------------------------------------------------


def pause(tx: Transaction, lease: Lease, job_id: str, now: float, new_id: NewId) -> Status:
    """Let a job rest that was asked to pause; its snapshot is recorded already. Return the job's status."""
    job = held(tx, lease, job_id)
    if job.status == "pausing":
        queue.give_back(tx, job.tenant, queue.left_of(job.planned_tokens, job.trained_tokens))
        tuning.apply_commands(tx, job_id, now)
        job = tuning.move(tx, job, "paused", now, new_id, estimated_finish=None)
        tuning.append_event(tx, job_id, now, f"Job paused at step {newest_step(tx, job_id)}", new_id)
        leases.release(tx, lease)
    return job.status


def hand_back(tx: Transaction, lease: Lease, job_id: str, prices: Mapping[str, Price], now: float, new_id: NewId) -> Status:
    """Let go of a job because its worker ends; return its status. A running one goes back where it stood in its tenant's line,
    for another worker to go on with; one that was asked to pause or was cancelled in between becomes what it was asked to."""
    job = held(tx, lease, job_id)
    if job.status == "pausing":
        return pause(tx, lease, job_id, now, new_id)
    if job.status == "cancelled":
        settle_cancelled(tx, lease, job_id, prices, now)
    elif job.status == "running":
        queue.give_back(tx, job.tenant, queue.left_of(job.planned_tokens, job.trained_tokens))
        job = tuning.move(tx, job, "queued", now, new_id, estimated_finish=None)
        said = f"Worker is shutting down, job goes on from step {newest_step(tx, job_id)}"
        tuning.append_event(tx, job_id, now, said, new_id)
        leases.release(tx, lease)
    return job.status


def settle_cancelled(tx: Transaction, lease: Lease, job_id: str, prices: Mapping[str, Price], now: float) -> None:
    """Charge what was trained of a cancelled job, once, and let go of it. Its checkpoints stay."""
    job = held(tx, lease, job_id)
    assert job.status == "cancelled"
    if "cancel" in tuning.unapplied(tx, job_id):
        _charge(tx, job, prices, now)
        tuning.apply_commands(tx, job_id, now)
    leases.release(tx, lease)


def fail(
    tx: Transaction, lease: Lease, job_id: str, code: str, message: str, param: str | None, now: float, new_id: NewId
) -> Status:
    """End a job that cannot go on; nothing is charged. Return the job's status."""
    job = held(tx, lease, job_id)
    if job.status in ACTIVE:
        queue.give_back(tx, job.tenant, queue.left_of(job.planned_tokens, job.trained_tokens))
        tuning.apply_commands(tx, job_id, now)
        tuning.append_event(tx, job_id, now, f"The job failed: {message}", new_id, level="error", data={"code": code})
        job = tuning.move(tx, job, "failed", now, new_id, error={"code": code, "message": message, "param": param})
        leases.release(tx, lease)
    return job.status


def succeed(
    tx: Transaction,
    lease: Lease,
    job_id: str,
    adapter: Adapter,
    results: Sequence[File],
    organization: str,
    prices: Mapping[str, Price],
    now: float,
    new_id: NewId,
) -> Status:
    """End a job well: its model, its last checkpoint, its files, its price, its status and events, all or nothing."""
    job = held(tx, lease, job_id)
    if job.status not in ACTIVE:
        return job.status
    name = naming.model_name(job, organization)
    expose(tx, job, adapter, organization, now, new_id)
    models.add(tx, _model(name, job, adapter, now, None))
    for file in results:
        files.add(tx, file)
    _charge(tx, job, prices, now)
    tuning.apply_commands(tx, job_id, now)
    tuning.append_event(tx, job_id, now, f"New fine-tuned model created: {name}", new_id, data={"model": name})
    tuning.append_event(tx, job_id, now, "The job has successfully completed", new_id)
    report = job.facts.get("report_file")
    ids = [*(file.id for file in results), *([report] if report else [])]
    job = tuning.move(tx, job, "succeeded", now, new_id, tuned_model=name, result_files=ids)
    leases.release(tx, lease)
    return job.status


def _charge(tx: Transaction, job: Job, prices: Mapping[str, Price], now: float) -> None:
    """Charge a job by the price that it was queued with; `prices` are for jobs that were queued without being validated."""
    price = job.facts.get("price", prices[job.base].training if job.base in prices else 0.0)
    usage.record(tx, job.tenant, "training", job.base, job.model, job.trained_tokens, price, now, job=job.id)
