"""Whose work is next: tenants take turns, and what failed a moment ago lets the others go first.

Duties that take one file or job after another ask here, so that neither a tenant with a long queue nor one piece that cannot be
done keeps anybody waiting. Kept in memory: a clerk that starts begins anew. Next: `judging.py`, `validating.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

FIRST_ASIDE_S, LAST_ASIDE_S = 2.0, 300.0
OF_EACH = 10  # pieces of a tenant that are looked at: so many may fail before it holds up itself


class Waiting(Protocol):
    """A piece of a tenant's work."""

    @property
    def id(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def created_at(self) -> float: ...


W = TypeVar("W", bound=Waiting)


class Turns:
    """The order of one duty's work. `clock` gives seconds and never goes back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._served = 0
        self._last_served: dict[str, int] = {}
        self._failures: dict[str, int] = {}
        self._aside_until: dict[str, float] = {}

    def in_turn(self, waiting: Sequence[W]) -> list[W]:
        """Return what waits in the order it is to be tried: the tenant that was served longest ago first, then by age."""
        now = self._clock()
        here = {one.id for one in waiting}
        self._failures = {name: count for name, count in self._failures.items() if name in here}
        self._aside_until = {name: until for name, until in self._aside_until.items() if name in here}

        def place(one: W) -> tuple[bool, int, float, str]:
            is_aside = now < self._aside_until.get(one.id, now)
            return is_aside, self._last_served.get(one.tenant, 0), one.created_at, one.id

        return sorted(waiting, key=place)

    @contextmanager
    def serving(self, one: Waiting) -> Generator[None]:
        """Count a turn. A piece that fails comes after all others for a while, longer each time."""
        self._served += 1
        self._last_served[one.tenant] = self._served
        try:
            yield
        except Exception:
            failures = self._failures.get(one.id, 0)
            self._failures[one.id] = failures + 1
            self._aside_until[one.id] = self._clock() + min(LAST_ASIDE_S, FIRST_ASIDE_S * 2.0 ** min(failures, 10))
            raise
        self._failures.pop(one.id, None)
        self._aside_until.pop(one.id, None)
