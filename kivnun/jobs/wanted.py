"""Which bases are asked for: the API counts, and whoever starts inference workers watches the counts.

As with a lease's beat, no clock is compared with another's: a base is wanted while its count goes on rising, and no longer wanted
once it has stood still for a while by the watcher's own clock. Next: `schema.py`, `../service/supervisor.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import sqlalchemy as sa

from kivnun.jobs.database import Transaction
from kivnun.jobs.schema import wanted_bases

IDLE_S = 900.0  # a base that nobody has asked for so long is put away


def ask(tx: Transaction, base: str) -> None:
    """Count one more wish for a base."""
    counted = tx.execute(sa.update(wanted_bases).where(wanted_bases.c.base == base).values(asks=wanted_bases.c.asks + 1))
    if not counted.rowcount:
        tx.execute(sa.insert(wanted_bases).values(base=base, asks=1))


def asks(tx: Transaction) -> dict[str, int]:
    """Return how often each base was ever asked for."""
    return {row.base: row.asks for row in tx.execute(sa.select(wanted_bases))}


@dataclass(slots=True)
class Wishes:
    """Tells which bases are wanted now. `clock` gives seconds and never goes back. What was asked for before the first look is
    past: those who still wait ask again."""

    clock: Callable[[], float]
    idle_s: float = IDLE_S
    _seen: dict[str, tuple[int, float | None]] = field(default_factory=dict[str, tuple[int, float | None]])
    _looked: bool = False

    def look(self, asks: dict[str, int]) -> set[str]:
        """Return the bases whose count has risen within `idle_s`."""
        now = self.clock()
        for base, count in asks.items():
            before = self._seen.get(base)
            if before is None or before[0] != count:
                risen = self._looked if before is None else True
                self._seen[base] = (count, now if risen else None)
        self._looked = True
        return {base for base, (_count, at) in self._seen.items() if at is not None and now - at < self.idle_s}
