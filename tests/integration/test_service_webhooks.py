"""Webhooks over real HTTP: made by the stock client, signed so that it can check them, sent until a receiver takes them."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import openai
import pytest
import sqlalchemy as sa
import standardwebhooks
from openai import AsyncOpenAI, AzureOpenAI, OpenAI

from kivnun.jobs import webhooks
from kivnun.jobs.ids import new_id
from kivnun.jobs.schema import outbox
from kivnun.jobs.webhooks import Endpoint
from kivnun.service.context import Service
from kivnun.service.delivering import DeliverWebhooks
from kivnun.service.outward import Outward
from service_parts import KEY, OTHER_KEY, TOY, Clock, place, service_at
from webhook_receiver import Receiver, status

HOUR = 3600.0
SUCCEEDED = "fine_tuning.job.succeeded"


def cut_off(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b"half")
    handler.connection.shutdown(socket.SHUT_RDWR)


def hang(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(0.5)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    end = made.start()
    yield made
    end()


@pytest.fixture
def service(tmp_path: Path, db_url: str, receiver: Receiver, clock: Clock) -> Iterator[Service]:
    config = TOY.model_copy(update={"webhook_hosts": (receiver.host,)})
    made = replace(service_at(place(tmp_path, db_url), config), clock=clock)
    yield made
    made.db.close()


@pytest.fixture
def duty(service: Service, receiver: Receiver) -> Iterator[DeliverWebhooks]:
    made = DeliverWebhooks(service, Outward((receiver.host,), timeout_s=0.25))
    yield made
    made.close()


@pytest.fixture
def client(base_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=base_url, api_key=KEY, max_retries=0) as made:
        yield made


def happen(service: Service, type: webhooks.EventType = SUCCEEDED, tenant: str = "default", object_id: str = "ftjob-1") -> None:
    service.db.write("tell", lambda tx: webhooks.tell(tx, tenant, type, object_id, service.clock(), new_id))


def listen(service: Service, url: str, types: list[str] | None = None, tenant: str = "default") -> Endpoint:
    now = service.clock()
    secrets = [{"secret": webhooks.new_secret(), "until": None}]
    made = Endpoint(new_id("whep_"), tenant, now, now, "test", url, types or [SUCCEEDED], secrets)
    service.db.write("create", lambda tx: webhooks.create(tx, made))
    return made


def attempt(duty: DeliverWebhooks) -> None:
    """Let the duty send what is due, and wait until it has recorded what came of it."""
    duty.turn()
    until = time.monotonic() + 30
    while duty._busy:  # pyright: ignore[reportPrivateUsage]
        assert time.monotonic() < until
        time.sleep(0.002)


def sent(service: Service, endpoint: Endpoint) -> webhooks.Delivery:
    (only,), _ = service.db.read(lambda tx: webhooks.deliveries_page(tx, endpoint, None, 10))
    return only


# --- the API ----------------------------------------------------------------------------------------------------------------


def test_the_stock_client_makes_changes_lists_and_deletes_endpoints(client: OpenAI, clock: Clock) -> None:
    assert client.webhooks.event_types.list().data == list(webhooks.EVENT_TYPES)
    made = client.webhooks.create(name="ours", url="https://hooks.example.com/in", event_types=[SUCCEEDED, "batch.completed"])
    assert made.signing_secret.startswith("whsec_")
    assert made.signing_secret_hint == f"whsec_...{made.signing_secret[-4:]}"
    assert made.created_at == made.updated_at == int(clock.now)
    clock.now += 10
    found = client.webhooks.retrieve(made.id)
    assert "signing_secret" not in found.to_dict()
    assert client.webhooks.update(made.id, name="ours").updated_at == made.created_at, "no change"
    changed = client.webhooks.update(made.id, name="theirs", event_types=["batch.failed"])
    assert (changed.name, changed.event_types, changed.url) == ("theirs", ["batch.failed"], made.url)
    assert changed.updated_at == int(clock.now)
    more = [client.webhooks.create(name=str(n), url="https://hooks.example.com/", event_types=[SUCCEEDED]).id for n in range(4)]
    listed = [endpoint.id for endpoint in client.webhooks.list(limit=2)]  # follows pages
    assert sorted(listed) == sorted([made.id, *more])
    assert listed[-1] == made.id, "newest first"
    gone = client.webhooks.delete(made.id)
    assert (gone.deleted, gone.id) == (True, made.id)
    for call in (client.webhooks.retrieve, client.webhooks.delete, client.webhooks.rotate_secret):
        with pytest.raises(openai.NotFoundError):
            call(made.id)


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"url": "http://hooks.example.com/"}, "invalid_webhook_url", "url"),
    ({"url": "https://169.254.169.254/"}, "invalid_webhook_url", "url"),
    ({"event_types": []}, "invalid_value", "event_types"),
    ({"event_types": ["response.completed"]}, "invalid_value", "event_types.0"),
    ({"name": ""}, "invalid_value", "name"),
    ({"name": "nul\x00"}, "invalid_value", "name"),
]


def test_a_wrong_endpoint_is_refused_by_field(client: OpenAI) -> None:
    for change, code, param in WRONG:
        with pytest.raises(openai.BadRequestError) as refused:
            client.webhooks.create(**{"name": "n", "url": "https://hooks.example.com/", "event_types": [SUCCEEDED], **change})
        assert (refused.value.code, refused.value.param) == (code, param), change


def test_a_create_that_is_sent_again_shows_the_same_endpoint_and_its_secret(client: OpenAI) -> None:
    def create(retry: str) -> tuple[str, str]:
        made = client.webhooks.create(
            name="n", url="https://hooks.example.com/", event_types=[SUCCEEDED], extra_headers={"x-stainless-retry-count": retry}
        )
        return made.id, made.signing_secret

    assert create("0") == create("1") == create("2")
    assert len(client.webhooks.list().data) == 1


def test_a_create_sent_again_after_its_endpoint_was_changed_shows_no_newer_secret_and_brings_none_back(client: OpenAI) -> None:
    def create() -> Any:
        named = {"Idempotency-Key": "once"}
        return client.webhooks.create(name="n", url="https://hooks.example.com/", event_types=[SUCCEEDED], extra_headers=named)

    made = create()
    assert create().signing_secret == made.signing_secret
    client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    again = create().to_dict()
    assert (again["id"], "signing_secret" in again) == (made.id, False)
    client.webhooks.delete(made.id)
    with pytest.raises(openai.BadRequestError) as refused:
        create()
    assert refused.value.code == "webhook_endpoint_deleted"
    assert client.webhooks.list().data == []


def test_another_tenant_finds_no_endpoint_of_ours(client: OpenAI, base_url: str) -> None:
    ours = client.webhooks.create(name="n", url="https://hooks.example.com/", event_types=[SUCCEEDED]).id
    with OpenAI(base_url=base_url, api_key=OTHER_KEY, max_retries=0) as other:
        answers: list[Any] = []
        for endpoint_id in (ours, "whep_none", "whep_é"):
            calls: list[Callable[[], Any]] = [
                lambda i=endpoint_id: other.webhooks.retrieve(i),
                lambda i=endpoint_id: other.webhooks.update(i, name="x"),
                lambda i=endpoint_id: other.webhooks.delete(i),
                lambda i=endpoint_id: other.webhooks.rotate_secret(i),
                lambda i=endpoint_id: other.webhooks.test(i, event_type=SUCCEEDED),
                lambda i=endpoint_id: other.get(f"/webhook_endpoints/{i}/x_deliveries", cast_to=object),
                lambda i=endpoint_id: other.post(f"/webhook_endpoints/{i}/x_replay", cast_to=object),
            ]
            for call in calls:
                with pytest.raises(openai.NotFoundError) as refused:
                    call()
                answers.append((refused.value.code, refused.value.param))
        assert set(answers) == {("not_found", "webhook_endpoint_id")}
        assert other.webhooks.list().data == []
        assert other.webhooks.list(after=ours).data == []


def test_a_test_event_is_sent_at_once_and_its_answer_is_told(client: OpenAI, receiver: Receiver) -> None:
    made = client.webhooks.create(name="n", url=receiver.url, event_types=[SUCCEEDED])
    receiver.script = [status(418)]
    result = client.webhooks.test(made.id, event_type="batch.completed")
    assert (result.status_code, result.success, result.event_type) == (418, True, "batch.completed")
    headers, body = receiver.got[0]
    assert client.webhooks.unwrap(body, headers, secret=made.signing_secret).type == "batch.completed"
    elsewhere = client.webhooks.create(name="n", url="https://nowhere.invalid/", event_types=[SUCCEEDED])
    with pytest.raises(openai.BadRequestError, match="could not be asked"):
        client.webhooks.test(elsewhere.id, event_type=SUCCEEDED)


def test_azure_and_async_clients_have_the_same_endpoints(base_url: str, client: OpenAI) -> None:
    import asyncio

    root = base_url.removesuffix("/v1")
    with AzureOpenAI(azure_endpoint=root, api_key=KEY, api_version="2024-10-21", max_retries=0) as azure:
        made = azure.webhooks.create(name="n", url="https://hooks.example.com/", event_types=[SUCCEEDED])

    async def listed() -> list[str]:
        async with AsyncOpenAI(base_url=base_url, api_key=KEY, max_retries=0) as awaited:
            return [endpoint.id async for endpoint in awaited.webhooks.list()]

    assert asyncio.run(listed()) == [made.id] == [endpoint.id for endpoint in client.webhooks.list()]


# --- delivery ---------------------------------------------------------------------------------------------------------------


def test_a_receiver_that_fails_in_every_way_gets_the_same_event_in_the_end(
    service: Service, duty: DeliverWebhooks, receiver: Receiver, clock: Clock, client: OpenAI
) -> None:
    endpoint = listen(service, receiver.url)
    receiver.script = [status(500), hang, status(302, {"Location": "http://169.254.169.254/"}), cut_off, status(404)]
    happen(service)
    began = clock.now
    answers: list[str | None] = []
    for n in range(6):
        attempt(duty)
        delivery = sent(service, endpoint)
        answers.append(delivery.last_answer)
        assert delivery.attempts == n + 1
        assert delivery.status == ("delivered" if n == 5 else "pending")
        attempt(duty)  # not before its time
        clock.now = delivery.next_at
    assert answers == [
        "HTTP status 500", "it did not answer in time", "HTTP status 302", "the connection broke off, or the answer is no HTTP",
        "HTTP status 404", "HTTP status 200",
    ]  # fmt: skip
    assert len(receiver.got) == 6
    assert {headers["webhook-id"] for headers, _ in receiver.got} == {json.loads(receiver.got[0][1])["id"]}
    assert len({body for _, body in receiver.got}) == 1
    assert [int(headers["webhook-timestamp"]) for headers, _ in receiver.got] == [
        int(began + wait) for wait in (0, 5, 15, 35, 75, 155)
    ]
    headers, body = receiver.got[0]
    event = client.webhooks.unwrap(body, headers, secret=endpoint.secrets[0]["secret"])
    assert event.type == SUCCEEDED
    assert event.data.id == "ftjob-1"
    standardwebhooks.Webhook(endpoint.secrets[0]["secret"]).verify(body, headers)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body.replace(b"ftjob-1", b"ftjob-2"), headers, secret=endpoint.secrets[0]["secret"])


def test_what_fails_for_72_hours_is_dead_listed_and_can_be_replayed(
    service: Service, duty: DeliverWebhooks, receiver: Receiver, clock: Clock, client: OpenAI
) -> None:
    endpoint = listen(service, receiver.url)
    receiver.script = [status(503)] * 1000
    happen(service)
    began, longest = clock.now, 0.0
    while True:
        attempt(duty)
        delivery = sent(service, endpoint)
        if delivery.status == "dead":
            break
        longest = max(longest, delivery.next_at - clock.now)
        clock.now = delivery.next_at
    assert clock.now == began + 72 * HOUR, "the last attempt is made as the time ends"
    assert longest == 3 * HOUR
    assert 30 < delivery.attempts < 50
    clock.now += 9 * HOUR
    attempt(duty)
    assert len(receiver.got) == delivery.attempts, "a dead one is not sent"
    path = f"/webhook_endpoints/{endpoint.id}"
    dead: Any = client.get(f"{path}/x_deliveries?status=dead", cast_to=object)
    assert [(item["event_type"], item["data"], item["last_answer"]) for item in dead["data"]] == [
        (SUCCEEDED, {"id": "ftjob-1"}, "HTTP status 503")
    ]
    receiver.script = []
    replayed: Any = client.post(f"{path}/x_replay", body={"delivery_ids": [dead["data"][0]["id"]]}, cast_to=object)
    assert replayed["delivery_ids"] == [delivery.id]
    attempt(duty)
    assert sent(service, endpoint).status == "delivered"
    nothing: Any = client.post(f"{path}/x_replay", cast_to=object)
    assert nothing["delivery_ids"] == []


def test_a_rotation_signs_with_both_secrets_for_a_day_only_if_asked(
    service: Service, duty: DeliverWebhooks, receiver: Receiver, clock: Clock, client: OpenAI
) -> None:
    made = client.webhooks.create(name="n", url=receiver.url, event_types=[SUCCEEDED])
    second = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True).signing_secret

    def accepted_by() -> set[str]:
        happen(service)
        attempt(duty)
        headers, body = receiver.got[-1]
        good: set[str] = set()
        for secret in (made.signing_secret, second):
            try:
                client.webhooks.verify_signature(body, headers, secret=secret, tolerance=10**6)
                good.add(secret)
            except openai.InvalidWebhookSignatureError:
                pass
        return good

    assert accepted_by() == {made.signing_secret, second}
    clock.now += 24 * HOUR - 1
    assert accepted_by() == {made.signing_secret, second}
    clock.now += 2
    assert accepted_by() == {second}
    third = client.webhooks.rotate_secret(made.id).signing_secret
    assert third not in (made.signing_secret, second)
    assert accepted_by() == set(), "the second one ended at once"


def test_an_endpoint_that_hangs_holds_up_no_other(service: Service, receiver: Receiver) -> None:
    release = threading.Event()
    slow = Receiver([lambda _handler: release.wait(30) and None] * 50)  # type: ignore[list-item]
    end = slow.start()
    duty = DeliverWebhooks(service, Outward((receiver.host, slow.host), timeout_s=30))
    for _ in range(8):  # more than a tenant may have at once
        listen(service, slow.url)
    fast = listen(service, receiver.url, tenant="other")
    for _ in range(30):
        happen(service)
    happen(service, tenant="other")
    duty.turn()
    until = time.monotonic() + 20
    while not receiver.got:
        duty.turn()
        assert time.monotonic() < until, "held up"
        time.sleep(0.01)
    assert len(slow.got) <= 6
    release.set()
    duty.close()
    end()
    assert sent(service, fast).status == "delivered"


def test_an_endpoint_that_fails_rests_as_a_whole_and_is_asked_again(
    service: Service, duty: DeliverWebhooks, receiver: Receiver, clock: Clock
) -> None:
    endpoint = listen(service, receiver.url)
    receiver.script = [status(500)] * 4
    for n in range(10):
        happen(service, object_id=f"ftjob-{n}")
    asked: list[int] = []
    for _ in range(20):  # seconds
        attempt(duty)
        asked.append(len(receiver.got))
        clock.now += 1
    assert asked[-1] == 3, "after 0, 5 and 15 seconds, whichever events they were"
    clock.now += 60
    for _ in range(10):
        attempt(duty)
        clock.now += 60
    for _ in range(20):
        attempt(duty)
    delivered, _ = service.db.read(lambda tx: webhooks.deliveries_page(tx, endpoint, "delivered", 20))
    assert len(delivered) == 10


def test_what_is_long_over_is_forgotten_and_nothing_else(
    service: Service, duty: DeliverWebhooks, receiver: Receiver, clock: Clock
) -> None:
    endpoint = listen(service, receiver.url)
    happen(service, object_id="ftjob-old")
    happen(service, "batch.failed", object_id="batch-old")  # that nobody wanted to hear of
    attempt(duty)
    attempt(duty)
    clock.now += 31 * 24 * HOUR
    happen(service, object_id="ftjob-new")
    fresh = DeliverWebhooks(service, Outward((receiver.host,)))
    attempt(fresh)
    fresh.close()
    left = service.db.read(lambda tx: tx.execute(sa.select(outbox.c.data)).scalars().all())
    assert left == [{"id": "ftjob-new"}]
    assert sent(service, endpoint).event_data == {"id": "ftjob-new"}


def test_an_event_goes_once_to_each_endpoint_of_its_tenant_that_asked_for_it(
    service: Service, duty: DeliverWebhooks, receiver: Receiver
) -> None:
    both = listen(service, receiver.url, [SUCCEEDED, "batch.completed"])
    listen(service, receiver.url, ["batch.failed"])
    listen(service, receiver.url, tenant="other")
    gone = listen(service, receiver.url)
    service.db.write("delete", lambda tx: webhooks.delete(tx, gone, service.clock()))
    happen(service)
    happen(service, "batch.completed", object_id="batch_1")
    for _ in range(4):
        attempt(duty)
    assert sorted(json.loads(body)["type"] for _, body in receiver.got) == ["batch.completed", SUCCEEDED]
    delivered, _ = service.db.read(lambda tx: webhooks.deliveries_page(tx, both, "delivered", 10))
    assert len(delivered) == 2
    assert None not in service.db.read(lambda tx: tx.execute(sa.select(outbox.c.fanned_out_at)).scalars().all())


def test_what_is_on_its_way_to_a_deleted_endpoint_is_not_sent(service: Service, duty: DeliverWebhooks, receiver: Receiver) -> None:
    endpoint = listen(service, receiver.url)
    happen(service)
    service.db.write("fan", lambda tx: webhooks.fan_out(tx, service.clock(), new_id, 10))
    service.db.write("delete", lambda tx: webhooks.delete(tx, endpoint, service.clock()))
    attempt(duty)
    assert receiver.got == []
    assert sent(service, endpoint).status == "dead"


def test_a_clock_that_jumps_back_a_day_delays_nothing_by_more_than_the_longest_wait(
    service: Service, duty: DeliverWebhooks, receiver: Receiver, clock: Clock
) -> None:
    listen(service, receiver.url)
    receiver.script = [status(500)]
    happen(service)
    attempt(duty)
    clock.now -= 24 * HOUR
    attempt(duty)
    assert len(receiver.got) == 2


def test_a_receiver_gets_the_event_again_where_its_answer_was_not_recorded(service: Service, receiver: Receiver) -> None:
    class Lost(Exception):
        pass

    def watch(point: str) -> None:
        if point == "before settle" and len(receiver.got) == 1:
            raise Lost

    endpoint = listen(service, receiver.url)
    happen(service)
    watched = replace(service, db=service_db_watched(service, watch))
    duty = DeliverWebhooks(watched, Outward((receiver.host,)))
    attempt(duty)
    with pytest.raises(Lost):
        duty.turn()
    attempt(duty)
    duty.close()
    watched.db.close()
    assert [headers["webhook-id"] for headers, _ in receiver.got] == [receiver.got[0][0]["webhook-id"]] * 2
    assert sent(service, endpoint).status == "delivered"


def service_db_watched(service: Service, watch: Callable[[str], None]) -> Any:
    from kivnun.jobs.database import Database

    return Database(service.db.url.render_as_string(hide_password=False), watch)
