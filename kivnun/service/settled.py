"""A wall clock that is believed once it has settled: what a jump of it would end goes on until the jump has held for a while.

A wall clock jumps when NTP corrects it, when a virtual machine goes on, when somebody sets it. Nobody knows at once whether it was
wrong before or is wrong now, and what was ended for it cannot be had back; so it is compared with a clock that nobody can turn.
Used by `sweeping.py`, `batching.py` and, for all that the API decides by the time of day, `run.py`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

SETTLE_S = 600.0  # for so long a clock that jumped must agree with itself
JUMP_S = 60.0  # a smaller difference between two looks is the drift of two clocks


def since_boot() -> float:
    """Return the seconds since the machine was started, those that it was suspended for too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(slots=True)
class _Ahead:
    """By how much the wall clock is ahead of the steady one, and since when, by the steady one."""

    seconds: float
    since: float


class SettledClock:
    """Gives the time of day; a jump shows once it was there at two looks `settle_s` apart and at all looks in between.

    Within `settle_s` of the first look there is nothing to compare with: the clock is taken as it is then, and nothing is over.
    `steady` gives seconds and never goes back. Threads may share it."""

    def __init__(self, wall: Callable[[], float], steady: Callable[[], float] = since_boot, settle_s: float = SETTLE_S) -> None:
        self._wall, self._steady, self._settle_s = wall, steady, settle_s
        self._lock = threading.Lock()
        self._believed: _Ahead | None = None
        self._doubted: _Ahead | None = None

    def __call__(self) -> float:
        """Return the time of day, in seconds since 1970."""
        with self._lock:
            now, believed = self._look()
            return now + believed.seconds

    def over(self) -> float:
        """Return the moment up to which time has passed for certain: now, or minus infinity while the clock is in doubt."""
        with self._lock:
            now, believed = self._look()
            is_certain = self._doubted is None and now - believed.since >= self._settle_s
            return now + believed.seconds if is_certain else -math.inf

    def _look(self) -> tuple[float, _Ahead]:
        now = self._steady()
        ahead = self._wall() - now
        believed, doubted = self._believed, self._doubted
        if believed is not None and abs(ahead - believed.seconds) <= JUMP_S:
            believed.seconds, self._doubted = ahead, None
            return now, believed
        if doubted is None or abs(ahead - doubted.seconds) > JUMP_S:
            doubted = self._doubted = _Ahead(ahead, now)
        is_new = believed is None or now - believed.since < self._settle_s
        if is_new or now - doubted.since >= self._settle_s:
            believed, self._doubted = doubted, None
            believed.seconds = ahead
        assert believed is not None
        self._believed = believed
        return now, believed
