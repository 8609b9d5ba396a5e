"""Keys, tenants, usage, the catalogue and limits over HTTP: who may do what, what is shown once, what ends when."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AzureOpenAI, OpenAI

from kivnun.jobs import usage
from kivnun.jobs.config import ServiceConfig
from kivnun.jobs.ids import new_id
from kivnun.jobs.tenants import add_key, find_key
from kivnun.service.auth import Caller
from kivnun.service.context import Service
from kivnun.service.errors import ApiError
from kivnun.service.limits import RateLimits
from service_parts import KEY, OTHER_KEY, Clock, api, place, service_at

OTHER_ADMIN = "sk-kivnun-test-key-of-another-tenant-admin"
CONFIG = ServiceConfig.model_validate(
    {
        "currency": "ILS", "aliases": {"gpt-4o-mini": "toy"}, "limits": {"requests_per_minute": 100_000},
        "bases": {
            "toy": {"trainer": "toy", "price": {"training": 3.0, "prompt": 0.5, "completion": 1.5}},
            "kivnun/tiny-phi": {"resident": True, "max_rank": 32}, "microsoft/phi-4": {"precision": "nf4"},
            "some/hub-model": {},
        },
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock(1_900_000_000.0)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, clock: Clock) -> Service:
    folder: Path = tmp_path_factory.mktemp("service")
    made = dataclasses.replace(service_at(place(folder), CONFIG), clock=clock)
    made.db.write("key", lambda tx: add_key(tx, OTHER_ADMIN, "other", "boss", ["admin"], 1.0, new_id))
    return made


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with api(service) as address:
        yield address + "/v1"


def _as(url: str, key: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"})


def _new(url: str, maker: str = KEY, **asked: Any) -> dict[str, Any]:
    with _as(url, maker) as client:
        answer = client.post("/x_keys", json={"name": "made", "scopes": ["read"], **asked})
        answer.raise_for_status()
        return answer.json()


def _status(url: str, key: str, path: str = "/x_me") -> int:
    with _as(url, key) as client:
        return client.get(path).status_code


def test_a_key_is_shown_once_and_then_told_by_its_last_letters(url: str) -> None:
    made = _new(url, scopes=["read", "chat"])
    assert made["key"].startswith("sk-kivnun-")
    assert made["hint"] == made["key"][-4:]
    with _as(url, KEY) as client:
        listed = client.get("/x_keys").text
    assert made["id"] in listed
    assert made["key"] not in listed
    assert _status(url, made["key"]) == 200


def test_a_key_ends_when_it_expires_and_when_it_is_revoked(url: str, clock: Clock) -> None:
    brief, kept = _new(url, expires_in_s=60), _new(url)
    assert _status(url, brief["key"]) == 200
    clock.now += 60
    assert (_status(url, brief["key"]), _status(url, kept["key"])) == (401, 200)
    with _as(url, KEY) as client:
        assert client.delete(f"/x_keys/{kept['id']}").json()["revoked_at"] == int(clock.now)
        assert client.delete(f"/x_keys/{kept['id']}").status_code == 200, "revoking twice is no error"
        assert client.post(f"/x_keys/{kept['id']}/rotate").json()["error"]["code"] == "key_ended"
    assert _status(url, kept["key"]) == 401


def test_a_rotated_key_leaves_its_scopes_to_the_new_one(url: str, clock: Clock) -> None:
    old = _new(url, scopes=["read", "tune"])
    with _as(url, old["key"]) as itself:
        new = itself.post(f"/x_keys/{old['id']}/rotate", json={"grace_s": 100}).json()
    assert (new["scopes"], new["name"]) == (["read", "tune"], "made")
    assert (_status(url, old["key"]), _status(url, new["key"])) == (200, 200)
    clock.now += 100
    assert (_status(url, old["key"]), _status(url, new["key"])) == (401, 200)
    with _as(url, KEY) as admin:
        newest = admin.post(
            f"/x_keys/{new['id']}/rotate", headers={"content-type": "application/json"}
        ).json()  # no bytes, as stock clients
    assert (_status(url, new["key"]), _status(url, newest["key"])) == (401, 200)


def test_a_key_without_admin_makes_and_revokes_none_and_rotates_none_but_itself(url: str) -> None:
    weak, victim = _new(url, scopes=["read", "data", "tune", "chat"]), _new(url)
    with _as(url, weak["key"]) as client:
        for scopes in (["read"], ["admin"]):
            answer = client.post("/x_keys", json={"name": "more", "scopes": scopes})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_permissions")
        assert client.delete(f"/x_keys/{victim['id']}").status_code == 403
        assert client.post(f"/x_keys/{victim['id']}/rotate").status_code == 404
    assert _status(url, victim["key"]) == 200


def test_a_tenant_s_admin_rules_its_own_keys_and_no_others(url: str) -> None:
    mine, theirs = _new(url, OTHER_ADMIN), _new(url)
    assert mine["tenant"] == "other"
    with _as(url, OTHER_ADMIN) as client:
        assert client.delete(f"/x_keys/{theirs['id']}").status_code == 404
        assert client.post(f"/x_keys/{theirs['id']}/rotate").status_code == 404
        assert client.post("/x_keys", json={"name": "n", "scopes": ["read"], "tenant": "default"}).status_code == 403
        assert client.get("/x_tenants").status_code == 403
        assert client.get("/x_usage", params={"tenant": "default"}).status_code == 403
        assert theirs["id"] not in client.get("/x_keys").text
        assert client.delete(f"/x_keys/{mine['id']}").status_code == 200


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"scopes": ["root"]}, "scopes.0"), ({"scopes": []}, "scopes"), ({"scopes": ["read", "read"]}, "scopes"),
        ({"name": ""}, "name"), ({"name": "a\nb"}, "name"), ({"name": "n" * 65}, "name"), ({"expires_in_s": 0}, "expires_in_s"),
        ({"expires_in_s": 1e300}, "expires_in_s"), ({"more": 1}, "more"), ({"tenant": "nobody"}, "tenant"),
    ],
)  # fmt: skip
def test_a_wrong_key_is_refused_by_name_of_what_is_wrong(url: str, asked: dict[str, Any], param: str) -> None:
    with _as(url, KEY) as client:
        answer = client.post("/x_keys", json={"name": "made", "scopes": ["read"], **asked})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("key", ["sk-wrong", KEY + "x", KEY[:-1], "x" * 600, KEY.upper()])
def test_a_wrong_key_is_answered_alike_and_without_it(url: str, key: str) -> None:
    for headers in ({"authorization": f"Bearer {key}"}, {"api-key": key}):
        answer = httpx.get(url + "/x_me", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert key not in answer.text
        assert "x-ratelimit-limit-requests" not in answer.headers


def test_a_key_s_last_use_is_known_to_the_minute(service: Service, url: str, clock: Clock) -> None:
    made = _new(url)

    def used() -> float | None:
        found = service.db.read(lambda tx: find_key(tx, made["key"]))
        assert found is not None
        return found.last_used_at

    assert used() is None
    _status(url, made["key"])
    first = clock.now
    clock.now += 59
    _status(url, made["key"])
    assert used() == first
    clock.now += 1
    _status(url, made["key"])
    assert used() == clock.now


def test_the_operator_makes_tenants_with_limits_and_shares_of_their_own(url: str) -> None:
    with _as(url, KEY) as client:
        made = client.post("/x_tenants", json={"id": "third", "weight": 2, "limits": {"files": 7}}).json()
        assert (made["weight"], made["own_limits"], made["limits"]["files"]) == (2.0, {"files": 7}, 7)
        again = client.post("/x_tenants", json={"id": "third"})
        assert (again.status_code, again.headers["x-should-retry"]) == (409, "false")
        key = _new(url, tenant="third", scopes=["admin"])["key"]
        with _as(url, key) as third:
            assert third.get("/x_me").json()["limits"]["files"] == 7
            assert client.post("/x_tenants/third", json={"limits": {"active_jobs": 9}}).json()["own_limits"] == {"active_jobs": 9}
            me = third.get("/x_me").json()
        assert (me["tenant"], me["operator"], me["limits"]["files"], me["left"]["active_jobs"]) == ("third", False, 10_000, 9)
        assert {"default", "other", "third"} <= {row["id"] for row in client.get("/x_tenants").json()["data"]}
        assert client.get("/x_tenants/nobody").status_code == client.post("/x_tenants/nobody", json={}).status_code == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"id": "Bad Name"}, "id"), ({"id": "../up"}, "id"), ({"id": "a", "weight": 0}, "weight"),
        ({"id": "a", "limits": {"speed": 1}}, "limits.speed"), ({"id": "a", "limits": {"files": 0}}, "limits.files"),
        ({"id": "a", "limits": {"files": 1 << 60}}, "limits.files"), ({"id": "a", "limits": {"files": "7"}}, "limits.files"),
    ],
)  # fmt: skip
def test_a_wrong_tenant_is_refused_by_name_of_what_is_wrong(url: str, body: dict[str, Any], param: str) -> None:
    with _as(url, KEY) as client:
        answer = client.post("/x_tenants", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_usage_tells_a_tenant_s_own_sums_with_exact_costs(service: Service, url: str) -> None:
    day = 20_500 * usage.DAY_S
    for tenant, kind, tokens, price, at in (
        ("other", "prompt", 1_000_001, 0.5, day), ("other", "completion", 10, 1.5, day + usage.DAY_S),
        ("default", "prompt", 77, 0.5, day),
    ):  # fmt: skip
        service.db.write(
            "usage", lambda tx, t=tenant, k=kind, n=tokens, p=price, a=at: usage.record(tx, t, k, "toy", "toy", n, p, a)
        )
    span = {"start": day, "end": day + 2 * usage.DAY_S}
    with _as(url, OTHER_KEY) as client:
        by_day = client.get("/x_usage", params={**span, "group_by": "day"}).json()
        total = client.get("/x_usage", params=span).json()["total"]
        for wrong in ({"start": day, "end": day - 1}, {"start": 0, "end": day}, {"start": -1}, {"group_by": "month"}):
            assert client.get("/x_usage", params=wrong).status_code == 400
    assert by_day["currency"] == "ILS"
    assert by_day["data"] == [
        {"group": "2026-02-16", "kind": "prompt", "tokens": 1_000_001, "cost_micros": 500_001, "cost": "0.500001"},
        {"group": "2026-02-17", "kind": "completion", "tokens": 10, "cost_micros": 15, "cost": "0.000015"},
    ]
    assert total == {"tokens": 1_000_011, "cost_micros": 500_016, "cost": "0.500016"}
    with _as(url, KEY) as operator:
        assert operator.get("/x_usage", params={**span, "tenant": "other"}).json()["total"] == total
        assert operator.get("/x_usage", params={**span, "tenant": "nobody"}).status_code == 404


def test_the_catalogue_tells_prices_bounds_families_and_what_is_refused(url: str) -> None:
    with _as(url, OTHER_KEY) as client:
        told = client.get("/x_catalogue").json()
    bases = {base["id"]: base for base in told["data"]}
    assert bases["toy"]["price"] == {"training": 3.0, "prompt": 0.5, "completion": 1.5}
    assert bases["toy"]["aliases"] == ["gpt-4o-mini"]
    assert (bases["microsoft/phi-4"]["family"], bases["microsoft/phi-4"]["window"]) == ("Phi-4", 16_384)
    assert bases["microsoft/phi-4"]["techniques"] == ["QLoRA"]
    assert (bases["kivnun/tiny-phi"]["family"], bases["kivnun/tiny-phi"]["max_rank"]) == ("phi3", 32)
    assert bases["some/hub-model"]["window"] is None, "nothing is asked of a hub"
    assert "block-sparse" in {base["id"]: base["reason"] for base in told["refused"]}["microsoft/Phi-3-small-8k-instruct"]
    assert told["limits"]["files"] == 10_000


class SlowLooks:
    """A clock that moves by 10 ms each time it is looked at, which is a tenth of a request, whatever else this machine does."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


@pytest.mark.parametrize("dialect", ["openai", "azure"])
def test_a_stock_client_recovers_from_a_429_by_itself(service: Service, dialect: str) -> None:
    limited = dataclasses.replace(
        service,
        limits=RateLimits(SlowLooks()),
        config=CONFIG.model_copy(update={"limits": CONFIG.limits.model_copy(update={"requests_per_minute": 600})}),
    )
    found = service.db.read(lambda tx: find_key(tx, KEY))
    assert found is not None
    caller = Caller("default", found, limited.config.limits)
    with contextlib.suppress(ApiError):
        while True:
            limited.limits.take_request(caller)
    with api(limited) as address:
        client = (
            OpenAI(base_url=f"{address}/v1", api_key=KEY) if dialect == "openai"
            else AzureOpenAI(azure_endpoint=address, api_version="2024-10-21", api_key=KEY)
        )  # fmt: skip
        answer = client.models.with_raw_response.list()
        assert (answer.retries_taken, len(answer.parse().data)) == (2, 5)
        with pytest.raises(openai.RateLimitError) as caught:
            client.with_options(max_retries=0).models.list()
        client.close()
    refused = caught.value
    assert (refused.type, refused.code) == ("requests", "rate_limit_exceeded")
    headers = refused.response.headers
    assert 0 < int(headers["retry-after-ms"]) <= 100
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("600", "0")
    assert re.fullmatch(r"60" if dialect == "azure" else r"59\.\d+s|1m0s", headers["x-ratelimit-reset-requests"])
