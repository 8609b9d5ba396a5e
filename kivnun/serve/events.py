"""Server-sent events: an answer as it is written, and what happens when its reader leaves.

Next: `app.py` and `kivnun/service/api/chat.py`, which send them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send


def event(value: Mapping[str, Any]) -> bytes:
    """Return an event that carries a JSON value."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


class EventStream(Response):
    """Events as they come. When the client leaves, also between two events, `left` is called; so it is at the end."""

    def __init__(self, events: AsyncIterator[bytes], left: Callable[[], None], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(media_type="text/event-stream", headers={**(headers or {}), "cache-control": "no-store"})
        del self.headers["content-length"]  # not known yet
        self._events, self._left = events, left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.create_task(self._send(send))
        watcher = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait((sender, watcher), return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        finally:
            self._left()
            for task in (sender, watcher):
                task.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in self._events:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
