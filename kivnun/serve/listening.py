"""A worker's door: callers connect by a Unix socket or TCP, show the secret, and ask as many questions at once as they like.

The event loop reads, checks and writes; what answers runs elsewhere and tells from any thread. A connection that closes cancels
every question that came by it. Next: `protocol.py` (what is said), `scheduler.py` and `toy.py` (who answers).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from kivnun.errors import IntegrityError
from kivnun.serve.protocol import (
    MAX_MESSAGE_BYTES,
    Ask,
    Begun,
    Cancel,
    Done,
    Failed,
    FromCaller,
    Hello,
    Piece,
    Welcome,
    from_caller,
    line,
)

HELLO_S = 10.0

logger = logging.getLogger(__name__)
Told = Begun | Piece | Done | Failed
Tell = Callable[[Told], None]
Cancelling = Callable[[], None]


class Answerer(Protocol):
    """Answers questions on one base."""

    base: str
    version: str

    def ask(self, question: Ask, tell: Tell) -> Cancelling:
        """Take a question; return what cancels it. `tell` is called from any thread, the last time with Done or Failed, and not
        after a cancellation has taken effect."""
        ...

    def close(self) -> None:
        """End every answer and whatever computes them."""
        ...


@asynccontextmanager
async def listening(answerer: Answerer, where: str, secret: str) -> AsyncIterator[Door]:
    """Answer callers at `unix:PATH` or `HOST:PORT` (port 0: a free one)."""
    door = Door(answerer, secret)
    if where.startswith("unix:"):
        path = Path(where.removeprefix("unix:"))
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        server = await asyncio.start_unix_server(door.converse, path, limit=MAX_MESSAGE_BYTES)
        path.chmod(0o600)
        door.address = where
    else:
        host, _, port = where.rpartition(":")
        server = await asyncio.start_server(door.converse, host, int(port), limit=MAX_MESSAGE_BYTES)
        door.address = f"{host}:{server.sockets[0].getsockname()[1]}"
    try:
        yield door
    finally:
        server.close()
        door.close()
        if door.address.startswith("unix:"):
            Path(door.address.removeprefix("unix:")).unlink(missing_ok=True)


class Door:
    """Where callers come in. `address` is where it can be reached."""

    def __init__(self, answerer: Answerer, secret: str) -> None:
        self._answerer, self._secret = answerer, secret
        self._callers: dict[_Caller, asyncio.StreamWriter] = {}
        self.address = ""

    @property
    def answering(self) -> int:
        """Return how many questions have not ended."""
        return sum(caller.open for caller in self._callers)

    def close(self) -> None:
        for writer in list(self._callers.values()):
            writer.close()

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        caller = _Caller(self._answerer, writer)
        self._callers[caller] = writer
        try:
            hello = await asyncio.wait_for(_next(reader), HELLO_S)
            if not isinstance(hello, Hello) or not hmac.compare_digest(hello.secret.encode(), self._secret.encode()):
                logger.warning("a caller did not know the secret", extra={"action": "answerer_refused"})
                return
            writer.write(line(Welcome(base=self._answerer.base, version=self._answerer.version)))
            while (said := await _next(reader)) is not None:
                caller.hear(said)
        except (IntegrityError, TimeoutError, OSError) as error:
            logger.warning("a caller's connection ends: %s", error, extra={"action": "answerer_connection"})
        finally:
            caller.leave()
            del self._callers[caller]
            with contextlib.suppress(OSError):
                writer.close()


class _Caller:
    """One connection's open questions."""

    def __init__(self, answerer: Answerer, writer: asyncio.StreamWriter) -> None:
        self._answerer, self._writer = answerer, writer
        self._loop = asyncio.get_running_loop()
        self._open: dict[int, Cancelling] = {}

    @property
    def open(self) -> int:
        return len(self._open)

    def hear(self, said: FromCaller) -> None:
        match said:
            case Ask():
                if said.id in self._open:
                    raise IntegrityError("a question's id is in use", hint="the API and its workers must be of one version")
                self._open[said.id] = lambda: None
                cancel = self._answerer.ask(said, self._tell)
                if said.id in self._open:  # else it has been answered already
                    self._open[said.id] = cancel
            case Cancel():
                self._open.pop(said.id, lambda: None)()
            case Hello():
                raise IntegrityError("a second greeting", hint="the API and its workers must be of one version")

    def leave(self) -> None:
        while self._open:
            self._open.popitem()[1]()

    def _tell(self, what: Told) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
            self._loop.call_soon_threadsafe(self._write, what)

    def _write(self, what: Told) -> None:
        if what.id not in self._open:
            return
        if isinstance(what, Done | Failed):
            del self._open[what.id]
        if not self._writer.is_closing():
            self._writer.write(line(what))


async def _next(reader: asyncio.StreamReader) -> FromCaller | None:
    """Return the next message; None where the connection has ended. Raises IntegrityError."""
    try:
        raw = await reader.readline()
    except ValueError:
        raise IntegrityError(f"a message is longer than {MAX_MESSAGE_BYTES} bytes", hint="ask less at once") from None
    return from_caller(raw) if raw.endswith(b"\n") else None
