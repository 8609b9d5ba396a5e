"""Threads for requests that take long, beside those that all others share: who waits for one of these keeps nobody else waiting.

Next: `context.py` (which kinds there are).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import anyio
import anyio.to_thread

T = TypeVar("T")


@dataclass(slots=True)
class _Turn:
    """Whose turn it is among those who ask for one thing; `wanted_by` counts them."""

    lock: anyio.Lock = field(default_factory=anyio.Lock)
    wanted_by: int = 0


class Aside:
    """So many threads for one kind of request."""

    def __init__(self, threads: int) -> None:
        self._limiter = anyio.CapacityLimiter(threads)
        self._turns: dict[str, _Turn] = {}

    async def run(self, work: Callable[[], T], one_of: str | None = None) -> T:
        """Return what `work` returns. Of those that name the same `one_of` only one runs at a time: a tenant with many takes one
        thread."""
        async with self._turn_of(one_of):
            return await anyio.to_thread.run_sync(work, limiter=self._limiter)

    @asynccontextmanager
    async def _turn_of(self, name: str | None) -> AsyncIterator[None]:
        if name is None:
            yield
            return
        turn = self._turns.setdefault(name, _Turn())
        turn.wanted_by += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.wanted_by -= 1
            if not turn.wanted_by:
                del self._turns[name]
