"""Which bases are asked for: the API counts, and whoever starts inference workers watches the counts, and says what is not started.

As with a lease's beat, no clock is compared with another's: a base is wanted while its count goes on rising, and no longer wanted
once it has stood still for a while by the watcher's own clock. Next: `schema.py`, `../service/room.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def refusal(tx: Transaction, base: str) -> str | None:
    """Return why a base that is asked for is not loaded now, None where nothing is said against it."""
    return tx.execute(sa.select(wanted_bases.c.refused).where(wanted_bases.c.base == base)).scalar_one_or_none()


def refusals(tx: Transaction) -> dict[str, str]:
    """Return why bases are not loaded, of all that are refused."""
    query = sa.select(wanted_bases.c.base, wanted_bases.c.refused).where(wanted_bases.c.refused.is_not(None))
    return {row.base: row.refused for row in tx.execute(query)}


def refuse(tx: Transaction, base: str, why: str | None) -> None:
    """Say why a base that was asked for is not loaded; None takes it back."""
    tx.execute(sa.update(wanted_bases).where(wanted_bases.c.base == base).values(refused=why))


@dataclass(slots=True)
class Wishes:
    """Tells which bases are wanted now. `clock` gives seconds and never goes back. What was asked for before the first look is
    past: those who still wait ask again."""

    clock: Callable[[], float]
    idle_s: float = IDLE_S
    _seen: dict[str, tuple[int, float | None]] = field(default_factory=dict[str, tuple[int, float | None]])
    _looked: bool = False

    def look(self, asks: Mapping[str, int]) -> dict[str, float]:
        """Return the bases whose count has risen within `idle_s`, and how many seconds ago that was."""
        now = self.clock()
        for base, count in asks.items():
            before = self._seen.get(base)
            if before is None or before[0] != count:
                risen = self._looked if before is None else True
                self._seen[base] = (count, now if risen else None)
        self._looked = True
        return {base: now - at for base, (_count, at) in self._seen.items() if at is not None and now - at < self.idle_s}
