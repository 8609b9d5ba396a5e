"""From a request's body to an answer: the one way in for chats, completions and batches.

The API reads the request, counts its tokens with the base's own tokenizer and asks an inference worker; it loads no model. An
answer that was written with another adapter than was asked for is not shown. Next: `answers.py` (the workers),
`kivnun/serve/question.py` (the request), `kivnun/serve/reply.py` (the answer).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from starlette.concurrency import run_in_threadpool

from kivnun.jobs import wanted
from kivnun.jobs.database import Transaction
from kivnun.model.families import find_base, longest_row
from kivnun.serve.base_tokens import BaseTokens
from kivnun.serve.parameters import Endpoint, Refusal, object_in, required
from kivnun.serve.protocol import Begun, Done, Failed, Piece
from kivnun.serve.question import Asked as AskedOf
from kivnun.serve.question import Question, read_question
from kivnun.serve.reply import Choice, Head, Stream, new_id, whole
from kivnun.serve.toy import LONGEST, ToyTokens
from kivnun.service.answers import Address, Asked, Heard, Link, Links, WorkerLost, addresses_of, find_deployed, find_model
from kivnun.service.context import Service
from kivnun.service.errors import ApiError

PATIENCE_S = 60.0  # a worker may be starting: clients wait longer than it takes to load most bases
LOOK_AGAIN_S = 0.25
ASK_EVERY_S = 5.0
ENDPOINTS: dict[str, Endpoint] = {"/v1/chat/completions": "chat.completion", "/v1/completions": "text_completion"}

logger = logging.getLogger(__name__)


class Answering:
    """Answers requests. Threads and event loops may share it; each loop has connections of its own."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._links: WeakKeyDictionary[asyncio.AbstractEventLoop, Links] = WeakKeyDictionary()
        self._bases: dict[str, AskedOf] = {}
        self._asked_at: dict[str, float] = {}  # when a base without a resident worker was last asked for
        self._loading = threading.Lock()

    async def complete(self, tenant: str, key_id: str, endpoint: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the whole answer to a body for `/v1/chat/completions` or `/v1/completions`. Raises ApiError."""
        if endpoint not in ENDPOINTS:
            raise ApiError(400, f"endpoint must be one of {', '.join(ENDPOINTS)}", code="invalid_value", param="endpoint")
        if body.get("stream"):
            raise ApiError(400, "an answer of a batch is not streamed: leave stream out", code="invalid_value", param="stream")
        answer = await self.begin(tenant, key_id, ENDPOINTS[endpoint], body)
        return await answer.whole()

    async def begin(
        self, tenant: str, key_id: str, endpoint: Endpoint, body: Mapping[str, Any] | bytes, deployment: str | None = None
    ) -> Answer:
        """Return an answer that has begun to be written. Raises ApiError where none will be."""
        asked, question, addresses = await run_in_threadpool(self._read, tenant, endpoint, body, deployment)
        link = await self._reached(asked.base, addresses)
        heard = link.ask(lambda number: question.ask(number, tenant, asked.adapter))
        try:
            begun = await heard.next()
            if not isinstance(begun, Begun):
                raise _not_answered(begun)
            check_adapter(asked, begun.adapter)
        except WorkerLost:
            raise overloaded("the worker that was asked is gone; try again") from None
        except BaseException:
            heard.cancel()
            raise
        content_hash = None if asked.adapter is None else asked.adapter.content_hash
        fingerprint = hashlib.sha256(f"{link.version} {content_hash}".encode()).hexdigest()[:12]
        tokens = self._bases[asked.base].tokens
        extra = {"x_adapter_hash": content_hash}
        head = Head(new_id(endpoint), int(self._service.clock()), question, tokens, f"kivnun-{fingerprint}", extra)
        return Answer(asked, head, heard, begun)

    async def _reached(self, base: str, addresses: list[Address]) -> Link:
        """Return a connection to a worker of the base. Where there is none, one is asked for, and waited for. Raises ApiError."""
        loop = asyncio.get_running_loop()
        links, began = self._links.setdefault(loop, Links()), loop.time()
        db, kept = self._service.db, self._service.config.bases[base].resident
        while True:
            link = await links.best(base, addresses)
            asked_at = self._asked_at.get(base, -ASK_EVERY_S)
            if not kept and loop.time() - asked_at >= ASK_EVERY_S:  # also while one answers: else it would be put away as idle
                self._asked_at[base] = loop.time()
                await run_in_threadpool(db.write, "wanted", lambda tx: wanted.ask(tx, base))
            if link is not None:
                return link
            if loop.time() - began >= PATIENCE_S:
                raise overloaded(f"no worker answers for {base} at this moment; one may be starting: try again")
            await asyncio.sleep(LOOK_AGAIN_S)
            addresses = await run_in_threadpool(db.read, lambda tx: addresses_of(tx, base))

    def _read(
        self, tenant: str, endpoint: Endpoint, body: Mapping[str, Any] | bytes, deployment: str | None
    ) -> tuple[Asked, Question, list[Address]]:
        """Return whom a request is put to, the question in it, and who may answer. Raises ApiError."""
        try:
            given = object_in(body if isinstance(body, bytes) else json.dumps(body).encode())
            name = deployment if deployment is not None else required(given, "model")
            if not isinstance(name, str):
                raise Refusal(400, "model must be a string", param="model", code="invalid_value")

            def look(tx: Transaction) -> tuple[Asked, list[Address]]:
                find = find_model if deployment is None else find_deployed
                asked = find(tx, self._service.config, tenant, name)
                return asked, addresses_of(tx, asked.base)

            asked, addresses = self._service.db.read(look)
            of = self._of(asked.base)
            return asked, read_question(given, endpoint, AskedOf(name, of.tokens, of.longest, of.constrains)), addresses
        except Refusal as refusal:
            raise ApiError(refusal.status, refusal.message, code=refusal.code or "invalid_value", param=refusal.param) from None

    def _of(self, base: str) -> AskedOf:
        """Return a base's tokenizer and longest row, read once."""
        with self._loading:
            if base not in self._bases:
                entry = self._service.config.bases[base]
                if entry.trainer == "toy":
                    self._bases[base] = AskedOf(base, ToyTokens(), LONGEST, constrains=False)
                else:
                    folder = find_base(self._service.config.model_of(base), entry.revision)
                    self._bases[base] = AskedOf(base, BaseTokens(folder), longest_row(folder))
            return self._bases[base]


@dataclass(slots=True)
class Answer:
    """An answer that is being written: read it whole, or as chunks, once."""

    asked: Asked
    head: Head
    _heard: Heard
    _begun: Begun
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def whole(self) -> dict[str, Any]:
        """Return the body. Raises ApiError; cancelled, it cancels the answer."""
        question = self.head.question
        choices = [Choice() for _ in range(len(question.prompts) * question.best_of)]
        async for said in self._said():
            if isinstance(said, Piece):
                choices[said.choice].text += said.text
                choices[said.choice].tokens += said.tokens
            else:
                for choice, reason in zip(choices, said.reasons, strict=True):
                    choice.reason = reason
                return whole(self.head, choices, sum(said.tokens), self._begun.prompt_logprobs)
        raise AssertionError("an answer ends with Done")

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of a streamed answer. Raises ApiError in the middle where no more will come."""
        stream = Stream(self.head, self._begun.prompt_logprobs)
        for chunk in stream.opening():
            yield chunk
        async for said in self._said():
            if isinstance(said, Piece):
                for chunk in stream.piece(said.choice, said.text, said.tokens):
                    yield chunk
            else:
                for index, reason in enumerate(said.reasons):
                    for chunk in stream.end(index, reason):
                        yield chunk
                if self.head.question.include_usage:
                    yield stream.counts(sum(said.tokens))

    def cancel(self) -> None:
        """Say that nobody waits for it; of no effect on one that has ended."""
        self._heard.cancel()

    async def _said(self) -> AsyncIterator[Piece | Done]:
        try:
            while True:
                said = await self._heard.next()
                if isinstance(said, Failed):
                    raise _not_answered(said)
                assert not isinstance(said, Begun)
                if isinstance(said, Done):
                    check_adapter(self.asked, said.adapter)
                yield said
                if isinstance(said, Done):
                    return
        except WorkerLost:
            raise overloaded("the worker that wrote the answer is gone; try again") from None
        finally:
            self._heard.cancel()


def check_adapter(asked: Asked, used: str | None) -> None:
    """Raise ApiError where a worker names another adapter than was asked for: such an answer is nobody's."""
    wanted = None if asked.adapter is None else asked.adapter.content_hash
    if used != wanted:
        logger.error("a worker answered with another adapter", extra={"action": "adapter_mismatch", "wanted": wanted, "used": used})
        message = "the answer was written with another adapter than this model's, and is not shown"
        raise ApiError(500, message, code="adapter_mismatch", type="server_error", param="model")


def overloaded(message: str) -> ApiError:
    return ApiError(503, message, code="overloaded", type="server_error")


def _not_answered(said: object) -> ApiError:
    assert isinstance(said, Failed)
    match said.code:
        case "busy":
            return overloaded("too many answers wait for this base; try again in a moment")
        case "invalid":
            return ApiError(400, said.message, code="invalid_value")
        case "broken":
            return ApiError(500, "the answer failed; the worker's log says why", code="internal_error", type="server_error")
