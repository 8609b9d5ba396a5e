"""The inference workers that can be reached: a row of each, which counts up a beat for as long as its worker lives.

As with a lease, no clock is compared with another's: whoever reads a row watches the beat, and takes the worker for lost once it
has stood still for a term by the reader's own clock. A row says which machine it was written on: of a socket that is that
machine's alone, nothing can be told from another. Next: `../worker/answer.py` (who writes), `../service/answers.py` (who reads).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa

from kivnun.jobs.database import Transaction
from kivnun.jobs.schema import answerers

BEAT_S = 2.0
TERM_S = 15.0  # a beat that stands still for so long is a lost worker's
SWEPT_S = 120.0  # and after so long its row is removed


@dataclass(frozen=True, slots=True)
class Answerer:
    """A worker as its row says it. `where` is unix:PATH or HOST:PORT."""

    id: str
    base: str
    where: str
    machine: str
    created_at: float
    secret: str = field(repr=False)
    beat: int = 0


def this_machine() -> str:
    """Return what two processes have in common that can reach each other by 127.0.0.1: the kernel's start, and its network."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}:{os.stat('/proc/self/ns/net').st_ino}"


def show(tx: Transaction, worker: Answerer, beat: int) -> None:
    """Write that a worker lives; its row is made where it is not there (any more)."""
    beaten = tx.execute(sa.update(answerers).where(answerers.c.id == worker.id).values(beat=beat))
    if not beaten.rowcount:
        row = {"id": worker.id, "base": worker.base, "address": worker.where, "machine": worker.machine, "secret": worker.secret}
        tx.execute(sa.insert(answerers).values(**row, created_at=worker.created_at, beat=beat))


def forget(tx: Transaction, worker: str) -> None:
    tx.execute(sa.delete(answerers).where(answerers.c.id == worker))


def page(tx: Transaction, base: str | None = None) -> list[Answerer]:
    """Return the workers of a base, or all, the newest first."""
    query = sa.select(answerers).order_by(answerers.c.created_at.desc())
    rows = tx.execute(query if base is None else query.where(answerers.c.base == base))
    return [Answerer(row.id, row.base, row.address, row.machine, row.created_at, row.secret, row.beat) for row in rows]


@dataclass(slots=True)
class Stillness:
    """Tells for how long beats have stood still. `clock` gives seconds and never goes back (time.monotonic)."""

    clock: Callable[[], float]
    _seen: dict[str, tuple[int, float]] = field(default_factory=dict[str, tuple[int, float]])

    def of(self, beats: Mapping[str, int]) -> dict[str, float]:
        """Return for how long each has been seen as it is now. Those that are not named are forgotten."""
        now = self.clock()
        before = self._seen
        self._seen = {
            name: before[name] if name in before and before[name][0] == beat else (beat, now) for name, beat in beats.items()
        }
        return {name: now - since for name, (_beat, since) in self._seen.items()}
