"""Every route there is, against keys without its scope, without a key, and with another tenant's ids.

The routes are read from the application, so that a new one fails here until its ids are in `MAKERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kivnun.jobs import deployments, models, tuning
from kivnun.jobs.ids import new_id
from kivnun.jobs.tenants import SCOPES, add_key, new_key
from kivnun.service.context import Service
from service_parts import KEY, api, place, service_at
from service_routes import QUERY, Route, all_routes, fillers

OTHER_ADMIN = "sk-kivnun-test-key-of-another-tenant-admin"
ROUTES = list(all_routes())
OPEN = {"GET /health", "GET /ready"}  # what answers without a key


def _job(service: Service, tenant: str) -> str:
    job = tuning.Job(id=new_id("ftjob-"), tenant=tenant, created_at=1.0, model="toy", base="toy", training_file="file-1", method={},
                     seed=1, status="queued", queued_at=1.0)  # fmt: skip
    service.db.write("job", lambda tx: tuning.create(tx, job, new_id))
    return job.id


def _model(service: Service, tenant: str) -> str:
    made = models.Model(f"ft:toy:kivnun::{new_id('')[:8]}", tenant, 1.0, _job(service, tenant), "toy", 1, "m", "h")
    service.db.write("model", lambda tx: models.add(tx, made))
    return made.id


def _deployment(service: Service, tenant: str) -> str:
    name, body = new_id("d-"), {"sku": {}, "properties": {"model": {"name": "toy"}}}
    service.db.write("deployment", lambda tx: deployments.put(tx, tenant, name, "toy", body, 1.0))
    return name


def _key(service: Service, tenant: str) -> str:
    return service.db.write("key", lambda tx: add_key(tx, new_key(), tenant, "k", ["read"], 1.0, new_id)).id


# How to make what a path's parameter names, for a tenant: an id, live and its own.
MAKERS: dict[str, Callable[[Service, str], str]] = {"model": _model, "name": _deployment, "key_id": _key}
# Parameters that name nothing of anybody's.
FREE = {"subscription": "s", "group": "g", "account": "a"}
# Routes whose ids are not a tenant's: who may call them at all is in the matrix of scopes.
OPERATORS = {"GET /v1/x_tenants/{tenant}", "POST /v1/x_tenants/{tenant}"}
BODIES: dict[str, Any] = {"PUT": {"properties": {"model": {"name": "toy"}}}}
# Routes that make what they name.
MAKING = {route for route in map(str, ROUTES) if route.startswith("PUT /subscriptions")}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder: Path = tmp_path_factory.mktemp("service")
    made = service_at(place(folder))
    made.db.write("key", lambda tx: add_key(tx, OTHER_ADMIN, "other", "boss", ["admin"], 1.0, new_id))
    return made


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with api(service) as address, httpx.Client(base_url=address, params=QUERY, timeout=20) as made:
        yield made


def _ask(client: httpx.Client, route: Route, values: dict[str, str], key: str | None = KEY) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return client.request(route.method, route.at(values), headers=headers, json=BODIES.get(str(route), BODIES.get(route.method)))


def test_no_route_answers_without_a_key_but_those_that_are_listed(client: httpx.Client) -> None:
    for route in ROUTES:
        if str(route) in OPEN:
            assert route.needs is None, route
            continue
        assert route.needs is not None, f"{route} asks for no key"
        for key in (None, "sk-wrong"):
            answer = _ask(client, route, fillers(route), key)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), route


def test_a_key_opens_the_routes_of_its_scope_alone(service: Service, client: httpx.Client) -> None:
    keys = {scope: new_key() for scope in SCOPES}
    for scope, key in keys.items():
        service.db.write("key", lambda tx, k=key, s=scope: add_key(tx, k, "default", s, [s], 1.0, new_id))
    for route in ROUTES:
        if route.needs is None:
            continue
        for scope, key in keys.items():
            allowed = route.needs.scope in (None, scope) or scope == "admin"
            status = _ask(client, route, fillers(route), key).status_code
            assert (status == 403) == (not allowed), f"{route} with {scope}: {status}"
        if route.needs.operator:
            assert _ask(client, route, fillers(route), OTHER_ADMIN).status_code == 403, route


@pytest.mark.parametrize("route", [route for route in ROUTES if set(route.params) - set(FREE)], ids=str)
def test_a_foreign_id_answers_as_one_that_there_is_not(service: Service, client: httpx.Client, route: Route) -> None:
    if str(route) in OPERATORS:
        assert route.needs is not None
        assert route.needs.operator
        return
    named = [name for name in route.params if name not in FREE]
    theirs = {name: MAKERS[name](service, "other") for name in named}
    unknown = {name: made[:-4] + "none" for name, made in theirs.items()}
    if str(route) in MAKING:
        assert _ask(client, route, FREE | theirs).status_code == 201, "a name is each tenant's own"
    else:
        foreign, absent = _ask(client, route, FREE | theirs), _ask(client, route, FREE | unknown)
        text = foreign.text
        for name in named:
            text = text.replace(theirs[name], unknown[name])
        assert (foreign.status_code, text) == (absent.status_code, absent.text)
        assert foreign.status_code in (404, 204)
    own = _ask(client, route, FREE | theirs, OTHER_ADMIN)
    assert own.status_code not in (401, 403, 404, 204, 500), f"its owner is answered {own.status_code}: {own.text[:200]}"
