"""What every request goes through, whatever it asks: caps on what comes in, headers on what goes out, one line of the log.

Written against ASGI itself: Starlette's BaseHTTPMiddleware would hide a client that hangs up while an answer streams. Next:
`app.py` (which puts it around the routes), `errors.py`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Mapping, MutableMapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kivnun.service.auth import Caller, refused_key
from kivnun.service.context import Service
from kivnun.service.dialect import dialect_of
from kivnun.service.errors import ApiError
from kivnun.service.telemetry import Telemetry

logger = logging.getLogger(__name__)

PIECE_S = 60.0  # how long a client may be silent within its own body
SLOWEST_BYTES_PER_S = 4096  # and how slow it may be on the whole, beyond that
LARGE_BYTES = 1 << 16  # a body that is larger, or does not say, is read only for those with a good key
# These routes stream to disk and have caps of their own.
_STREAMED = re.compile(r"/(?:v1|openai(?:/v1)?)/(?:files|uploads/[^/]+/parts)")
_API_VERSION = re.compile(r"\d{4}-\d{2}-\d{2}(?:-preview)?|preview|latest|v1")


class Frame:
    """The application's outermost layer."""

    def __init__(self, app: ASGIApp, service: Service, telemetry: Telemetry) -> None:
        self._app, self._service, self._telemetry = app, service, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request = Request(scope)
        state = scope.setdefault("state", {})
        state["id"] = f"req_{secrets.token_hex(16)}"
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._write_headers(request, message, time.perf_counter() - started)
            await send(message)

        try:
            refusal = _refused(request, self._service.config.max_body_bytes)
            if refusal is None and _is_large(request):
                refusal = await run_in_threadpool(refused_key, request, self._service)
            if refusal is not None:
                await _answer(refusal, request)(scope, receive, sending)
                return
            await self._app(scope, self._capped(request, receive), sending)
        except Exception as error:
            logger.error("a request failed", exc_info=error, extra={"action": "request_failed", "request": state["id"]})
            if status:  # the answer has begun; the server cuts it off, which is all a client can be told
                raise RuntimeError("an answer broke off") from None
            broken = ApiError(500, "the request failed; the server's log says why", code="internal_error", type="server_error")
            await _answer(broken, request)(scope, receive, sending)
        finally:
            self._note(request, status, time.perf_counter() - started)

    def _write_headers(self, request: Request, message: Message, seconds: float) -> None:
        headers, state, dialect = MutableHeaders(scope=message), request.scope["state"], dialect_of(request)
        headers["x-request-id"] = state["id"]
        headers["openai-organization"] = self._service.config.organization
        headers["openai-processing-ms"] = str(round(seconds * 1000))
        headers["openai-version"] = "2020-10-01"
        headers.setdefault("x-content-type-options", "nosniff")
        if dialect == "azure":
            headers["apim-request-id"] = state["id"]
        if message["status"] == 409:
            headers["x-should-retry"] = "false"  # OpenAI's clients repeat a 409 by themselves
        caller = state.get("caller")
        if isinstance(caller, Caller):
            for name, value in self._service.limits.headers(caller, dialect).items():
                headers[name] = value

    def _capped(self, request: Request, receive: Receive) -> Receive:
        """Return `receive` that counts: a body may be longer than it says, or say nothing."""
        left = None if _STREAMED.fullmatch(request.scope["path"]) else self._service.config.max_body_bytes
        ended, came, waited_s = False, 0, 0.0

        async def counted() -> Message:
            nonlocal left, ended, came, waited_s
            if ended:
                return await receive()  # waits for the client to hang up, for as long as the answer takes
            began, left_s = time.monotonic(), PIECE_S + came / SLOWEST_BYTES_PER_S - waited_s
            try:
                message = await asyncio.wait_for(receive(), min(PIECE_S, left_s))
            except TimeoutError:
                raise HTTPException(408, "the body comes too slowly, or not at all") from None
            waited_s += time.monotonic() - began  # for the client: what is done with a piece takes its own time
            came += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if left is not None:
                left -= len(message.get("body", b""))
                if left < 0:
                    raise HTTPException(413, _too_long(self._service.config.max_body_bytes))
            return message

        return counted

    def _note(self, request: Request, status: int, seconds: float) -> None:
        scope = request.scope
        route = route_of(scope)
        self._telemetry.observe(request.method, route, status, seconds)
        caller = scope["state"].get("caller")
        fields: dict[str, Any] = {"action": "request", "request": scope["state"]["id"], "method": request.method,
                                  "route": route, "status": status, "ms": round(seconds * 1000)}  # fmt: skip
        if isinstance(caller, Caller):
            fields |= {"tenant": caller.tenant, "key": caller.key.id}
        logger.info("a request was answered", extra=fields)


def route_of(scope: MutableMapping[str, Any]) -> str:
    """Return the template of the route that a request took, without its dialect's prefix; what it asked for is not in it."""
    path = getattr(scope.get("route"), "path", None)
    if not path:
        return "none"
    return re.sub(r"^/(v1|openai/v1|openai)(?=/)", "", path)


def _refused(request: Request, max_body_bytes: int) -> ApiError | None:
    """Return why a request is not even looked at, or None."""
    path, headers = request.scope["path"], request.headers
    if "\0" in path or "%00" in request.scope["query_string"].decode("latin-1"):
        return ApiError(400, "the address holds a NUL character, which no name here has", code="invalid_value")
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        return ApiError(415, f"the body is sent with content-encoding {coding[:40]!r}; send it as it is", code="unsupported_media")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_body_bytes and not _STREAMED.fullmatch(path):
        return ApiError(413, _too_long(max_body_bytes), code="request_too_large")
    return _wrong_version(path, request.query_params)


def _is_large(request: Request) -> bool:
    """Return whether a body is too large to be read before its key is looked at. Routes that stream look at it by themselves."""
    path, length = request.scope["path"], request.headers.get("content-length", "")
    says_little = int(length) <= LARGE_BYTES if length.isdecimal() else "transfer-encoding" not in request.headers
    return not says_little and path.startswith(("/v1/", "/openai/")) and not _STREAMED.fullmatch(path)


def _wrong_version(path: str, query: Mapping[str, str]) -> ApiError | None:
    """Return what is wrong with Azure's `api-version`; any that Azure has or had is taken as the same."""
    is_azure = path.startswith(("/openai/", "/subscriptions/"))
    given = query.get("api-version")
    if not is_azure or (given is not None and _API_VERSION.fullmatch(given)):
        return None
    if given is None:
        if path.startswith("/openai/v1/"):
            return None
        message = "the query lacks api-version: add ?api-version=2024-10-21, or call /openai/v1/, which needs none"
        return ApiError(400, message, code="missing_required_parameter", param="api-version")
    message = f"api-version must be a date (2024-10-21, 2025-04-01-preview), preview, latest or v1, got {given[:40]!r}"
    return ApiError(400, message, code="invalid_value", param="api-version")


def _too_long(max_body_bytes: int) -> str:
    return f"the body is longer than {max_body_bytes} bytes, which is the most there may be; upload files through /v1/files"


def _answer(error: ApiError, request: Request) -> JSONResponse:
    return JSONResponse(error.body(dialect_of(request)), error.status, error.headers)
