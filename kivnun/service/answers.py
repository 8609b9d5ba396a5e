"""Who answers: which model a name means, and the inference workers that can be asked about its base.

A connection to a worker is kept and carries many answers at once. One that breaks ends the answers on it, with an error that says
so; the next question looks into the records again and finds who answers now. Next: `answering.py`, `kivnun/serve/protocol.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kivnun.errors import IntegrityError
from kivnun.jobs import answerers, models
from kivnun.jobs.answerers import TERM_S, Answerer, Stillness
from kivnun.jobs.config import ServiceConfig
from kivnun.jobs.database import Transaction
from kivnun.jobs.deployments import find_deployment
from kivnun.serve.listening import Told
from kivnun.serve.protocol import (
    MAX_MESSAGE_BYTES,
    AdapterName,
    Ask,
    Cancel,
    Done,
    Failed,
    FromWorker,
    Hello,
    Message,
    Welcome,
    from_worker,
    line,
)
from kivnun.service.dialect import Dialect
from kivnun.service.errors import ApiError, bad_request

CONNECT_S = 5.0
SILENCE_S = 600.0  # how long an answer's next word may take
FIRST_REST_S, LONGEST_REST_S = 0.5, 30.0  # between two tries to reach a worker
# A worker whose machine is cut off is given up after 14 s, and the answers on the connection with it.
_CUT_OFF = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 3), (socket.TCP_KEEPCNT, 3), (socket.TCP_USER_TIMEOUT, 14_000))

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a model's name means to a tenant: the base, and the adapter on it (None: the base as it is). `model` is the tuned
    model's own name, or the base's."""

    model: str
    base: str
    adapter: AdapterName | None


# --- names -------------------------------------------------------------------------------------------------------------------


def find_model(tx: Transaction, config: ServiceConfig, tenant: str, name: str) -> Asked:
    """Return what a name means: a base or another name of it, a tuned model or a checkpoint. Raises ApiError."""
    base = config.base_id(name)
    if base is not None:
        return Asked(base, base, None)
    if name in config.refused:
        raise bad_request(f"{name} is not offered: {config.refused[name]}", "model", "model_not_supported")
    row = models.find(tx, name, tenant)
    if row is None:
        raise ApiError(404, f"there is no model {name[:200]!r}", code="model_not_found", param="model")
    if row.base not in config.bases:
        raise bad_request(f"{name} was tuned from {row.base}, which is no longer offered", "model", "model_not_supported")
    return Asked(row.id, row.base, AdapterName(manifest=row.manifest, content_hash=row.content_hash))


def find_named(tx: Transaction, config: ServiceConfig, tenant: str, name: str, dialect: Dialect) -> Asked:
    """Return what a request's name means. A deployment's name is a model's in both dialects: Azure's looks among deployments
    first and then among models, OpenAI's the other way round. Raises ApiError."""
    deployed = None if dialect == "openai" and _is_model(tx, config, tenant, name) else find_deployment(tx, tenant, name)
    try:
        return find_model(tx, config, tenant, name if deployed is None else deployed.model)
    except ApiError as error:
        if error.status == 404 and dialect == "azure":
            raise ApiError(404, f"there is no deployment {name[:200]!r}", code="DeploymentNotFound", param="model") from None
        raise


def _is_model(tx: Transaction, config: ServiceConfig, tenant: str, name: str) -> bool:
    return config.base_id(name) is not None or name in config.refused or models.find(tx, name, tenant) is not None


def addresses_of(tx: Transaction, base: str) -> list[Answerer]:
    """Return the workers that answer for a base, the newest first."""
    return answerers.page(tx, base)


# --- connections -------------------------------------------------------------------------------------------------------------


class WorkerLost(Exception):
    """The worker, or the way to it, is gone: no more of its answers will come."""


class Link:
    """A connection to a worker."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, welcome: Welcome) -> None:
        self._reader, self._writer = reader, writer
        self.version = welcome.version
        self._numbers = itertools.count(1)
        self._open: dict[int, asyncio.Queue[Told | None]] = {}
        self.is_lost = False
        self._task = asyncio.create_task(self._read())

    @classmethod
    async def to(cls, address: Answerer, base: str) -> Link:
        """Return a connection. Raises WorkerLost where nobody is there, or another than the records say."""
        try:
            async with asyncio.timeout(CONNECT_S):
                reader, writer = await _connect(address.where)
                try:
                    writer.write(line(Hello(secret=address.secret)))
                    welcome = await _next(reader)
                    if isinstance(welcome, Welcome) and welcome.base == base:
                        return cls(reader, writer, welcome)
                except BaseException:
                    writer.close()
                    raise
        except (OSError, TimeoutError, IntegrityError) as error:
            raise WorkerLost from error
        writer.close()
        raise WorkerLost

    @property
    def answering(self) -> int:
        """Return how many answers are on their way."""
        return len(self._open)

    def ask(self, question: Callable[[int], Ask]) -> Heard:
        """Put a question, made for the number that it gets."""
        number = next(self._numbers)
        heard = self._open[number] = asyncio.Queue[Told | None]()
        if self.is_lost:
            heard.put_nowait(None)
        else:
            self._send(question(number))
        return Heard(self, number, heard)

    def forget(self, number: int) -> None:
        """Cancel an answer that has not ended."""
        if self._open.pop(number, None) is not None and not self.is_lost:
            self._send(Cancel(id=number))

    def close(self) -> None:
        self._task.cancel()
        self._lose()

    def _send(self, message: Message) -> None:
        self._writer.write(line(message))

    async def _read(self) -> None:
        try:
            while (said := await _next(self._reader)) is not None:
                if isinstance(said, Welcome) or (heard := self._open.get(said.id)) is None:
                    continue
                if isinstance(said, Done | Failed):
                    del self._open[said.id]
                heard.put_nowait(said)
        except (OSError, IntegrityError) as error:
            logger.warning("a connection to a worker broke: %s", type(error).__name__, extra={"action": "answerer_lost"})
        finally:
            self._lose()

    def _lose(self) -> None:
        self.is_lost = True
        self._writer.close()
        for heard in self._open.values():
            heard.put_nowait(None)
        self._open.clear()


@dataclass(slots=True)
class Heard:
    """What a worker says to one question."""

    link: Link
    number: int
    _queue: asyncio.Queue[Told | None]

    async def next(self) -> Told:
        """Return the next thing said. Raises WorkerLost."""
        try:
            async with asyncio.timeout(SILENCE_S):
                said = await self._queue.get()
        except TimeoutError:
            self.cancel()
            raise WorkerLost from None
        if said is None:
            raise WorkerLost
        return said

    def cancel(self) -> None:
        """Say that nobody waits for the answer; of no effect on one that has ended."""
        self.link.forget(self.number)


@dataclass(slots=True)
class _Known:
    """A worker's connection, if there is one, and when the next may be tried."""

    link: Link | None = None
    opening: asyncio.Task[None] | None = None
    rest_s: float = 0.0
    rests_until: float = -math.inf

    @property
    def is_connected(self) -> bool:
        """Return whether there is a connection, or one is being opened."""
        return self.opening is not None or (self.link is not None and not self.link.is_lost)

    async def open(self, address: Answerer, base: str, clock: Callable[[], float]) -> None:
        """Connect. One that cannot be reached is let alone for a while, for longer each time."""
        try:
            self.link, self.rest_s = await Link.to(address, base), 0.0
        except WorkerLost:
            self.rest_s = min(2 * self.rest_s or FIRST_REST_S, LONGEST_REST_S)
            self.rests_until = clock() + self.rest_s
        finally:
            self.opening = None


class Links:
    """The connections of one event loop, by base and worker. `clock` gives seconds and never goes back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._machine = answerers.this_machine()
        self._stillness: dict[str, Stillness] = {}
        self._known: dict[str, dict[str, _Known]] = {}

    async def best(self, base: str, addresses: Sequence[Answerer]) -> Link | None:
        """Return a connection to the worker with the fewest answers of ours on their way; None where none can be reached.

        Nobody waits for one that is being tried while there is another."""
        known = [self._known[base][address.id] for address in self._living(base, addresses)]
        while not (found := [each.link for each in known if each.link is not None and not each.link.is_lost]):
            opening = [each.opening for each in known if each.opening is not None]
            if not opening:
                return None
            await asyncio.wait(opening, return_when=asyncio.FIRST_COMPLETED)
        return min(found, key=lambda link: link.answering)

    def _living(self, base: str, addresses: Sequence[Answerer]) -> list[Answerer]:
        """Return the workers whose beat rises and that this machine can reach; begin to connect to those that are not yet."""
        before = self._known.get(base, {})
        # One whose row is gone is known for as long as its connection lasts: a row that was swept by mistake comes back.
        lasting = {name: each for name, each in before.items() if each.is_connected}
        known = self._known[base] = lasting | {address.id: before.get(address.id, _Known()) for address in addresses}
        stillness = self._stillness.setdefault(base, Stillness(self._clock))
        still_s = stillness.of({address.id: address.beat for address in addresses})
        living = [each for each in addresses if still_s[each.id] < TERM_S and self._can_reach(each)]
        for address in living:
            each = known[address.id]
            if not each.is_connected and self._clock() >= each.rests_until:
                each.opening = asyncio.create_task(each.open(address, base, self._clock))
        return living

    def _can_reach(self, address: Answerer) -> bool:
        """Return whether an address means the same here: at another machine's 127.0.0.1 there may be anybody."""
        return address.machine == self._machine or not address.where.startswith("127.")


async def _connect(where: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if where.startswith("unix:"):
        return await asyncio.open_unix_connection(where.removeprefix("unix:"), limit=MAX_MESSAGE_BYTES)
    host, _, port = where.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=MAX_MESSAGE_BYTES)
    for option, value in _CUT_OFF:
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, option, value)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return reader, writer


async def _next(reader: asyncio.StreamReader) -> FromWorker | None:
    try:
        raw = await reader.readline()
    except ValueError:
        raise IntegrityError("a worker's message is too long", hint="the API and its workers must be of one version") from None
    return from_worker(raw) if raw.endswith(b"\n") else None
