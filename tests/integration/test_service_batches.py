"""Batches over real HTTP, asked for by the stock client; a stand-in answers, and refuses, waits and breaks on demand."""

from __future__ import annotations

import asyncio
import errno
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import sqlalchemy as sa
from openai import AsyncOpenAI, AzureOpenAI, OpenAI
from openai.types import Batch

from kivnun.errors import StorageError
from kivnun.jobs import batches, files, tenants, usage
from kivnun.jobs.database import Database, Transaction
from kivnun.jobs.errors import DatabaseDown
from kivnun.jobs.files import File
from kivnun.jobs.ids import new_id
from kivnun.jobs.schema import outbox
from kivnun.jobs.usage import Charge
from kivnun.service import batching, errors
from kivnun.service.batching import RunBatches
from kivnun.service.context import Service
from kivnun.service.errors import ApiError
from kivnun.service.logs import JsonLines
from kivnun.service.settled import SETTLE_S
from service_parts import KEY, OTHER_KEY, Clock, place, service_at

CHAT = "/v1/chat/completions"
DAY_S = 24 * 3600


@dataclass
class StandIn:
    """Answers with what it was asked; a question's first word says otherwise."""

    asked: list[tuple[str, str, str, str]] = field(default_factory=list[Any])
    at_once: int = 0
    most_at_once: Counter[str] = field(default_factory=Counter[str])
    going: Counter[str] = field(default_factory=Counter[str])
    busy_until: float = 0.0
    breaks: int = 0
    downs: int = 0
    wait_s: float = 0.0

    async def complete(self, tenant: str, key_id: str, endpoint: str, body: dict[str, Any]) -> tuple[dict[str, Any], Charge]:
        text = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        self.asked.append((tenant, key_id, endpoint, text))
        self.going[tenant] += 1
        try:
            self.most_at_once[tenant] = max(self.most_at_once[tenant], self.going[tenant])
            self.most_at_once["all"] = max(self.most_at_once["all"], sum(self.going.values()))
            return await self._answer(text, body), Charge(
                tenant, "toy", "toy", key_id, (("prompt", 3, 2.0), ("completion", 2, 4.0))
            )
        finally:
            self.going[tenant] -= 1

    async def _answer(self, text: str, body: dict[str, Any]) -> dict[str, Any]:
        if time.monotonic() < self.busy_until:
            raise ApiError(429, "later", code="rate_limit_exceeded", type="tokens", headers={"retry-after-ms": "20"})
        self.downs -= 1
        if self.downs >= 0:
            raise DatabaseDown("the database does not answer", hint="wait")
        if text.startswith("refuse"):
            raise ApiError(404, "there is no model 'no'", code="model_not_found", param="model")
        if text.startswith("break"):
            self.breaks -= 1
            if self.breaks >= 0:
                raise RuntimeError(f"CANARY {text}")
        await asyncio.sleep(60 if text.startswith("hang") else self.wait_s)
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": f"answer to {text} שלום"}}
        return {"id": "chatcmpl-1", "object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WAIT_S", 0.005), ("FIRST_DELAY_S", 0.005), ("LAST_DELAY_S", 0.04)):
        monkeypatch.setattr(batching, name, value)
    monkeypatch.setattr(errors, "RETRY_AFTER_MS", 20)


@dataclass
class SteadyClock(Clock):
    """Has a clock beside it that nobody can turn: time passes on both."""

    passed: float = 0.0

    def steady(self) -> float:
        return time.monotonic() + self.passed

    def pass_by(self, seconds: float) -> None:
        self.now += seconds
        self.passed += seconds


@pytest.fixture
def clock() -> SteadyClock:
    return SteadyClock()


@pytest.fixture
def service(tmp_path: Path, db_url: str, clock: SteadyClock) -> Iterator[Service]:
    made = replace(service_at(place(tmp_path, db_url)), clock=clock)
    yield made
    made.db.close()


@pytest.fixture
def standin() -> StandIn:
    return StandIn()


@pytest.fixture
def duty(service: Service, standin: StandIn, clock: SteadyClock) -> Iterator[RunBatches]:
    made = RunBatches(service, standin, clock.steady)
    yield made
    made.close()
    assert [path.name for path in service.scratch.iterdir()] == []


@pytest.fixture
def client(base_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=base_url, api_key=KEY, max_retries=0) as made:
        yield made


def question(name: str, text: str = "hello", url: str = CHAT) -> dict[str, Any]:
    body = {"model": "toy", "messages": [{"role": "user", "content": text}]} if "chat" in url else {"model": "toy", "prompt": text}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def upload(service: Service, lines: Sequence[dict[str, Any] | str], tenant: str = "default", purpose: str = "batch") -> str:
    content = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines).encode()
    blob = service.blobs.put_bytes(tenant, content)
    made = File(new_id("file-"), tenant, service.clock(), purpose, "in.jsonl", len(content), blob, "processed")
    service.db.write("file", lambda tx: files.add(tx, made))
    return made.id


def lines_of(service: Service, file_id: str | None, tenant: str = "default") -> list[dict[str, Any]]:
    if file_id is None:
        return []
    file = service.db.read(lambda tx: files.find(tx, file_id, tenant))
    assert file is not None
    assert (file.purpose, file.status) == ("batch_output", "processed")
    content = b"".join(service.blobs.read(file.blob))
    assert len(content) == file.bytes
    return [json.loads(line) for line in content.decode().splitlines()]


def turns_until(duty: RunBatches, is_so: Callable[[], bool], within_s: float = 30.0) -> None:
    until = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < until, "it did not come to be"
        if not duty.turn():
            time.sleep(0.002)


def ended(client: OpenAI, duty: RunBatches, batch_id: str) -> Batch:
    """Run the duty until a batch has ended, and return it."""
    db = duty._service.db  # pyright: ignore[reportPrivateUsage]

    def has_ended() -> bool:
        return all(batch.id != batch_id for batch in db.read(batches.open_batches))

    turns_until(duty, has_ended)
    return client.batches.retrieve(batch_id)


def events(service: Service) -> list[tuple[str, str]]:
    rows = service.db.read(lambda tx: tx.execute(sa.select(outbox.c.type, outbox.c.data).order_by(outbox.c.created_at)).all())
    return [(row.type, row.data["id"]) for row in rows]


def test_the_stock_client_gets_every_answer_in_the_order_of_its_questions(
    service: Service, duty: RunBatches, client: OpenAI, standin: StandIn
) -> None:
    lines = [question(f"q{n}", f"refuse {n}" if n % 5 == 3 else f"word {n}") for n in range(40)]
    content = "\n".join(json.dumps(line) for line in lines).encode()
    file_id = client.files.create(file=("in.jsonl", content), purpose="batch").id
    made = client.batches.create(
        input_file_id=file_id, endpoint=CHAT, completion_window="24h", metadata={"of": "mine"},
        output_expires_after={"anchor": "created_at", "seconds": 3600},
    )  # fmt: skip
    assert (made.status, made.object, made.output_file_id, made.errors) == ("validating", "batch", None, None)
    assert made.expires_at == made.created_at + 24 * 3600
    done = ended(client, duty, made.id)
    assert (done.status, done.model, done.metadata) == ("completed", "toy", {"of": "mine"})
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 40, "completed": 32, "failed": 8}
    assert done.usage is not None
    assert (done.usage.input_tokens, done.usage.output_tokens, done.usage.total_tokens) == (96, 64, 160)
    assert all((done.in_progress_at, done.finalizing_at, done.completed_at))
    good, bad = lines_of(service, done.output_file_id), lines_of(service, done.error_file_id)
    assert [line["custom_id"] for line in good] == [f"q{n}" for n in range(40) if n % 5 != 3]
    assert [line["custom_id"] for line in bad] == [f"q{n}" for n in range(40) if n % 5 == 3]
    assert done.output_file_id is not None
    assert [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()] == good
    first = good[0]
    assert first["error"] is None
    assert first["response"]["status_code"] == 200
    assert first["response"]["body"]["choices"][0]["message"]["content"] == "answer to word 0 שלום"
    assert first["response"]["request_id"].startswith("req_")
    assert bad[0]["response"]["status_code"] == 404
    assert bad[0]["response"]["body"]["error"]["code"] == "model_not_found"
    assert len({line["id"] for line in good + bad}) == 40
    assert all(line["id"].startswith("batch_req_") for line in good + bad)
    assert {(tenant, endpoint) for tenant, _, endpoint, _ in standin.asked} == {("default", CHAT)}
    assert len({key for _, key, _, _ in standin.asked}) == 1
    assert len(standin.asked) == 40
    assert events(service) == [("batch.completed", made.id)]
    output = service.db.read(lambda tx: files.find(tx, done.output_file_id or "", "default"))
    assert output is not None
    assert output.expires_at == output.created_at + 3600
    duty.turn()
    assert len(standin.asked) == 40, "a batch that has ended is left alone"


def test_a_file_that_is_not_as_it_should_be_fails_the_batch_with_all_its_errors_by_line(
    service: Service, duty: RunBatches, client: OpenAI, standin: StandIn
) -> None:
    good = question("a")
    file_id = upload(
        service,
        [
            good, "{not json", "[]", {**good, "custom_id": ""}, good, {**question("b"), "method": "GET"},
            {**question("c"), "url": "/v1/embeddings"}, {**question("d"), "url": "/v1/completions"}, {**question("e"), "body": 1},
            {**question("f"), "body": {"messages": []}}, {"custom_id": "g"}, '{"custom_id": "h", "custom_id": "h"}',
            {**question("i"), "body": {**good["body"], "stream": True}},
        ],
    )  # fmt: skip
    made = client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
    done = ended(client, duty, made.id)
    assert (done.status, done.output_file_id, done.error_file_id) == ("failed", None, None)
    assert done.failed_at
    assert done.errors is not None
    assert done.errors.data is not None
    assert [(error.line, error.code, error.param) for error in done.errors.data] == [
        (2, "invalid_json_line", None), (3, "invalid_json_line", None), (4, "invalid_custom_id", "custom_id"),
        (5, "duplicate_custom_id", "custom_id"), (6, "invalid_method", "method"), (7, "invalid_url", "url"),
        (8, "invalid_url", "url"), (9, "invalid_body", "body"), (10, "missing_required_parameter", "body.model"),
        (11, "missing_required_parameter", "method"), (11, "missing_required_parameter", "url"),
        (11, "missing_required_parameter", "body"), (12, "invalid_json_line", None), (13, "invalid_value", "body.stream"),
    ]  # fmt: skip
    assert standin.asked == []
    assert events(service) == [("batch.failed", made.id)]
    nothing = client.batches.create(input_file_id=upload(service, []), endpoint=CHAT, completion_window="24h")
    done = ended(client, duty, nothing.id)
    assert done.status == "failed"
    assert done.errors is not None
    assert done.errors.data is not None
    assert len(done.errors.data) == 1
    many = client.batches.create(input_file_id=upload(service, ["?"] * 150), endpoint=CHAT, completion_window="24h")
    errors = ended(client, duty, many.id).errors
    assert errors is not None
    assert errors.data is not None
    assert (len(errors.data), errors.data[-1].message) == (101, "50 more problems are not listed")


WRONG: list[tuple[dict[str, Any], str, str | None]] = [
    ({"input_file_id": "file-none"}, "invalid_file", "input_file_id"),
    ({"input_file_id": "theirs"}, "invalid_file", "input_file_id"),
    ({"input_file_id": "tuning"}, "invalid_file_purpose", "input_file_id"),
    ({"endpoint": "/v1/embeddings"}, "invalid_endpoint", "endpoint"),
    ({"completion_window": "1h"}, "invalid_value", "completion_window"),
    ({"metadata": {"k" * 65: "v"}}, "invalid_value", None),
    ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "invalid_value", "output_expires_after.seconds"),
    ({"extra_body": {"priority": 1}}, "unknown_parameter", "priority"),
]


def test_a_wrong_batch_is_refused_by_field(service: Service, client: OpenAI) -> None:
    ids = {
        "theirs": upload(service, [question("a")], "other"), "tuning": upload(service, [question("a")], purpose="fine-tune"),
        "ours": upload(service, [question("a")]),
    }  # fmt: skip
    for change, code, param in WRONG:
        given = {"input_file_id": "ours", "endpoint": CHAT, "completion_window": "24h", **change}
        given["input_file_id"] = ids.get(given["input_file_id"], given["input_file_id"])
        with pytest.raises(openai.BadRequestError) as refused:
            client.batches.create(**given)
        assert (refused.value.code, param is None or refused.value.param == param) == (code, True), change
    assert client.batches.list().data == []


def test_batches_are_listed_newest_first_and_another_tenant_finds_none_of_ours(
    service: Service, client: OpenAI, base_url: str, clock: SteadyClock
) -> None:
    file_id = upload(service, [question("a")])
    made: list[str] = []
    for _ in range(5):
        made.append(client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h").id)
        clock.now += 1
    assert [batch.id for batch in client.batches.list(limit=2)] == made[::-1]
    with OpenAI(base_url=base_url, api_key=OTHER_KEY, max_retries=0) as other:
        assert other.batches.list().data == []
        assert other.batches.list(after=made[0]).data == []
        answers: set[tuple[str | None, str | None]] = set()
        for batch_id in (made[0], "batch_none", "batch_é"):
            for call in (other.batches.retrieve, other.batches.cancel):
                with pytest.raises(openai.NotFoundError) as refused:
                    call(batch_id)
                answers.add((refused.value.code, refused.value.param))
        assert answers == {("not_found", "batch_id")}


def test_a_create_that_is_sent_again_makes_one_batch(service: Service, client: OpenAI) -> None:
    file_id = upload(service, [question("a")])

    def create(headers: dict[str, str], metadata: dict[str, str] | None = None) -> str:
        made = client.batches.create(
            input_file_id=file_id, endpoint=CHAT, completion_window="24h", metadata=metadata or {}, extra_headers=headers
        )
        return made.id

    first = create({})
    assert [create({"x-stainless-retry-count": n}) for n in ("1", "2")] == [first, first]
    assert create({}) != first
    keyed = create({"Idempotency-Key": "k"})
    assert create({"Idempotency-Key": "k"}) == keyed
    with pytest.raises(openai.UnprocessableEntityError):
        create({"Idempotency-Key": "k"}, {"other": "body"})
    assert len(client.batches.list().data) == 3


def test_a_cancel_is_prompt_and_keeps_what_was_answered(
    service: Service, duty: RunBatches, client: OpenAI, standin: StandIn
) -> None:
    file_id = upload(service, [question("a"), question("b", "hang"), question("c"), question("d", "hang")])
    made = client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")

    def both_answered() -> bool:
        counts = client.batches.retrieve(made.id).request_counts
        return counts is not None and counts.completed == 2 and standin.going["default"] == 2

    turns_until(duty, both_answered)
    began = time.monotonic()
    cancelling = client.batches.cancel(made.id)
    assert cancelling.status == "cancelling"
    assert client.batches.cancel(made.id).status == "cancelling"
    done = ended(client, duty, made.id)
    assert time.monotonic() - began < 2
    assert (done.status, client.batches.cancel(made.id).status) == ("cancelled", "cancelled")
    assert [line["custom_id"] for line in lines_of(service, done.output_file_id)] == ["a", "c"]
    unanswered = lines_of(service, done.error_file_id)
    assert [(line["custom_id"], line["response"], line["error"]["code"]) for line in unanswered] == [
        ("b", None, "batch_cancelled"), ("d", None, "batch_cancelled"),
    ]  # fmt: skip
    turns_until(duty, lambda: standin.going["default"] == 0)
    assert events(service) == [("batch.cancelled", made.id)]
    early = client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
    client.batches.cancel(early.id)
    done = ended(client, duty, early.id)
    assert (done.status, done.output_file_id, done.error_file_id) == ("cancelled", None, None)


@pytest.mark.parametrize("is_rotated", [False, True])
def test_a_batch_whose_key_is_revoked_stops_and_says_why_and_one_of_another_key_goes_on(
    service: Service, duty: RunBatches, client: OpenAI, base_url: str, standin: StandIn, clock: SteadyClock, is_rotated: bool
) -> None:
    leaked = "sk-kivnun-test-key-that-leaked"
    add = partial(tenants.add_key, key=leaked, tenant="default", name="leaked", scopes=["chat"], now=1.0, new_id=new_id)
    key = service.db.write("key", lambda tx: add(tx))
    file_id = upload(service, [question("a"), question("b", "hang"), question("c", "refuse"), question("d", "hang")])
    made: list[str] = []
    with OpenAI(base_url=base_url, api_key=leaked, max_retries=0) as other:
        for _ in range(2):
            made.append(other.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h").id)
            clock.now += 1
    theirs, waiting = made
    ours = client.batches.create(input_file_id=upload(service, [question("o")]), endpoint=CHAT, completion_window="24h").id
    turns_until(duty, lambda: _answered(client, theirs) == 2 and standin.going["default"] == 2)

    def revoke(tx: Transaction) -> None:
        if is_rotated:
            tenants.rotate_key(tx, key, "sk-kivnun-test-key-instead", 2.0, new_id)
        else:
            tenants.revoke_key(tx, key.id, "default", 2.0)

    service.db.write("revoke", revoke)
    asked = len(standin.asked)
    stopped, never_begun, done = (ended(client, duty, batch_id) for batch_id in (theirs, waiting, ours))
    assert [one.status for one in (stopped, never_begun, done)] == ["cancelled", "cancelled", "completed"]
    assert [line["custom_id"] for line in lines_of(service, stopped.output_file_id)] == ["a"]
    unanswered = [line["custom_id"] for line in lines_of(service, stopped.error_file_id) if line["response"] is None]
    assert unanswered == ["b", "d"]
    assert key.id not in [key_id for _, key_id, *_ in standin.asked[asked:]]
    for batch in (stopped, never_begun):
        assert batch.errors is not None
        assert batch.errors.data is not None
        (error,) = batch.errors.data
        assert error.code == "api_key_revoked"
        assert key.id in (error.message or "")
    assert done.errors is None
    used = service.db.read(lambda tx: usage.summary(tx, "default", 0, service.clock() + 1, "kind"))
    assert [(one.kind, one.tokens) for one in used] == [("completion", 4), ("prompt", 6)], "a line that is cut off costs nothing"


def test_a_batch_whose_key_expires_goes_on(service: Service, duty: RunBatches, client: OpenAI, clock: SteadyClock) -> None:
    key = service.db.write(
        "key", lambda tx: tenants.add_key(tx, "sk-of-an-hour", "default", "short", ["chat"], 1.0, new_id, clock.now + 3600)
    )
    file_id = upload(service, [question("a")])
    made = batches.Batch("batch_1", "default", clock.now, CHAT, key.id, file_id, "24h")
    service.db.write("create", lambda tx: batches.create(tx, made))
    clock.pass_by(7200)
    assert ended(client, duty, made.id).status == "completed"


def test_a_batch_that_has_ended_otherwise_cannot_be_cancelled(service: Service, duty: RunBatches, client: OpenAI) -> None:
    made = client.batches.create(input_file_id=upload(service, [question("a")]), endpoint=CHAT, completion_window="24h")
    assert ended(client, duty, made.id).status == "completed"
    with pytest.raises(openai.BadRequestError, match="completed") as refused:
        client.batches.cancel(made.id)
    assert refused.value.code == "batch_terminal"


def test_a_batch_expires_after_a_day_with_what_was_answered(
    service: Service, duty: RunBatches, client: OpenAI, standin: StandIn, clock: SteadyClock
) -> None:
    file_id = upload(service, [question("a", "hang"), question("b"), question("c", "refuse")])
    made = client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
    turns_until(duty, lambda: _answered(client, made.id) == 2)
    clock.pass_by(24 * 3600 - 1)
    duty.turn()
    assert client.batches.retrieve(made.id).status == "in_progress"
    clock.pass_by(1)
    done = ended(client, duty, made.id)
    assert (done.status, done.expired_at) == ("expired", int(clock.now))
    assert [line["custom_id"] for line in lines_of(service, done.output_file_id)] == ["b"]
    missing, refused = lines_of(service, done.error_file_id)
    assert (missing["custom_id"], missing["error"]["code"], refused["custom_id"], refused["error"]) == (
        "a",
        "batch_expired",
        "c",
        None,
    )
    assert events(service) == [("batch.expired", made.id)]


@pytest.mark.parametrize("restarts", [False, True])
def test_a_clock_that_jumps_by_a_day_ends_no_batch_and_one_that_stays_there_does(
    service: Service, client: OpenAI, standin: StandIn, clock: SteadyClock, restarts: bool
) -> None:
    duty = RunBatches(service, standin, clock.steady)
    file_id = upload(service, [question("a", "hang"), question("b")])
    made = client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
    turns_until(duty, lambda: _answered(client, made.id) == 1)
    for jump_s in (DAY_S, -DAY_S, -DAY_S, DAY_S, DAY_S):
        clock.now += jump_s
        if restarts:
            duty.close()
            duty = RunBatches(service, standin, clock.steady)
        for _ in range(3):
            duty.turn()
        assert client.batches.retrieve(made.id).status == "in_progress"
    assert restarts or len(standin.asked) == 2, "what was being answered was not cut off"
    clock.pass_by(SETTLE_S - 5)
    duty.turn()
    assert client.batches.retrieve(made.id).status == "in_progress"
    clock.pass_by(5)
    done = ended(client, duty, made.id)
    duty.close()
    assert (done.status, len(lines_of(service, done.output_file_id))) == ("expired", 1)


def _answered(client: OpenAI, batch_id: str) -> int:
    counts = client.batches.retrieve(batch_id).request_counts
    assert counts is not None
    return counts.completed + counts.failed


def test_an_answer_of_later_is_waited_out_and_a_broken_line_is_refused_in_the_end(
    service: Service, duty: RunBatches, client: OpenAI, standin: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    standin.busy_until, standin.breaks, standin.downs = time.monotonic() + 0.3, 3, 15
    file_id = upload(service, [question("a"), question("b", "break once"), question("c")])
    done = ended(client, duty, client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h").id)
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 3, "completed": 3, "failed": 0}
    assert len(standin.asked) < 60, "it does not ask all the time"
    standin.breaks = 100
    done = ended(client, duty, client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h").id)
    assert done.status == "completed"
    (bad,) = lines_of(service, done.error_file_id)
    assert (bad["custom_id"], bad["response"]["status_code"]) == ("b", 500)
    log = "".join(JsonLines().format(record) for record in caplog.records)
    assert "batch_line_failed" in log
    assert "CANARY" not in json.dumps(bad) + log


def test_lines_at_once_are_bounded_for_a_tenant_and_in_all(
    service: Service, duty: RunBatches, client: OpenAI, standin: StandIn
) -> None:
    standin.wait_s = 0.01
    made = client.batches.create(
        input_file_id=upload(service, [question(str(n)) for n in range(60)]), endpoint=CHAT, completion_window="24h"
    )
    theirs = batches.Batch("batch_x", "other", service.clock(), CHAT, "key_x", upload(service, [question("t")] * 1, "other"), "24h")
    service.db.write("create", lambda tx: batches.create(tx, theirs))
    assert ended(client, duty, made.id).status == "completed"
    assert standin.most_at_once["default"] <= batching.AT_ONCE_A_TENANT
    assert standin.most_at_once["all"] <= batching.AT_ONCE
    order = [tenant for tenant, *_ in standin.asked]
    assert order.index("other") < 59, "another tenant's batch does not wait for the end of ours"


def test_what_the_database_did_not_take_is_recorded_later_and_asked_once(
    service: Service, standin: StandIn, client: OpenAI
) -> None:
    failures = iter([True, True])

    def watch(point: str) -> None:
        if point == "before record answers" and next(failures, False):
            raise DatabaseDown("the database does not answer", hint="wait")

    db = Database(service.db.url.render_as_string(hide_password=False), watch)
    duty = RunBatches(replace(service, db=db), standin)
    made = client.batches.create(
        input_file_id=upload(service, [question(str(n)) for n in range(5)]), endpoint=CHAT, completion_window="24h"
    )
    until, downs = time.monotonic() + 30, 0
    while client.batches.retrieve(made.id).status != "completed":
        assert time.monotonic() < until
        try:
            duty.turn()
        except DatabaseDown:
            downs += 1
    duty.close()
    db.close()
    assert downs == 2
    assert len(standin.asked) == 5


def test_a_second_run_asks_only_for_the_lines_that_have_no_answer(service: Service, standin: StandIn, client: OpenAI) -> None:
    first = RunBatches(service, standin)
    lines = [question(str(n), "hang" if n % 2 else f"word {n}") for n in range(8)]
    made = client.batches.create(input_file_id=upload(service, lines), endpoint=CHAT, completion_window="24h")
    turns_until(first, lambda: _answered(client, made.id) == 4)
    first.close()
    standin.asked.clear()
    other = StandIn()
    second = RunBatches(service, _Unhung(other))
    done = ended(client, second, made.id)
    second.close()
    assert sorted(text for *_, text in other.asked) == ["", "", "", ""]
    assert [line["custom_id"] for line in lines_of(service, done.output_file_id)] == [str(n) for n in range(8)]


@dataclass
class _Unhung:
    inner: StandIn

    async def complete(self, tenant: str, key_id: str, endpoint: str, body: dict[str, Any]) -> tuple[dict[str, Any], Charge]:
        text = body["messages"][0]["content"].replace("hang", "")
        return await self.inner.complete(tenant, key_id, endpoint, {**body, "messages": [{"role": "user", "content": text}]})


def test_an_input_file_that_is_gone_fails_its_batch_and_no_other(service: Service, duty: RunBatches, client: OpenAI) -> None:
    lost, gone, good = (upload(service, [question(name)]) for name in ("lost", "gone", "good"))
    made = [client.batches.create(input_file_id=i, endpoint=CHAT, completion_window="24h") for i in (lost, gone, good)]
    file = service.db.read(lambda tx: files.find(tx, lost, "default"))
    assert file is not None
    service.blobs.delete(file.blob)
    service.db.write("delete", lambda tx: files.delete(tx, gone, "default", service.clock()))
    found = [ended(client, duty, batch.id) for batch in made]
    assert [batch.status for batch in found] == ["failed", "failed", "completed"]
    codes = [batch.errors.data[0].code if batch.errors and batch.errors.data else None for batch in found]
    assert codes == ["internal_error", "invalid_file", None]


def test_a_full_disk_is_waited_out_and_no_answer_is_lost(
    service: Service, duty: RunBatches, client: OpenAI, standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, put, missing = service.blobs.fetch, service.blobs.put, Counter({"fetch": 6, "put": 6})

    def full(name: str) -> None:
        missing[name] -= 1
        if missing[name] >= 0:
            raise OSError(errno.ENOSPC, "full") if name == "fetch" else StorageError("the disk is full", hint="make room")

    monkeypatch.setattr(service.blobs, "fetch", lambda *given: (full("fetch"), fetch(*given)))
    monkeypatch.setattr(service.blobs, "put", lambda *given: (full("put"), put(*given))[1])
    file_id = upload(service, [question(str(n)) for n in range(3)])
    done = ended(client, duty, client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h").id)
    assert (done.status, len(lines_of(service, done.output_file_id)), len(standin.asked)) == ("completed", 3, 3)
    assert max(missing.values()) < 0


def test_troubles_are_counted_anew_once_a_batch_got_on(
    service: Service, duty: RunBatches, client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    troubles = Counter[str]()

    def stumbling(name: str, real: Callable[..., Any], *given: Any) -> Any:
        troubles[name] += 1
        if troubles[name] < batching.TRIES:
            raise RuntimeError("a hiccup")
        return real(*given)

    for name in ("validated", "requests_of", "write_answers"):
        monkeypatch.setattr(batching, name, partial(stumbling, name, getattr(batching, name)))
    file_id = upload(service, [question("a")])
    made = client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
    assert ended(client, duty, made.id).status == "completed"


def test_a_batch_that_cannot_go_on_ends_with_the_answers_it_has(service: Service, standin: StandIn, client: OpenAI) -> None:
    first = RunBatches(service, standin)
    file_id = upload(service, [question("a"), question("b", "hang")])
    made = client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
    turns_until(first, lambda: _answered(client, made.id) == 1)
    first.close()
    file = service.db.read(lambda tx: files.find(tx, file_id, "default"))
    assert file is not None
    service.blobs.delete(file.blob)
    second = RunBatches(service, standin)
    done = ended(client, second, made.id)
    second.close()
    assert (done.status, [line["custom_id"] for line in lines_of(service, done.output_file_id)]) == ("expired", ["a"])
    assert done.errors is not None
    assert done.errors.data is not None
    assert done.errors.data[0].code == "internal_error"
    assert events(service) == [("batch.expired", made.id)]


def test_a_line_that_a_crash_had_asked_again_is_charged_once(service: Service, standin: StandIn, client: OpenAI) -> None:
    def down(point: str) -> None:
        if point == "before record answers":
            raise DatabaseDown("the database does not answer", hint="wait")

    db = Database(service.db.url.render_as_string(hide_password=False), down)
    first, second = RunBatches(replace(service, db=db), standin), RunBatches(service, standin)
    file_id = upload(service, [question("a"), question("b"), question("c", "refuse")])
    made = client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
    with pytest.raises(DatabaseDown):
        turns_until(first, lambda: False)
    first.close()
    db.close()
    assert ended(client, second, made.id).status == "completed"
    second.close()
    assert len(standin.asked) > 3
    used = service.db.read(lambda tx: usage.summary(tx, "default", 0, service.clock() + 1, "kind"))
    assert [(one.kind, one.tokens, one.cost_micros) for one in used] == [("completion", 4, 16), ("prompt", 6, 12)]


def test_azure_leaves_out_v1_and_async_clients_do_the_same(
    service: Service, duty: RunBatches, client: OpenAI, base_url: str, standin: StandIn
) -> None:
    file_id = upload(service, [question("a", url="/chat/completions"), question("b", url=CHAT)])
    with AzureOpenAI(azure_endpoint=base_url.removesuffix("/v1"), api_key=KEY, api_version="2024-10-21", max_retries=0) as azure:
        made = azure.batches.create(input_file_id=file_id, endpoint="/chat/completions", completion_window="24h")  # type: ignore[arg-type]
        done = ended(azure, duty, made.id)
        assert (done.endpoint, done.status) == ("/chat/completions", "completed")
        full = azure.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
        assert [ended(azure, duty, full.id).endpoint, full.endpoint] == [CHAT, CHAT]
    assert {endpoint for _, _, endpoint, _ in standin.asked} == {"/chat/completions"}, "under /openai, however it is spelled"
    prompts = upload(service, [question("p", "plain", "/v1/completions")])

    async def created() -> str:
        async with AsyncOpenAI(base_url=base_url, api_key=KEY, max_retries=0) as awaited:
            return (await awaited.batches.create(input_file_id=prompts, endpoint="/v1/completions", completion_window="24h")).id

    assert ended(client, duty, asyncio.run(created())).status == "completed"
    # Whoever answers is told the endpoint as the dialect has it: it says whether a model's name is a deployment's first.
    assert {endpoint for _, _, endpoint, _ in standin.asked} == {"/chat/completions", "/v1/completions"}
