"""What a tenant may ask for in a minute: a bucket of requests and a bucket of tokens, each refilled evenly.

The buckets are this process's own. One API process serves one SQLite file, so that is the whole service; several API processes on
PostgreSQL each admit the full limit, and an operator divides it by their number. A restart fills the buckets: nothing that is paid
for depends on them. Quotas (jobs, files, bytes) are counted in the database instead. Next: `auth.py`, which takes a request from
its bucket, and `frame.py`, which writes the headers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from kivnun.jobs.config import Limits
from kivnun.service.dialect import Dialect
from kivnun.service.errors import ApiError

MINUTE_S = 60.0
Kind = Literal["requests", "tokens"]


class Limited(Protocol):
    """Whose limits count: a caller, or a batch on behalf of one."""

    @property
    def tenant(self) -> str: ...

    @property
    def limits(self) -> Limits: ...


@dataclass(slots=True)
class Bucket:
    """What was taken and is not refilled yet. Holding what is spent, not what is left, lets a limit change at any moment."""

    spent: float = 0.0
    at: float = 0.0

    def settle_to(self, now: float, per_minute: int) -> None:
        """Refill for the time that has passed."""
        self.spent = max(0.0, self.spent - max(0.0, now - self.at) * per_minute / MINUTE_S)
        self.at = max(self.at, now)

    def wait_s(self, amount: float, per_minute: int) -> float:
        """Return how long until `amount` can be taken; 0 where it can be at once."""
        return max(0.0, self.spent + amount - per_minute) * MINUTE_S / per_minute


@dataclass(slots=True)
class _Account:
    requests: Bucket = field(default_factory=Bucket)
    tokens: Bucket = field(default_factory=Bucket)
    answering: int = 0


class RateLimits:
    """The buckets of every tenant. Threads share it. `clock` gives seconds and never goes back (time.monotonic)."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._accounts: dict[str, _Account] = {}

    def take_request(self, caller: Limited) -> None:
        """Count one request. Raises ApiError 429 where the minute's are used up."""
        with self._lock:
            account = self._refilled(caller)
            wait_s = account.requests.wait_s(1, caller.limits.requests_per_minute)
            if not wait_s:
                account.requests.spent += 1
        if wait_s:
            raise _too_many("requests", caller.limits.requests_per_minute, 1, wait_s)

    def charge_tokens(self, caller: Limited, tokens: int) -> None:
        """Count the tokens that a request may come to, before it begins; `settle_tokens` corrects them when it has ended.

        Raises ApiError 429: where it will fit, after which time; where no minute holds so many, not to be tried again."""
        assert tokens >= 0
        limit = caller.limits.tokens_per_minute
        with self._lock:
            account = self._refilled(caller)
            wait_s = account.tokens.wait_s(tokens, limit)
            if not wait_s:
                account.tokens.spent += tokens
        if wait_s:
            raise _too_large(limit, tokens) if tokens > limit else _too_many("tokens", limit, tokens, wait_s)

    def settle_tokens(self, caller: Limited, charged: int, used: int) -> None:
        """Give back what was charged and not used; what was used beyond it is owed, and delays the next request."""
        with self._lock:
            tokens = self._refilled(caller).tokens
            tokens.spent = max(0.0, tokens.spent + used - charged)

    @contextmanager
    def answering(self, caller: Limited) -> Iterator[None]:
        """Hold one of the tenant's places for answers that are being computed. Raises ApiError 429 where all are taken."""
        limit = caller.limits.answers_at_once
        with self._lock:
            account = self._accounts.setdefault(caller.tenant, _Account())
            if free := account.answering < limit:
                account.answering += 1
        if not free:
            message = f"{limit} answers are being computed for you already, which is your limit of answers at once; try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", type="requests")
        try:
            yield
        finally:
            with self._lock:
                account.answering -= 1

    def left(self, caller: Limited) -> dict[Kind, int]:
        """Return how many requests and tokens the tenant may still ask for at once."""
        with self._lock:
            account = self._refilled(caller)
            return {
                "requests": _whole(caller.limits.requests_per_minute - account.requests.spent),
                "tokens": _whole(caller.limits.tokens_per_minute - account.tokens.spent),
            }

    def headers(self, caller: Limited, dialect: Dialect) -> dict[str, str]:
        """Return the six headers that tell a client how it stands. A reset is when nothing of the bucket is spent any more."""
        per_minute: dict[Kind, int] = {
            "requests": caller.limits.requests_per_minute, "tokens": caller.limits.tokens_per_minute
        }  # fmt: skip
        left = self.left(caller)
        with self._lock:
            account = self._accounts[caller.tenant]
            spent: dict[Kind, float] = {"requests": account.requests.spent, "tokens": account.tokens.spent}
        found: dict[str, str] = {}
        for kind, limit in per_minute.items():
            reset_s = spent[kind] * MINUTE_S / limit
            found[f"x-ratelimit-limit-{kind}"] = str(limit)
            found[f"x-ratelimit-remaining-{kind}"] = str(left[kind])
            found[f"x-ratelimit-reset-{kind}"] = str(math.ceil(reset_s)) if dialect == "azure" else duration(reset_s)
        return found

    def _refilled(self, caller: Limited) -> _Account:
        account = self._accounts.setdefault(caller.tenant, _Account())
        now = self._clock()
        account.requests.settle_to(now, caller.limits.requests_per_minute)
        account.tokens.settle_to(now, caller.limits.tokens_per_minute)
        return account


def duration(seconds: float) -> str:
    """Return a time as OpenAI's headers write it, rounded up: `0s`, `12ms`, `1s`, `1.5s`, `6m0s`, `1h0m0s`."""
    millis = math.ceil(seconds * 1000 - 1e-6)
    if millis < 1000:
        return f"{millis}ms" if millis else "0s"
    minutes, rest = divmod(millis, 60_000)
    hours, minutes = divmod(minutes, 60)
    written = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{hours}h{minutes}m{written}" if hours else f"{minutes}m{written}" if minutes else written


def _whole(left: float) -> int:
    return max(0, math.floor(left + 1e-9))


def _too_many(kind: Kind, limit: int, asked: int, wait_s: float) -> ApiError:
    millis = math.ceil(wait_s * 1000)
    message = (
        f"rate limit reached on {kind} per minute: the limit is {limit}, this needs {asked}; try again in {duration(millis / 1000)}"
    )
    headers = {"retry-after-ms": str(millis), "retry-after": str(math.ceil(wait_s))}
    return ApiError(429, message, code="rate_limit_exceeded", type=kind, headers=headers)


def _too_large(limit: int, asked: int) -> ApiError:
    message = (
        f"this request may come to {asked} tokens, and {limit} a minute is the limit: ask for fewer (max_completion_tokens, n)"
    )
    return ApiError(429, message, code="rate_limit_exceeded", type="tokens", headers={"x-should-retry": "false"})
