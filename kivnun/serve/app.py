"""The routes: one run behind `/v1/chat/completions`, `/v1/completions`, `/v1/models` and `/health`.

The event loop parses, queues and sends; the worker's thread computes. Every answer other than 200 has OpenAI's error shape.
Next: `wire.py`, `worker.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, cast

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive

from kivnun.serve.events import EventStream, event
from kivnun.serve.wire import Endpoint, Head, Refusal, Request, Served, error_body, parse
from kivnun.serve.worker import Busy, Ended, Failed, Job, Piece, Said, Worker

MAX_BODY_BYTES = 1 << 20
RETRY_AFTER_MS = 1000
FAILED = "the answer failed; see the server's log"

logger = logging.getLogger(__name__)
Handler = Callable[[HttpRequest], Awaitable[Response]]


def make_app(worker: Worker, served: Served, version: str, api_key: str | None = None) -> Starlette:
    """Return the application. `version` names what answers (base, adapter, code): a seed holds for it alone."""
    service = _Service(worker, served, f"kivnun-{hashlib.sha256(version.encode()).hexdigest()[:12]}", api_key)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(worker.stop)

    routes = [
        Route("/v1/chat/completions", service.endpoint("chat.completion"), methods=["POST"]),
        Route("/v1/completions", service.endpoint("text_completion"), methods=["POST"]),
        Route("/v1/models", service.guarded(service.models), methods=["GET"]),
        Route("/v1/models/{model:path}", service.guarded(service.model), methods=["GET"]),
        Route("/health", service.health, methods=["GET"]),
    ]
    handlers: Mapping[Any, Any] = {HTTPException: _http_error, Refusal: _refused, _Gone: _nobody, Exception: _broken}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


class _Service:
    """The handlers and what they share."""

    def __init__(self, worker: Worker, served: Served, fingerprint: str, api_key: str | None) -> None:
        self._worker, self._served, self._fingerprint, self._api_key = worker, served, fingerprint, api_key
        self._began = int(time.time())

    def guarded(self, handler: Handler) -> Handler:
        """Return the handler behind the key."""

        async def checked(http: HttpRequest) -> Response:
            self._check_key(http)
            return await handler(http)

        return checked

    def endpoint(self, endpoint: Endpoint) -> Handler:
        async def answer(http: HttpRequest) -> Response:
            request = await run_in_threadpool(parse, await _body(http), endpoint, self._served)
            prefix = "chatcmpl" if endpoint == "chat.completion" else "cmpl"
            head = Head(f"{prefix}-{secrets.token_hex(12)}", int(time.time()), request, self._fingerprint)
            job, said = self._queued(request)
            if request.stream:
                return EventStream(_events(head, said), job.cancelled.set, _request_id())
            return await _whole(http, head, job, said)

        return self.guarded(answer)

    async def models(self, _http: HttpRequest) -> Response:
        return _json({"object": "list", "data": [self._model(name) for name in self._served.ids.values()]})

    async def model(self, http: HttpRequest) -> Response:
        name = str(http.path_params["model"])
        if self._served.which(name) is None:
            raise Refusal(404, f"there is no model {name!r} here", param="model", code="model_not_found")
        return _json(self._model(name))

    async def health(self, _http: HttpRequest) -> Response:
        alive = self._worker.alive
        return _json({"status": "ok" if alive else "the model's thread has ended"}, 200 if alive else 503)

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._began, "owned_by": "kivnun"}

    def _check_key(self, http: HttpRequest) -> None:
        if self._api_key is None:
            return
        scheme, _, given = http.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._api_key.encode()):
            raise Refusal(401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key")

    def _queued(self, request: Request) -> tuple[Job, asyncio.Queue[Said]]:
        loop, said = asyncio.get_running_loop(), asyncio.Queue[Said]()

        def tell(what: Said) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
                loop.call_soon_threadsafe(said.put_nowait, what)

        job = Job(request, tell)
        try:
            self._worker.submit(job)
        except Busy:
            raise Refusal(503, "too many requests wait for the model; come back in a moment", code="overloaded") from None
        return job, said


async def _body(http: HttpRequest) -> bytes:
    """Return the body. Raises Refusal before more than MAX_BODY_BYTES are held.

    A page in somebody's browser may send other types to this machine without asking; JSON it may not.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, f"the body must be application/json, got {kind or 'no type'}", code="unsupported_media_type")
    parts: list[bytes] = []
    size = 0
    async for part in http.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise Refusal(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="request_too_large")
        parts.append(part)
    return b"".join(parts)


async def _whole(http: HttpRequest, head: Head, job: Job, said: asyncio.Queue[Said]) -> Response:
    """Wait for the end and return the answer; a client that leaves before cancels the job."""
    texts = [""] * head.request.choices
    watcher = asyncio.create_task(_cancel_when_gone(http.receive, job, said))
    try:
        while True:
            match await said.get():
                case Piece(choice, text):
                    texts[choice] += text
                case Ended(reasons, tokens):
                    return _json(head.whole(texts, reasons, tokens))
                case Failed(_Gone() as gone):
                    raise gone
                case Failed(error):
                    logger.error("an answer failed", exc_info=error)
                    raise Refusal(500, FAILED, code="internal_error")
    finally:
        watcher.cancel()


class _Gone(Exception):
    """The client has closed the connection: there is nobody to tell."""


async def _cancel_when_gone(receive: Receive, job: Job, said: asyncio.Queue[Said]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.cancelled.set()
    said.put_nowait(Failed(_Gone()))


async def _events(head: Head, said: asyncio.Queue[Said]) -> AsyncIterator[bytes]:
    """Yield the server-sent events of a streamed answer."""
    for chunk in head.opening():
        yield event(chunk)
    while True:
        match await said.get():
            case Piece(choice, text):
                yield event(head.piece(choice, text))
            case Ended(reasons, tokens):
                for index, reason in enumerate(reasons):
                    yield event(head.end(index, reason))
                if head.request.include_usage:
                    yield event(head.counts(tokens))
                yield b"data: [DONE]\n\n"
                return
            case Failed(_Gone()):
                return
            case Failed(error):
                logger.error("an answer failed", exc_info=error)
                yield b"event: error\n" + event(error_body(500, FAILED, code="internal_error"))
                return


def _request_id() -> dict[str, str]:
    return {"x-request-id": f"req_{secrets.token_hex(12)}"}


def _json(value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(value, status, {**_request_id(), **(headers or {})})


async def _refused(_http: HttpRequest, error: Exception) -> Response:
    refusal = cast(Refusal, error)
    headers = {"retry-after-ms": str(RETRY_AFTER_MS)} if refusal.status == 503 else {}
    headers |= {"www-authenticate": "Bearer"} if refusal.status == 401 else {}
    # The rest of a body that is too large is not read: the connection cannot be used again.
    headers |= {"connection": "close"} if refusal.status == 413 else {}
    return _json(refusal.body(), refusal.status, headers)


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    found = cast(HTTPException, error)
    what = "there is no such address" if found.status_code == 404 else found.detail
    return _json(error_body(found.status_code, f"{http.method} {http.url.path}: {what}", code="not_found"), found.status_code)


async def _nobody(_http: HttpRequest, _error: Exception) -> Response:
    return Response(status_code=499)  # never seen: the client has left


async def _broken(_http: HttpRequest, _error: Exception) -> Response:
    return _json(error_body(500, "the server failed; see its log", code="internal_error"), 500)
