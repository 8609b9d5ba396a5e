"""Who may write about what: a lease has an epoch that only rises, and every later write names the epoch it was claimed in.

No clock is compared with another's. A holder counts up `beat`; whoever would take over watches the beat, and takes it for dead
once it has stood still for a whole term by the watcher's own monotonic clock. So a clock that jumps by a day changes nothing, and
a holder that was only asleep finds its epoch gone and can write nothing more. Next: `database.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import sqlalchemy as sa

from kivnun.jobs.database import Transaction
from kivnun.jobs.errors import StaleLease
from kivnun.jobs.schema import leases

TERM_S = 15.0  # a beat that stands still for so long is a dead holder's
BEAT_S = 2.0


@dataclass(frozen=True, slots=True)
class Lease:
    """What a holder shows with each write."""

    name: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Seen:
    """A lease as it stood when it was looked at."""

    name: str
    epoch: int
    owner: str | None
    beat: int


def look(tx: Transaction, names: Iterable[str]) -> dict[str, Seen]:
    """Return the leases that were ever claimed, by name."""
    rows = tx.execute(sa.select(leases).where(leases.c.name.in_(list(names))))
    return {row.name: Seen(row.name, row.epoch, row.owner, row.beat) for row in rows}


def claim(tx: Transaction, name: str, owner: str, seen: Seen | None = None) -> Lease | None:
    """Take a lease that nobody holds, or that stands as it was `seen` by one who took its holder for dead; else return None."""
    held = look(tx, [name]).get(name)
    if held is None:
        tx.execute(sa.insert(leases).values(name=name, epoch=1, owner=owner, beat=0))
        return Lease(name, 1)
    if held.owner is not None and held != seen:
        return None
    epoch = held.epoch + 1
    tx.execute(sa.update(leases).where(leases.c.name == name).values(epoch=epoch, owner=owner, beat=0))
    return Lease(name, epoch)


def check(tx: Transaction, lease: Lease) -> None:
    """Raise StaleLease unless the lease is held in this epoch. The first statement of every write under a lease."""
    held = look(tx, [lease.name]).get(lease.name)
    if held is None or held.epoch != lease.epoch or held.owner is None:
        raise StaleLease(
            f"the lease {lease.name} of epoch {lease.epoch} is held by somebody else by now", hint="nothing was written"
        )


def beat(tx: Transaction, lease: Lease) -> None:
    """Show that the holder lives. Raises StaleLease."""
    check(tx, lease)
    tx.execute(sa.update(leases).where(leases.c.name == lease.name).values(beat=leases.c.beat + 1))


def release(tx: Transaction, lease: Lease) -> None:
    """Give a lease back, so that the next one need not wait. Raises StaleLease."""
    check(tx, lease)
    tx.execute(sa.update(leases).where(leases.c.name == lease.name).values(owner=None))


def release_all(tx: Transaction) -> None:
    """Take every lease from its holder. Only for who knows that none of them lives: the service at its start on its own folder."""
    tx.execute(sa.update(leases).values(owner=None))


@dataclass(slots=True)
class Watcher:
    """Tells a dead holder from a slow one. `clock` gives seconds and never goes back (time.monotonic)."""

    clock: Callable[[], float]
    term_s: float = TERM_S
    _first_seen: dict[str, tuple[Seen, float]] = field(default_factory=dict[str, tuple[Seen, float]])

    def is_dead(self, seen: Seen) -> bool:
        """Return whether the lease can be taken: nobody holds it, or its beat has stood still for a term."""
        if seen.owner is None:
            return True
        before, since = self._first_seen.get(seen.name, (None, 0.0))
        now = self.clock()
        if before != seen:
            self._first_seen[seen.name] = (seen, now)
            return False
        return now - since >= self.term_s

    def forget(self, name: str) -> None:
        self._first_seen.pop(name, None)

    def forget_all_but(self, names: Iterable[str]) -> None:
        """Forget what is not among all that there is to watch."""
        kept = set(names)
        self._first_seen = {name: seen for name, seen in self._first_seen.items() if name in kept}
