"""What must be had before an answer can begin, had by a few threads: of a tenant one piece after another.

A tenant whose store is slow, or whose grammar is costly to read, keeps itself waiting and one thread busy, and nobody else.
Next: `scheduler.py` (who has its adapters loaded and its grammars read here).
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

THREADS = 4
P = TypeVar("P")


class Loading(Generic[P]):
    """Calls `load` with each piece, in `threads` threads. Of a tenant one piece at a time, in the order in which they came; the
    tenant that has waited longest is next. `load` raises nothing."""

    def __init__(self, load: Callable[[P], None], threads: int = THREADS) -> None:
        self._load = load
        self._waiting: OrderedDict[str, deque[P]] = OrderedDict()  # the tenant that has waited longest first
        self._busy: set[str] = set()  # tenants of whom a piece is being loaded
        self._ended = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._work, name="kivnun-loading", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def put(self, tenant: str, piece: P) -> None:
        with self._changed:
            self._waiting.setdefault(tenant, deque()).append(piece)
            self._changed.notify()

    def close(self) -> list[P]:
        """End the threads with what they are loading; return the pieces that have not been begun."""
        with self._changed:
            self._ended = True
            left = [piece for pieces in self._waiting.values() for piece in pieces]
            self._waiting.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        return left

    def _work(self) -> None:
        while (taken := self._next()) is not None:
            tenant, piece = taken
            self._load(piece)
            with self._changed:
                self._busy.discard(tenant)
                self._changed.notify()

    def _next(self) -> tuple[str, P] | None:
        """Wait for a piece of a tenant that none is being loaded of; return None at the end."""
        with self._changed:
            while (tenant := self._free()) is None:
                if self._ended:
                    return None
                self._changed.wait()
            piece = self._waiting[tenant].popleft()
            self._waiting.move_to_end(tenant)
            if not self._waiting[tenant]:
                del self._waiting[tenant]
            self._busy.add(tenant)
            return tenant, piece

    def _free(self) -> str | None:
        return next((tenant for tenant in self._waiting if tenant not in self._busy), None)
