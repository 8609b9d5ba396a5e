"""How long chats take at a service that is up: many streamed at once, the time to the first text and to the last.

`python -m benchmarks.service_chat URL MODEL --clients 32 --requests 500` with the key in KIVNUN_KEY. On a toy base the times are
the service's own: what computes is stubbed. Next: `kivnun/service/api/chat.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx


@dataclass(frozen=True, slots=True)
class ChatTimes:
    """Seconds to the first text and to the end of each chat, in the order they ended, and how long all took together."""

    first_s: tuple[float, ...]
    whole_s: tuple[float, ...]
    wall_s: float

    def lines(self) -> list[str]:
        """Return what there is to tell, as text."""
        told = [f"{len(self.whole_s)} chats in {self.wall_s:.2f} s, {len(self.whole_s) / self.wall_s:.1f} a second"]
        for name, seconds in (("to the first text", self.first_s), ("to the end", self.whole_s)):
            told.append(f"{name}: p50 {quantile(seconds, 0.5) * 1000:.1f} ms, p99 {quantile(seconds, 0.99) * 1000:.1f} ms")
        return told


def quantile(seconds: Sequence[float], share: float) -> float:
    """Return the smallest of the values that at least `share` of them do not exceed."""
    ordered = sorted(seconds)
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]


def measure(url: str, key: str, model: str, clients: int, requests: int, max_tokens: int = 32) -> ChatTimes:
    """Send streamed chats to `url` (that ends in /v1), `clients` at a time; return their times. Raises where one fails."""
    return asyncio.run(_measure(url, key, model, clients, requests, max_tokens))


async def _measure(url: str, key: str, model: str, clients: int, requests: int, max_tokens: int) -> ChatTimes:
    first: list[float] = []
    whole: list[float] = []
    left = iter(range(requests))
    headers = {"authorization": f"Bearer {key}"}

    async def client(http: httpx.AsyncClient) -> None:
        for number in left:
            messages = [{"role": "user", "content": f"hello {number}"}]
            body = {"model": model, "messages": messages, "max_tokens": max_tokens, "stream": True, "seed": number}
            began = time.perf_counter()
            told = await _streamed(http, f"{url}/chat/completions", body)
            first.append(told - began)
            whole.append(time.perf_counter() - began)

    async with httpx.AsyncClient(headers=headers, timeout=120, limits=httpx.Limits(max_connections=clients)) as http:
        began = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        return ChatTimes(tuple(first), tuple(whole), time.perf_counter() - began)


async def _streamed(http: httpx.AsyncClient, address: str, body: dict[str, object]) -> float:
    """Read an answer to its end; return when its first text came."""
    first, ended = 0.0, False
    async with http.stream("POST", address, json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"a chat was answered {response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif not first and line.startswith("data: ") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                first = time.perf_counter()
    if not ended:
        raise RuntimeError("a chat broke off")
    return first or time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure chats at a service that is up.")
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=500)
    given = parser.parse_args()
    for line in measure(given.url, os.environ["KIVNUN_KEY"], given.model, given.clients, given.requests).lines():
        print(line)


if __name__ == "__main__":
    main()
