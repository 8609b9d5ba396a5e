"""Batches as rows: asked for, listed, cancelled, answered line by line, closed. Every function is part of one transaction.

An answer is recorded once, with its batch's counts, so that a batch that is resumed asks only for the lines that have none. A batch
ends in the transaction that names its output files and tells of it. Next: `schema.py`, `kivnun/service/batching.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import sqlalchemy as sa

from kivnun.jobs import files, usage, webhooks
from kivnun.jobs.database import Transaction
from kivnun.jobs.files import File
from kivnun.jobs.ids import NewId
from kivnun.jobs.schema import api_keys, batch_answers, batches
from kivnun.jobs.usage import Charge

BatchStatus = Literal["validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"]
Ending = Literal["completed", "expired", "cancelled"]
Dialect = Literal["openai", "azure"]

TERMINAL: frozenset[BatchStatus] = frozenset({"completed", "failed", "expired", "cancelled"})
CANCELLABLE: frozenset[BatchStatus] = frozenset({"validating", "in_progress", "finalizing"})
WINDOW_S = 24 * 3600.0

_TOLD: dict[BatchStatus, webhooks.EventType] = {
    "completed": "batch.completed", "failed": "batch.failed", "expired": "batch.expired", "cancelled": "batch.cancelled",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Batch:
    """A row of `batches`; see the comments in `schema.py`. `times` holds `expires_at`, and `STATUS_at` of every status it had."""

    id: str
    tenant: str
    created_at: float
    endpoint: str
    api_key: str
    input_file: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: int | None = None
    status: BatchStatus = "validating"
    model: str | None = None
    errors: list[dict[str, Any]] | None = None
    usage: dict[str, int] | None = None
    output_file: str | None = None
    error_file: str | None = None
    times: dict[str, float] = field(default_factory=dict[str, float])
    total: int = 0
    completed: int = 0
    failed: int = 0
    dialect: Dialect = "openai"

    @property
    def expires_at(self) -> float:
        return self.times["expires_at"]


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """The line of the output file (`ok`) or of the error file that answers a line of the input."""

    line: int
    ok: bool
    body: dict[str, Any]
    charge: Charge | None = None  # until it is recorded


def create(tx: Transaction, batch: Batch) -> None:
    values = {column.name: getattr(batch, column.name) for column in fields(Batch)}
    values["times"] = {"expires_at": batch.created_at + WINDOW_S}
    tx.execute(sa.insert(batches).values(values))


def find(tx: Transaction, batch_id: str, tenant: str) -> Batch | None:
    """Return a batch; None where it is another tenant's or not there at all."""
    row = tx.execute(sa.select(batches).where(batches.c.id == batch_id, batches.c.tenant == tenant)).mappings().one_or_none()
    return None if row is None else Batch(**row)


def page(tx: Transaction, tenant: str, limit: int, after: str | None = None) -> tuple[list[Batch], bool]:
    """Return a tenant's batches, newest first, and whether more follow. `after` is the id of the last one already had."""
    at = batches.c
    query = sa.select(batches).where(at.tenant == tenant).order_by(at.created_at.desc(), at.id.desc()).limit(limit + 1)
    if after is not None:
        last = find(tx, after, tenant)
        if last is None:
            return [], False
        query = query.where(sa.tuple_(at.created_at, at.id) < sa.tuple_(sa.literal(last.created_at), sa.literal(last.id)))
    found = [Batch(**row) for row in tx.execute(query).mappings()]
    return found[:limit], len(found) > limit


def open_batches(tx: Transaction) -> list[Batch]:
    """Return the batches of all tenants that have not ended, the oldest first."""
    query = sa.select(batches).where(batches.c.status.not_in(TERMINAL)).order_by(batches.c.created_at, batches.c.id)
    return [Batch(**row) for row in tx.execute(query).mappings()]


def of_revoked_keys(tx: Transaction) -> set[str]:
    """Return the ids of the batches that have not ended and whose key was revoked; one that merely expired is none."""
    query = sa.select(batches.c.id).join(api_keys, api_keys.c.id == batches.c.api_key)
    return set(tx.execute(query.where(batches.c.status.not_in(TERMINAL), api_keys.c.revoked_at.is_not(None))).scalars())


def num_open(tx: Transaction, tenant: str) -> int:
    """Return how many of a tenant's batches have not ended."""
    query = sa.select(sa.func.count()).where(batches.c.tenant == tenant, batches.c.status.not_in(TERMINAL))
    return tx.execute(query).scalar_one()


def cancel(tx: Transaction, batch: Batch, now: float) -> Batch | None:
    """Ask for a batch's end and return it as it then is; None where it has ended otherwise. Asking again changes nothing."""
    if batch.status in ("cancelling", "cancelled"):
        return batch
    return _move(tx, batch, "cancelling", now) if batch.status in CANCELLABLE else None


def begin(tx: Transaction, batch: Batch, total: int, model: str | None, now: float) -> Batch | None:
    """Let a batch whose lines are as they should be be answered; None where it was cancelled meanwhile."""
    current = find(tx, batch.id, batch.tenant)
    if current is None or current.status != "validating":
        return None
    return _move(tx, current, "in_progress", now, total=total, model=model)


def fail(tx: Transaction, batch: Batch, errors: Sequence[dict[str, Any]], now: float, new_id: NewId) -> None:
    """End a batch that cannot be answered, and say why. One that has answers is closed instead: nothing here changes it."""
    current = find(tx, batch.id, batch.tenant)
    if current is not None and current.status not in TERMINAL and not current.completed + current.failed:
        _move(tx, current, "failed", now, errors=list(errors))
        _tell(tx, current, "failed", now, new_id)


def answered(tx: Transaction, batch_id: str) -> set[int]:
    """Return the lines that have an answer."""
    return set(tx.execute(sa.select(batch_answers.c.line).where(batch_answers.c.batch == batch_id)).scalars())


def record(tx: Transaction, batch: Batch, answers: Sequence[LineAnswer], now: float) -> None:
    """Record answers, count and charge them. A line that has one keeps it; a batch that has ended takes none.

    So a line is paid once, however often a crash had it asked."""
    current = find(tx, batch.id, batch.tenant)
    if current is None or current.status not in ("in_progress", "cancelling"):
        return
    lines = [answer.line for answer in answers]
    query = sa.select(batch_answers.c.line).where(batch_answers.c.batch == batch.id, batch_answers.c.line.in_(lines))
    known = set(tx.execute(query).scalars())
    new = [answer for answer in answers if answer.line not in known]
    if not new:
        return
    tx.execute(
        sa.insert(batch_answers),
        [{"batch": batch.id, "line": answer.line, "ok": answer.ok, "body": answer.body} for answer in new],
    )
    usage.charge(tx, [answer.charge for answer in new if answer.charge is not None], now)
    good = sum(answer.ok for answer in new)
    counts = {"completed": batches.c.completed + good, "failed": batches.c.failed + len(new) - good}
    tx.execute(sa.update(batches).where(batches.c.id == batch.id).values(counts))


def finalize(tx: Transaction, batch: Batch, now: float) -> None:
    """Mark a batch as answered in all its lines, whose files are being written."""
    current = find(tx, batch.id, batch.tenant)
    if current is not None and current.status == "in_progress" and current.completed + current.failed == current.total:
        _move(tx, current, "finalizing", now)


def answers_after(tx: Transaction, batch_id: str, line: int, limit: int) -> list[LineAnswer]:
    """Return the answers of the lines that follow `line`, in the order of the input."""
    at = batch_answers.c
    query = sa.select(at.line, at.ok, at.body).where(at.batch == batch_id, at.line > line).order_by(at.line).limit(limit)
    return [LineAnswer(*row) for row in tx.execute(query)]


def close(
    tx: Transaction,
    batch: Batch,
    ending: Ending,
    written: tuple[int, int],
    output: File | None,
    error: File | None,
    usage: dict[str, int],
    now: float,
    new_id: NewId,
    errors: Sequence[dict[str, Any]] = (),
) -> bool:
    """End a batch with its files, which alone hold its answers from now on, and with what stopped it, if anything did.

    False, and nothing, where it is not in the status any more that it was closed from, or where the files lack an answer:
    `written` counts the good and the bad ones in them."""
    current = find(tx, batch.id, batch.tenant)
    if current is None or current.status != batch.status or (current.completed, current.failed) != written:
        return False
    for file in (output, error):
        if file is not None:
            files.add(tx, file)
    named = {"output_file": output.id if output else None, "error_file": error.id if error else None}
    _move(tx, current, ending, now, usage=usage, errors=list(errors) or None, **named)
    _forget_answers(tx, current)
    _tell(tx, current, ending, now, new_id)
    return True


def _move(tx: Transaction, batch: Batch, status: BatchStatus, now: float, **values: Any) -> Batch:
    times = {**batch.times, f"{status}_at": now}
    tx.execute(sa.update(batches).where(batches.c.id == batch.id).values(status=status, times=times, **values))
    moved = find(tx, batch.id, batch.tenant)
    assert moved is not None
    return moved


def _tell(tx: Transaction, batch: Batch, status: BatchStatus, now: float, new_id: NewId) -> None:
    webhooks.tell(tx, batch.tenant, _TOLD[status], batch.id, now, new_id)


def _forget_answers(tx: Transaction, batch: Batch) -> None:
    """Remove the answers of a batch that has ended: who deletes its files has deleted them all."""
    tx.execute(sa.delete(batch_answers).where(batch_answers.c.batch == batch.id))
