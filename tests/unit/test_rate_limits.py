"""The buckets of requests and tokens, with a clock of our own: what is let through, what is owed, what clients are told."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kivnun.jobs.config import Limits
from kivnun.service.errors import ApiError
from kivnun.service.limits import RateLimits, duration


@dataclass(frozen=True)
class Who:
    limits: Limits = field(default_factory=lambda: Limits(requests_per_minute=60, tokens_per_minute=600, answers_at_once=2))
    tenant: str = "one"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_minute_s_requests_pass_at_once_and_the_next_waits_for_its_share() -> None:
    clock = Clock()
    limits, who = RateLimits(clock), Who()
    for _ in range(60):
        limits.take_request(who)
    with pytest.raises(ApiError) as refused:
        limits.take_request(who)
    assert (refused.value.status, refused.value.type, refused.value.code) == (429, "requests", "rate_limit_exceeded")
    assert refused.value.headers["retry-after-ms"] == "1000"
    clock.now += 0.999
    with pytest.raises(ApiError) as refused:
        limits.take_request(who)
    assert refused.value.headers["retry-after-ms"] in ("1", "2")
    clock.now += 0.002
    limits.take_request(who)


def test_one_tenant_s_requests_cost_another_nothing() -> None:
    limits, one, other = RateLimits(Clock()), Who(), Who(tenant="other")
    for _ in range(60):
        limits.take_request(one)
    limits.take_request(other)
    assert (limits.left(one)["requests"], limits.left(other)["requests"]) == (0, 59)


def test_tokens_that_were_charged_and_not_used_are_given_back_and_more_than_charged_is_owed() -> None:
    clock = Clock()
    limits, who = RateLimits(clock), Who()
    limits.charge_tokens(who, 500)
    assert limits.left(who)["tokens"] == 100
    limits.settle_tokens(who, 500, 20)
    assert limits.left(who)["tokens"] == 580
    limits.charge_tokens(who, 10)
    limits.settle_tokens(who, 10, 900)  # 320 below nothing
    with pytest.raises(ApiError) as refused:
        limits.charge_tokens(who, 1)
    assert (refused.value.type, refused.value.headers["retry-after-ms"]) == ("tokens", "32100")
    clock.now += 32.1
    limits.charge_tokens(who, 1)


def test_a_request_that_no_minute_can_hold_is_not_to_be_tried_again() -> None:
    with pytest.raises(ApiError) as refused:
        RateLimits(Clock()).charge_tokens(Who(), 601)
    assert (refused.value.status, refused.value.headers["x-should-retry"]) == (429, "false")


def test_a_changed_limit_holds_at_once() -> None:
    limits, who = RateLimits(Clock()), Who()
    for _ in range(60):
        limits.take_request(who)
    more = Who(Limits(requests_per_minute=61))
    limits.take_request(more)
    with pytest.raises(ApiError):
        limits.take_request(more)


def test_the_headers_tell_limit_rest_and_reset_in_each_dialect_s_way() -> None:
    limits, who = RateLimits(Clock()), Who()
    limits.take_request(who)
    limits.charge_tokens(who, 15)
    assert limits.headers(who, "openai") == {
        "x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "59", "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "600", "x-ratelimit-remaining-tokens": "585", "x-ratelimit-reset-tokens": "1.5s",
    }  # fmt: skip
    assert limits.headers(who, "azure")["x-ratelimit-reset-tokens"] == "2"


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0, "0s"), (0.012, "12ms"), (0.0001, "1ms"), (1, "1s"), (1.5, "1.5s"), (59.9996, "1m0s"), (360, "6m0s"), (3661.5, "1h1m1.5s")],
)
def test_a_duration_is_written_as_openai_writes_it(seconds: float, written: str) -> None:
    assert duration(round(seconds * 10**9)) == written


def test_answers_at_once_are_counted_and_given_back_even_after_a_failure() -> None:
    limits, who = RateLimits(Clock()), Who()
    with limits.answering(who), limits.answering(who):
        with pytest.raises(ApiError) as refused, limits.answering(who):
            pytest.fail("a third answer was let in")
        assert refused.value.status == 429
    with pytest.raises(RuntimeError), limits.answering(who):
        raise RuntimeError("it failed")
    with limits.answering(who), limits.answering(who):
        pass


def test_many_threads_get_no_more_than_there_is() -> None:
    limits, who = RateLimits(Clock()), Who()
    passed: list[int] = []

    def ask() -> None:
        for _ in range(30):
            try:
                limits.take_request(who)
            except ApiError:
                continue
            passed.append(1)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passed) == 60


@settings(max_examples=80, deadline=None)
@given(
    limit=st.integers(1, 1000),
    asked=st.lists(st.tuples(st.floats(0, 30), st.integers(0, 400)), max_size=30),
)
def test_no_span_of_time_lets_through_more_than_the_limit_and_its_share(limit: int, asked: list[tuple[float, int]]) -> None:
    """And whoever waits as long as it is told is let through."""
    clock = Clock()
    limits, who = RateLimits(clock), Who(Limits(tokens_per_minute=limit))
    passed: list[tuple[float, int]] = []
    for pause, tokens in asked:
        clock.now += pause
        try:
            limits.charge_tokens(who, tokens)
        except ApiError as refused:
            if tokens > limit:
                continue
            clock.now += int(refused.headers["retry-after-ms"]) / 1000
            limits.charge_tokens(who, tokens)
        passed.append((clock.now, tokens))
    for first, (start, _) in enumerate(passed):
        for last, (end, _) in enumerate(passed[first:], first):
            amount = sum(tokens for _, tokens in passed[first : last + 1])
            assert amount <= limit + (end - start) * limit / 60 + 1e-3
