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
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

from starlette.concurrency import run_in_threadpool

from kivnun.jobs import usage, wanted
from kivnun.jobs.config import Limits
from kivnun.jobs.database import Transaction
from kivnun.jobs.errors import DatabaseDown
from kivnun.jobs.tenants import limits_of
from kivnun.jobs.usage import Charge
from kivnun.serve.parameters import Endpoint, Refusal, object_in, required
from kivnun.serve.protocol import Begun, Done, Failed, Piece
from kivnun.serve.question import Asked as AskedOf
from kivnun.serve.question import Question, read_question
from kivnun.serve.reply import Choice, Head, Stream, new_id, whole
from kivnun.service.answers import Asked, Heard, Link, Links, WorkerLost, addresses_of, find_named
from kivnun.service.batch_files import canonical
from kivnun.service.context import Service
from kivnun.service.dialect import Dialect
from kivnun.service.errors import ApiError
from kivnun.service.owed import Owed
from kivnun.service.tokenizers import Tokenizers

ENDPOINTS: dict[str, Endpoint] = {"/v1/chat/completions": "chat.completion", "/v1/completions": "text_completion"}

PATIENCE_S = 60.0  # a worker may be starting: clients wait longer than it takes to load most bases
LOOK_S = 0.25
WISH_S = 20.0

Pay = Callable[[Charge], None]

logger = logging.getLogger(__name__)


class Answering:
    """Answers requests. Threads and event loops may share it; each loop has connections of its own."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._links: WeakKeyDictionary[asyncio.AbstractEventLoop, Links] = WeakKeyDictionary()
        self._tokenizers = Tokenizers(service.config)
        self._owed = Owed(service)
        self._wished: dict[str, float] = {}

    async def complete(
        self, tenant: str, key_id: str | None, endpoint: str, body: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Charge]:
        """Return the whole answer to a body for an endpoint, and what it used. The endpoint is `/v1/chat/completions` or
        `/v1/completions`; named without /v1, as for batches of Azure's dialect, the body's model is a deployment first.

        Whoever asks charges it, once, with what becomes of the answer; one that is cut off is not charged. Raises ApiError."""
        full = canonical(endpoint)
        if full is None:
            raise ApiError(400, f"endpoint must be one of {', '.join(ENDPOINTS)}", code="invalid_value", param="endpoint")
        if body.get("stream"):
            raise ApiError(400, "an answer of a batch is not streamed: leave stream out", code="invalid_value", param="stream")
        charges: list[Charge] = []
        dialect: Dialect = "openai" if endpoint == full else "azure"
        answer = await self.begin(tenant, key_id, ENDPOINTS[full], body, dialect, pay=charges.append)
        whole_answer = await answer.whole()
        return whole_answer, charges[0]

    async def begin(
        self,
        tenant: str,
        key_id: str | None,
        endpoint: Endpoint,
        body: Mapping[str, Any] | bytes,
        dialect: Dialect,
        deployment: str | None = None,
        pay: Pay | None = None,
    ) -> Answer:
        """Return an answer that has begun to be written. Raises ApiError where none will be.

        `deployment` is the name in the path, which goes before the body's; the dialect says what a name may mean. What the answer
        used is told to `pay` when it ends; without it, it is written down at once."""
        given, name, asked, limits = await run_in_threadpool(self._find, tenant, body, deployment, dialect)
        if not self._tokenizers.is_here(asked.base):  # its weights may be far as well: whoever fetches them begins now
            await self._wish(asked.base, missing=True)
        of = await self._tokenizers.of(asked.base)
        question = await run_in_threadpool(_question, given, endpoint, replace(of, model=name))
        bill = Bill(self._service, Payer(tenant, limits), key_id, asked, question, pay or self._owed.pay)
        try:
            link = await self._link(asked.base)
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
        except BaseException:
            bill.withdraw()
            raise
        content_hash = None if asked.adapter is None else asked.adapter.content_hash
        fingerprint = hashlib.sha256(f"{link.version} {content_hash}".encode()).hexdigest()[:12]
        extra = {"x_adapter_hash": content_hash}
        head = Head(new_id(endpoint), int(self._service.clock()), question, of.tokens, f"kivnun-{fingerprint}", extra)
        return Answer(asked, head, heard, begun, bill, lambda: self._wish(asked.base, missing=False))

    async def _link(self, base: str) -> Link:
        """Return a connection to a worker of a base, waiting a little for one that is starting. Raises ApiError."""
        links = self._links.setdefault(asyncio.get_running_loop(), Links())
        end = time.monotonic() + PATIENCE_S
        while True:
            found = await run_in_threadpool(self._service.db.read, lambda tx: (addresses_of(tx, base), wanted.refusal(tx, base)))
            addresses, refusal = found
            link = await links.best(base, addresses)
            await self._wish(base, missing=link is None)
            if link is not None:
                return link
            if refusal is not None:  # by what has been said since it was asked for: an old one is taken back
                raise overloaded(refusal, "engine_overloaded")
            if time.monotonic() >= end:
                raise overloaded(f"no worker answers for {base} at this moment; one may be starting: try again")
            await asyncio.sleep(LOOK_S)

    async def _wish(self, base: str, missing: bool) -> None:
        """Note that a base is asked for: workers of those that nobody asks for are put away."""
        now = time.monotonic()
        if self._service.config.bases[base].resident and not missing:
            return
        if now - self._wished.get(base, -math.inf) >= (LOOK_S if missing else WISH_S):
            self._wished[base] = now
            await run_in_threadpool(self._service.db.write, "base wanted", lambda tx: wanted.ask(tx, base))

    def _find(
        self, tenant: str, body: Mapping[str, Any] | bytes, deployment: str | None, dialect: Dialect
    ) -> tuple[dict[str, Any], str, Asked, Limits]:
        """Return a body, the name in it (or in the path), whom that means, and what the tenant may have. Raises ApiError."""
        with _told():
            given = object_in(body if isinstance(body, bytes) else json.dumps(body).encode())
            name = deployment if deployment is not None else required(given, "model")
            if not isinstance(name, str):
                raise Refusal(400, "model must be a string", param="model", code="invalid_value")
        config = self._service.config

        def look(tx: Transaction) -> tuple[Asked, Limits]:
            return find_named(tx, config, tenant, name, dialect), limits_of(tx, tenant, config.limits)

        return given, name, *self._service.db.read(look)


@contextmanager
def _told() -> Iterator[None]:
    """Tell a request's refusal as the API's errors are told."""
    try:
        yield
    except Refusal as refusal:
        raise ApiError(refusal.status, refusal.message, code=refusal.code or "invalid_value", param=refusal.param) from None


def _question(given: Mapping[str, Any], endpoint: Endpoint, asked: AskedOf) -> Question:
    with _told():
        return read_question(given, endpoint, asked)


@dataclass(frozen=True, slots=True)
class Payer:
    """Whose minute and whose places an answer takes."""

    tenant: str
    limits: Limits


class Bill:
    """What an answer costs: charged to the minute when it is taken on, corrected and paid once when it ends.

    Raises ApiError 429 when it is made where the tenant has used up its minute or its places."""

    def __init__(self, service: Service, payer: Payer, key_id: str | None, asked: Asked, question: Question, pay: Pay) -> None:
        self._service, self._payer, self._key_id, self._asked, self._pay = service, payer, key_id, asked, pay
        self._charged, self._prompt = question.likely_tokens, question.prompt_tokens
        self._open = True
        self._place = ExitStack()
        self._place.enter_context(service.limits.answering(payer))
        try:
            service.limits.charge_tokens(payer, self._charged)
        except ApiError:
            self._place.close()
            raise

    def withdraw(self) -> None:
        """Nothing was written: nothing is paid."""
        if self._close(0):
            self._open = False

    async def settle(self, written: int) -> None:
        """The answer has ended, with so many tokens written. Only the first time counts."""
        if self._close(self._prompt + written):
            self._open = False
            await run_in_threadpool(self._record, written)

    def _close(self, used: int) -> bool:
        if self._open:
            self._place.close()
            self._service.limits.settle_tokens(self._payer, self._charged, used)
        return self._open

    def _record(self, written: int) -> None:
        asked, price = self._asked, self._service.config.bases[self._asked.base].price
        parts: tuple[tuple[usage.Kind, int, float], ...] = (
            ("prompt", self._prompt, price.prompt),
            ("completion", written, price.completion),
        )
        self._pay(Charge(self._payer.tenant, asked.base, asked.model, self._key_id, parts))


@dataclass(slots=True)
class Answer:
    """An answer that is being written: read it whole, or as chunks, once."""

    asked: Asked
    head: Head
    _heard: Heard
    _begun: Begun
    _bill: Bill
    _goes_on: Callable[[], Awaitable[None]]  # says that its base is in use
    _written: dict[int, int] = field(default_factory=dict[int, int])
    _settling: asyncio.Task[None] | None = None

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

    def leave(self) -> None:
        """Say that nobody reads on. What was written until then is paid; of no effect on an answer that has ended."""
        self._heard.cancel()
        self._settling = asyncio.create_task(self._bill.settle(sum(self._written.values())))

    async def _said(self) -> AsyncIterator[Piece | Done]:
        try:
            while True:
                said = await self._heard.next()
                if isinstance(said, Failed):
                    raise _not_answered(said)
                assert not isinstance(said, Begun)
                if isinstance(said, Done):
                    check_adapter(self.asked, said.adapter)
                    await self._bill.settle(sum(said.tokens))
                    yield said
                    return
                self._written[said.choice] = said.written
                with suppress(DatabaseDown):  # which is no fault of this answer
                    await self._goes_on()
                yield said
        except WorkerLost:
            self._bill.withdraw()
            raise overloaded("the worker that wrote the answer is gone; try again") from None
        except ApiError:
            self._bill.withdraw()  # who gets no answer pays for none
            raise
        finally:
            self.leave()


def check_adapter(asked: Asked, used: str | None) -> None:
    """Raise ApiError where a worker names another adapter than was asked for: such an answer is nobody's."""
    wanted = None if asked.adapter is None else asked.adapter.content_hash
    if used != wanted:
        logger.error("a worker answered with another adapter", extra={"action": "adapter_mismatch", "wanted": wanted, "used": used})
        message = "the answer was written with another adapter than this model's, and is not shown"
        raise ApiError(500, message, code="adapter_mismatch", type="server_error", param="model")


def overloaded(message: str, code: str = "overloaded") -> ApiError:
    return ApiError(503, message, code=code, type="server_error")


def _not_answered(said: object) -> ApiError:
    assert isinstance(said, Failed)
    match said.code:
        case "busy":
            return overloaded("too many answers wait for this base; try again in a moment")
        case "invalid":
            return ApiError(400, said.message, code="invalid_value")
        case "broken":
            return ApiError(500, "the answer failed; the worker's log says why", code="internal_error", type="server_error")
