"""HTTP connections that end when nothing comes of them: uvicorn limits the time between two requests alone, and a client that opens
connections and says little in them would keep them for as long as it likes.

Next: `run.py` (which serves with this), `frame.py` (the time that a body may take).
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 30.0  # how long a request's headers may take, and a body that nobody waits for any more


class TimelyProtocol(H11Protocol):
    """Closes a connection whose headers take too long, and those above `limit_concurrency` at once: each takes a descriptor."""

    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) > self.limit_concurrency:
            transport.abort()
            return
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if not self._is_waiting():
            self._unwatch()
        elif self._due is None:
            self._due = self.loop.call_later(HEAD_S, self._is_due)

    def _unwatch(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _is_waiting(self) -> bool:
        """Return whether a request's headers are not complete, or its body still comes though it has been answered."""
        theirs = self.conn.their_state
        return theirs is h11.IDLE or (theirs is h11.SEND_BODY and self.conn.our_state is h11.DONE)

    def _is_due(self) -> None:
        self._due = None
        if self._is_waiting() and self.timeout_keep_alive_task is None:  # else uvicorn waits for the next request
            self.transport.close()
