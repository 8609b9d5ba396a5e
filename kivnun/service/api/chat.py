"""Chats and completions, whole or as server-sent events, under both dialects; a deployment in the path wins over the body's model.

The event loop reads and sends, and an inference worker writes: a client that leaves frees its row within a token.
Next: `../answering.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response

from kivnun.serve.events import EventStream, event
from kivnun.serve.parameters import Endpoint
from kivnun.serve.question import NO_EFFECT, READ
from kivnun.service.answering import Answer, Answering
from kivnun.service.auth import Caller, Chatter
from kivnun.service.context import Shared
from kivnun.service.dialect import dialect_of
from kivnun.service.errors import ApiError

router = APIRouter()
logger = logging.getLogger(__name__)
T = TypeVar("T")


async def answering_of(connection: HTTPConnection) -> Answering:
    """Return the application's way to its workers, made with the first request. On the event loop: nobody makes a second one."""
    state = connection.app.state
    if "answering" not in state._state:
        state.answering = Answering(state.service)
    return state.answering


Ways = Annotated[Answering, Depends(answering_of)]


def _described(endpoint: Endpoint, needed: list[str]) -> dict[str, Any]:
    """Return what the API's description says of a body: `serve/question.py` reads it, not FastAPI."""
    properties = {name: {} for name in (*READ[endpoint], *NO_EFFECT)}
    schema = {"type": "object", "required": needed, "properties": properties, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


CHAT = _described("chat.completion", ["model", "messages"])
TEXT = _described("text_completion", ["model", "prompt"])


@router.post("/chat/completions", openapi_extra=CHAT)
async def chat(request: Request, who: Chatter, ways: Ways, service: Shared) -> Response:
    return await _answer(request, who, ways, service.config.max_body_bytes, "chat.completion")


@router.post("/completions", openapi_extra=TEXT)
async def complete(request: Request, who: Chatter, ways: Ways, service: Shared) -> Response:
    return await _answer(request, who, ways, service.config.max_body_bytes, "text_completion")


@router.post("/deployments/{name:path}/chat/completions", openapi_extra=CHAT)
async def chat_deployed(name: str, request: Request, who: Chatter, ways: Ways, service: Shared) -> Response:
    return await _answer(request, who, ways, service.config.max_body_bytes, "chat.completion", name)


@router.post("/deployments/{name:path}/completions", openapi_extra=TEXT)
async def complete_deployed(name: str, request: Request, who: Chatter, ways: Ways, service: Shared) -> Response:
    return await _answer(request, who, ways, service.config.max_body_bytes, "text_completion", name)


async def _answer(
    request: Request, who: Caller, ways: Answering, max_bytes: int, endpoint: Endpoint, deployment: str | None = None
) -> Response:
    body = await _body(request, max_bytes)
    beginning = asyncio.create_task(ways.begin(who.tenant, who.key.id, endpoint, body, dialect_of(request), deployment))
    answer = await _unless_gone(request, beginning)
    if answer is None:
        return _nobody()
    if answer.head.question.stream:
        return EventStream(_events(answer, request), answer.leave)
    found = await _unless_gone(request, asyncio.create_task(answer.whole()))
    return _nobody() if found is None else JSONResponse(found)


async def _body(request: Request, max_bytes: int) -> bytes:
    """Return the body. Raises ApiError before more than `max_bytes` are held.

    A page in somebody's browser may send other types to a service without asking; JSON it may not.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body must be application/json, got {kind[:100] or 'no type'}", code="unsupported_media")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            message = f"the body is larger than {max_bytes} bytes"
            raise ApiError(413, message, code="request_too_large", headers={"connection": "close"})
    return bytes(body)


async def _unless_gone(request: Request, task: asyncio.Task[T]) -> T | None:
    """Return what a task gives; None where the client leaves first, and then the task is cancelled."""
    watching = asyncio.create_task(_until_gone(request))
    try:
        await asyncio.wait((task, watching), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, watching):
            one.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _nobody() -> Response:
    return Response(status_code=499)  # never seen: the client has left


async def _events(answer: Answer, request: Request) -> AsyncIterator[bytes]:
    """Yield the server-sent events of an answer. What fails in the middle is told as an event, which the clients raise."""
    try:
        async for chunk in answer.chunks():
            yield event(chunk)
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield _error(error, request)
    except Exception as error:  # a connection that closes says less, and clients that do not look take it for the end
        told = {"action": "stream_failed", "request": request.state.id}
        logger.error("an answer failed in the middle", exc_info=error, extra=told)
        message = "the answer failed; the server's log says why"
        yield _error(ApiError(500, message, code="internal_error", type="server_error"), request)


def _error(error: ApiError, request: Request) -> bytes:
    return b"event: error\n" + event(error.body(dialect_of(request)))
