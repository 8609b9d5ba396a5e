"""Time at a worker's end: how much of it is gone, and how a call that hangs is left behind. Next: `one_job.py`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")
LOOK_S = 0.1


class Drain:
    """The `drain_s` seconds that a worker has from when `stop` is set. `monotonic` never goes back. Threads may share one."""

    def __init__(self, stop: threading.Event, drain_s: float, monotonic: Callable[[], float]) -> None:
        self._stop, self._drain_s, self._monotonic = stop, drain_s, monotonic
        self._since: float | None = None

    def is_past(self, share: float) -> bool:
        """Return whether the worker is to end, and more than a share of its time is gone since this was first seen."""
        if not self._stop.is_set():
            return False
        if self._since is None:
            self._since = self._monotonic()
        return self._monotonic() - self._since > share * self._drain_s


def apart(act: Callable[[], T], look: Callable[[], None]) -> T:
    """Return what `act` returns, which may hang: `look` is called again and again meanwhile, and where it raises, the call is left
    to itself. Its thread ends with the process, or with the call."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="kivnun-apart", daemon=True).start()
    while not wait([future], LOOK_S).done:
        look()
    return future.result()
