"""A toy base's answers, for tests of the service itself: deterministic, as slow as one likes, without a model.

Its tokens are bytes. Its answer names the adapter that wrote it, then spells hexadecimal digits that depend on the adapter, the
prompt and, where the answer is drawn, on seed and stream: so an answer of the wrong adapter, or of a neighbour, is seen.
Next: `listening.py` (the door), `adapters.py` (adapters are fetched and checked as a real base's are).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kivnun.data.chat_shape import Message
from kivnun.errors import KivnunError
from kivnun.serve.adapters import AdapterCache
from kivnun.serve.listening import Cancelling, Tell
from kivnun.serve.protocol import AdapterName, Ask, Begun, Done, Failed, Piece, TokenLogprobs
from kivnun.serve.stop_text import StopText

END = 256
LONGEST = 8192
USUAL_LENGTH = 48  # bytes that an answer has where it is not asked for fewer
AT_ONCE = 4096  # questions


class ToyTokens:
    """Bytes as tokens, and one more that ends an answer."""

    has_template = True
    stop_ids = (END,)
    vocab_size = 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        offered = f"tools: {json.dumps([dict(tool) for tool in tools])}\n" if tools else ""
        said = (f"{message['role']}: {message.get('content') or json.dumps(message.get('tool_calls'))}\n" for message in messages)
        return self.encode(offered + "".join(said) + "assistant: ")

    def special_id(self, text: str) -> int | None:
        return None

    def call_marks(self) -> tuple[str, str] | None:
        return None

    def bytes_of(self, token: int) -> bytes:
        return bytes([token]) if token < END else b""


def toy_answer(adapter: str | None, prompt: Sequence[int], drawn: tuple[int, int] | None = None) -> bytes:
    """Return the whole answer of an adapter (its hash; None: the base) to a prompt; `drawn` is (seed, stream)."""
    key = json.dumps([adapter, list(prompt), drawn]).encode()
    name = "toy" if adapter is None else adapter[:12]
    return f"{name}: {hashlib.sha256(key).hexdigest()}"[:USUAL_LENGTH].encode()


class ToyAnswerer:
    """Answers every question in the event loop, `token_s` seconds a token."""

    def __init__(self, base: str, adapters: AdapterCache[Path], token_s: float = 0.0) -> None:
        self.base, self.version = base, "toy 1"
        self._adapters, self._token_s = adapters, token_s
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def answering(self) -> int:
        """Return how many questions are being answered."""
        return len(self._tasks)

    def ask(self, question: Ask, tell: Tell) -> Cancelling:
        if len(self._tasks) >= AT_ONCE:
            tell(Failed(id=question.id, code="busy", message="too many answers are being written"))
            return lambda: None
        task = asyncio.create_task(self._answer(question, tell))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

        def cancel() -> None:
            task.cancel()

        return cancel

    def close(self) -> None:
        """Nothing outlives the event loop."""

    async def _answer(self, question: Ask, tell: Tell) -> None:
        adapter = question.adapter
        if question.grammar is not None:
            tell(Failed(id=question.id, code="invalid", message="a toy base's answers cannot be held to a form"))
            return
        try:
            if adapter is not None:
                await self._take(question.tenant, adapter)
        except KivnunError as error:
            tell(Failed(id=question.id, code="broken", message=error.message))
            return
        try:
            await self._write(question, None if adapter is None else adapter.content_hash, tell)
        finally:
            if adapter is not None:
                self._adapters.give_back(adapter.content_hash)

    async def _take(self, tenant: str, adapter: AdapterName) -> None:
        taking = asyncio.create_task(asyncio.to_thread(self._adapters.take, tenant, adapter))
        try:
            await asyncio.shield(taking)
        except asyncio.CancelledError:  # the thread goes on: what it takes goes back
            taking.add_done_callback(lambda done: done.exception() or self._adapters.give_back(adapter.content_hash))
            raise

    async def _write(self, question: Ask, adapter: str | None, tell: Tell) -> None:
        prompts = [[_scored(token) for token in prompt] for prompt in question.prompts] if question.prompt_logprobs else None
        tell(Begun(id=question.id, adapter=adapter, prompt_logprobs=prompts))
        rows = [_Row(question, place, adapter) for place in range(len(question.prompts) * question.n)]
        while any(not row.reason for row in rows):
            if self._token_s:
                await asyncio.sleep(self._token_s)
            for row in rows:
                if not row.reason:
                    text, token = row.step()
                    if text or token is not None:
                        tokens = [] if token is None or question.logprobs is None else [_scored(token)]
                        tell(Piece(id=question.id, choice=row.place, text=text, tokens=tokens, written=row.written))
        tell(Done(id=question.id, reasons=[row.reason for row in rows], tokens=[row.written for row in rows], adapter=adapter))  # type: ignore[misc]


class _Row:
    def __init__(self, question: Ask, place: int, adapter: str | None) -> None:
        prompt = place // question.n
        drawn = (question.seed, place % question.n) if question.temperature > 0 else None
        self.place, self.written, self.reason = place, 0, ""
        self._answer = toy_answer(adapter, question.prompts[prompt], drawn)
        self._limit = question.limits[prompt]
        self._stop = StopText(tuple(question.stop))

    def step(self) -> tuple[str, int | None]:
        """Write a token; return the text that may be shown, and the token."""
        if self.written == self._limit or self.written == len(self._answer):
            self.reason = "length" if self.written == self._limit else "stop"
            return self._stop.finish(""), None
        token = self._answer[self.written]
        self.written += 1
        text = self._stop.push(chr(token))
        if self._stop.ended:
            self.reason = "stop"
            return text, None
        return text, token


def _scored(token: int) -> TokenLogprobs:
    return token, -math.log(2), [(token, -math.log(2))]
