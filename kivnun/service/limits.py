"""What a tenant may ask for in a minute: a bucket of requests and a bucket of tokens, each refilled evenly.

The buckets are this process's own. One API process serves one SQLite file, so that is the whole service; several API processes on
PostgreSQL each admit the full limit, and an operator divides it by their number. Batches are answered by the clerk, whose buckets
are its own as well: a tenant's batches have a minute's tokens to themselves, and no header shows what they took. A restart fills
the buckets: nothing that is paid for depends on them. Quotas (jobs, files, bytes) are counted in the database instead. Next:
`auth.py`, which takes a request from its bucket, and `frame.py`, which writes the headers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from kivnun.jobs.config import Limits
from kivnun.service.dialect import Dialect
from kivnun.service.errors import ApiError

MINUTE_NS = 60 * 10**9
Kind = Literal["requests", "tokens"]


class Limited(Protocol):
    """Whose limits count: a caller, or a batch on behalf of one."""

    @property
    def tenant(self) -> str: ...

    @property
    def limits(self) -> Limits: ...


@dataclass(slots=True)
class Bucket:
    """What was taken and is not refilled yet, in whole numbers: whoever waits as long as it was told gets what it asked for.

    Holding what is spent, not what is left, lets a limit change at any moment. One request or token is MINUTE_NS units; each
    nanosecond refills as many units as the limit of a minute."""

    spent: int = 0
    at: int = 0

    def refill(self, now: int, per_minute: int) -> None:
        self.spent = max(0, self.spent - max(0, now - self.at) * per_minute)
        self.at = max(self.at, now)

    def take(self, amount: int, per_minute: int) -> int:
        """Take `amount` and return 0, or take nothing and return how many nanoseconds it will be until it can be taken."""
        excess = self.spent + (amount - per_minute) * MINUTE_NS
        if excess > 0:
            return _up(excess, per_minute)
        self.spent += amount * MINUTE_NS
        return 0

    def left(self, per_minute: int) -> int:
        return max(0, (per_minute * MINUTE_NS - self.spent) // MINUTE_NS)

    def reset(self, per_minute: int) -> int:
        """Return how many nanoseconds it will be until nothing is spent."""
        return _up(self.spent, per_minute)


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
            wait = account.requests.take(1, caller.limits.requests_per_minute)
        if wait:
            raise _too_many("requests", caller.limits.requests_per_minute, 1, wait)

    def charge_tokens(self, caller: Limited, tokens: int) -> None:
        """Count the tokens that a request may come to, before it begins; `settle_tokens` corrects them when it has ended.

        Raises ApiError 429: where it will fit, after which time; where no minute holds so many, not to be tried again."""
        assert tokens >= 0
        limit = caller.limits.tokens_per_minute
        with self._lock:
            account = self._refilled(caller)
            wait = account.tokens.take(tokens, limit)
        if wait:
            raise _too_large(limit, tokens) if tokens > limit else _too_many("tokens", limit, tokens, wait)

    def settle_tokens(self, caller: Limited, charged: int, used: int) -> None:
        """Give back what was charged and not used; what was used beyond it is owed, and delays the next request."""
        with self._lock:
            tokens = self._refilled(caller).tokens
            tokens.spent = max(0, tokens.spent + (used - charged) * MINUTE_NS)

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
            return {kind: bucket.left(limit) for kind, bucket, limit in _buckets(account, caller.limits)}

    def headers(self, caller: Limited, dialect: Dialect) -> dict[str, str]:
        """Return the six headers that tell a client how it stands. A reset is when nothing of the bucket is spent any more."""
        found: dict[str, str] = {}
        with self._lock:
            for kind, bucket, limit in _buckets(self._refilled(caller), caller.limits):
                reset = bucket.reset(limit)
                found[f"x-ratelimit-limit-{kind}"] = str(limit)
                found[f"x-ratelimit-remaining-{kind}"] = str(bucket.left(limit))
                found[f"x-ratelimit-reset-{kind}"] = str(_up(reset, 10**9)) if dialect == "azure" else duration(reset)
        return found

    def _refilled(self, caller: Limited) -> _Account:
        account = self._accounts.setdefault(caller.tenant, _Account())
        now = round(self._clock() * 10**9)
        for _, bucket, limit in _buckets(account, caller.limits):
            bucket.refill(now, limit)
        return account


def _buckets(account: _Account, limits: Limits) -> tuple[tuple[Kind, Bucket, int], ...]:
    return (
        ("requests", account.requests, limits.requests_per_minute),
        ("tokens", account.tokens, limits.tokens_per_minute),
    )


def duration(nanoseconds: int) -> str:
    """Return a time as OpenAI's headers write it, rounded up to milliseconds: `0s`, `12ms`, `1.5s`, `6m0s`, `1h0m0s`."""
    millis = _up(nanoseconds, 10**6)
    if millis < 1000:
        return f"{millis}ms" if millis else "0s"
    minutes, rest = divmod(millis, 60_000)
    hours, minutes = divmod(minutes, 60)
    written = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{hours}h{minutes}m{written}" if hours else f"{minutes}m{written}" if minutes else written


def _up(amount: int, divisor: int) -> int:
    return -(-amount // divisor)


def _too_many(kind: Kind, limit: int, asked: int, wait: int) -> ApiError:
    message = f"rate limit reached on {kind} per minute: the limit is {limit}, this needs {asked}; try again in {duration(wait)}"
    headers = {"retry-after-ms": str(_up(wait, 10**6)), "retry-after": str(_up(wait, 10**9))}
    return ApiError(429, message, code="rate_limit_exceeded", type=kind, headers=headers)


def _too_large(limit: int, asked: int) -> ApiError:
    message = (
        f"this request may come to {asked} tokens, and {limit} a minute is the limit: ask for fewer (max_completion_tokens, n)"
    )
    return ApiError(429, message, code="rate_limit_exceeded", type="tokens", headers={"x-should-retry": "false"})
