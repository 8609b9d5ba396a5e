"""Every route there is, against keys without its scope, without a key, and with another tenant's ids.

The routes are read from the application, so that a new one fails here until its ids are in `MAKERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import event

from kivnun.jobs import batches, deployments, files, models, tuning, uploads, webhooks
from kivnun.jobs.ids import new_id
from kivnun.jobs.tenants import SCOPES, add_key, new_key
from kivnun.service.context import Service
from service_parts import KEY, api, place, service_at
from service_routes import QUERY, Route, all_routes, distinct, fillers

OTHER_ADMIN = "sk-kivnun-test-key-of-another-tenant-admin"
ROUTES = list(all_routes())
DEPLOYMENT = next(route.path for route in ROUTES if route.path.startswith("/subscriptions") and route.params[-1] == "name")
METHOD = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}}
OPEN = {"GET /health", "GET /ready"}  # what answers without a key


def _job(service: Service, tenant: str) -> str:
    job = tuning.Job(
        id=new_id("ftjob-"), tenant=tenant, created_at=1.0, model="toy", base="toy", training_file="file-1", method=METHOD, seed=1,
        status="queued", queued_at=1.0,
    )  # fmt: skip
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


def _file(service: Service, tenant: str) -> str:
    blob = service.blobs.put_bytes(tenant, b"{}\n")
    report = service.blobs.put_bytes(tenant, b'{"file": "f", "rows": 1, "problems": []}')
    made = files.File(new_id("file-"), tenant, 1.0, "fine-tune", "f.jsonl", 3, blob, "processed", facts={}, report=report)
    service.db.write("file", lambda tx: files.add(tx, made))
    return made.id


def _upload(service: Service, tenant: str) -> str:
    made = uploads.Upload(new_id("upload_"), tenant, 1.0, service.clock() + 600, "fine-tune", "f.jsonl", "text/jsonl", 3)
    service.db.write("upload", lambda tx: uploads.add(tx, made))
    return made.id


def _endpoint(service: Service, tenant: str) -> str:
    secrets = [{"secret": webhooks.new_secret(), "until": None}]
    made = webhooks.Endpoint(new_id("whep_"), tenant, 1.0, 1.0, "hook", "https://127.0.0.1:1/", ["batch.failed"], secrets)
    service.db.write("endpoint", lambda tx: webhooks.create(tx, made))
    return made.id


def _batch(service: Service, tenant: str) -> str:
    made = batches.Batch(new_id("batch_"), tenant, service.clock(), "/v1/chat/completions", "key_1", "file-1", "24h")
    service.db.write("batch", lambda tx: batches.create(tx, made))
    return made.id


def _batch_file(service: Service, tenant: str) -> str:
    made = files.File(new_id("file-"), tenant, 1.0, "batch", "f.jsonl", 3, service.blobs.put_bytes(tenant, b"{}\n"), "processed")
    service.db.write("file", lambda tx: files.add(tx, made))
    return made.id


# How to make what a path's parameter names, for a tenant: an id, live and its own.
MAKERS: dict[str, Callable[[Service, str], str]] = {
    "model": _model, "name": _deployment, "key_id": _key, "job_id": _job, "file_id": _file, "upload_id": _upload,
    "endpoint_id": _endpoint, "batch_id": _batch,
}  # fmt: skip
# Parameters that name nothing of anybody's.
FREE = {"subscription": "s", "group": "g", "account": "a", "rest": "anything", "deployment": "d"}
# Routes whose ids are not a tenant's: who may call them at all is in the matrix of scopes.
OPERATORS = {"GET /v1/x_tenants/{tenant}", "POST /v1/x_tenants/{tenant}"}
# What a route must be sent, so that it looks for what is named.
BODIES: dict[str, dict[str, Any]] = {
    f"PUT {DEPLOYMENT}": {"json": {"properties": {"model": {"name": "toy"}}}},
    "POST /v1/deployments/{name:path}/chat/completions": {"json": {"messages": "wrong"}},  # which is seen
    "POST /v1/deployments/{name:path}/completions": {"json": {"prompt": {}}},  # after the model is found
    "POST /v1/uploads/{upload_id}/parts": {"files": {"data": ("upload", b"{}\n")}},
    "POST /v1/uploads/{upload_id}/complete": {"json": {"part_ids": ["part_1"]}},
    "POST /v1/webhook_endpoints/{endpoint_id}": {"json": {"name": "another"}},
    "POST /v1/webhook_endpoints/{endpoint_id}/test": {"json": {"event_type": "batch.failed"}},
}
# Routes that make what they name.
MAKING = {f"PUT {DEPLOYMENT}"}
# Routes whose owner is answered 404 all the same: what they ask for is made later.
LATER = {"GET /v1/fine_tuning/jobs/{job_id}/x_report"}


class NotedStore:
    """A store that notes what is done with it."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.done: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.done.append(f"store: {name}")
        return getattr(self._store, name)


@contextmanager
def noted(service: Service) -> Generator[list[str]]:
    """Give a list that the statements come into which are put to the database, and what is done with the store."""
    done: list[str] = []
    store: Any = service.blobs

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        done.append(statement)

    event.listen(service.db.engine, "before_cursor_execute", note)
    store.done = done
    try:
        yield done
    finally:
        event.remove(service.db.engine, "before_cursor_execute", note)
        store.done = []


def assert_same_work(service: Service, ask: Callable[[str], httpx.Response], foreign: str, absent: str) -> None:
    """A foreign id takes the same statements as one that there is not, so it takes the same time. Time itself is noisy."""
    ask(absent)  # what is looked up once and kept is known from here on
    works: list[list[str]] = []
    for named in (foreign, absent):
        with noted(service) as done:
            ask(named)
        works.append(done)
    assert works[0] == works[1]
    assert works[0], "a look into the records is seen"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder: Path = tmp_path_factory.mktemp("service")
    made = service_at(place(folder))
    made = replace(made, blobs=NotedStore(made.blobs))
    made.db.write("key", lambda tx: add_key(tx, OTHER_ADMIN, "other", "boss", ["admin"], 1.0, new_id))
    return made


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with api(service) as address, httpx.Client(base_url=address, params=QUERY, timeout=20) as made:
        yield made


def _ask(client: httpx.Client, route: Route, values: dict[str, str], key: str | None = KEY) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return client.request(route.method, route.at(values), headers=headers, **BODIES.get(str(route), {}))


def test_no_route_answers_without_a_key_but_those_that_are_listed(client: httpx.Client) -> None:
    for route in distinct(ROUTES):
        if str(route) in OPEN:
            assert route.needs is None, route
            continue
        assert route.needs is not None, f"{route} asks for no key"
        answer = _ask(client, route, fillers(route), None)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), route


def test_a_route_takes_the_scope_that_it_names_and_no_other(service: Service, client: httpx.Client) -> None:
    with_it, without = ({scope: new_key() for scope in SCOPES} for _ in range(2))
    for scope in SCOPES:
        others = [other for other in SCOPES if other not in (scope, "admin")]
        for key, scopes in ((with_it[scope], [scope]), (without[scope], others)):
            service.db.write("key", lambda tx, k=key, s=scopes: add_key(tx, k, "default", "k", s, 1.0, new_id))
    for route in distinct(ROUTES):
        if route.needs is None or route.needs.scope is None:
            continue
        scope, values = route.needs.scope, fillers(route)
        assert _ask(client, route, values, with_it[scope]).status_code not in (401, 403), route
        refused = _ask(client, route, values, without[scope])
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_permissions"), route
        if route.needs.operator:
            assert _ask(client, route, values, OTHER_ADMIN).status_code == 403, route


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
        assert_same_work(
            service, lambda which: _ask(client, route, FREE | {"theirs": theirs, "none": unknown}[which]), "theirs", "none"
        )
    if str(route) in LATER:
        return
    own = _ask(client, route, FREE | theirs, OTHER_ADMIN)
    assert own.status_code not in (401, 403, 404, 204, 500), f"its owner is answered {own.status_code}: {own.text[:200]}"


# Foreign ids within a body or a query: the request, the field that holds the id, and how to make one.
_MESSAGES = [{"role": "user", "content": "hi"}]
NAMED: list[tuple[str, str, dict[str, Any], str, Callable[[Service, str], str]]] = [
    ("POST", "/v1/fine_tuning/jobs", {"model": "toy"}, "training_file", _file),
    ("POST", "/v1/fine_tuning/jobs", {"model": "toy", "training_file": "OWN"}, "validation_file", _file),
    ("POST", "/v1/fine_tuning/jobs", {"training_file": "OWN"}, "model", _model),
    ("POST", "/v1/chat/completions", {"messages": _MESSAGES}, "model", _model),
    ("POST", "/v1/chat/completions", {"messages": _MESSAGES}, "model", _deployment),
    ("POST", "/v1/completions", {"prompt": "hi"}, "model", _model),
    ("GET", "/v1/files", {}, "after", _file), ("GET", "/v1/fine_tuning/jobs", {}, "after", _job),
    ("GET", "/v1/webhook_endpoints", {}, "after", _endpoint), ("GET", "/v1/batches", {}, "after", _batch),
    ("POST", "/v1/batches", {"endpoint": "/v1/chat/completions", "completion_window": "24h"}, "input_file_id", _batch_file),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "rest", "field", "make"),
    NAMED,
    ids=[f"{method} {path} {field} {make.__name__}" for method, path, _, field, make in NAMED],
)
def test_a_foreign_id_in_a_body_or_a_query_answers_as_one_that_there_is_not(
    service: Service, client: httpx.Client, method: str, path: str, rest: dict[str, Any], field: str, make: Callable[..., str]
) -> None:
    theirs = make(service, "other")
    unknown = theirs[:-4] + "none"
    own = _file(service, "default")

    def ask(named: str) -> httpx.Response:
        sent = {name: own if value == "OWN" else value for name, value in rest.items()} | {field: named}
        as_query = method == "GET"
        return client.request(
            method,
            path,
            headers={"authorization": f"Bearer {KEY}"},
            params=sent if as_query else None,
            json=None if as_query else sent,
        )

    foreign, absent = ask(theirs), ask(unknown)
    assert (foreign.status_code, foreign.text.replace(theirs, unknown)) == (absent.status_code, absent.text)
    assert_same_work(service, ask, theirs, unknown)
    if method == "GET":
        assert foreign.json()["data"] == []
    else:
        assert foreign.status_code in (400, 404)
        assert unknown in absent.text, "it is refused for the id, and not for something else"


def test_every_list_with_a_cursor_is_in_the_table() -> None:
    def has_cursor(route: Route) -> bool:
        return route.method == "GET" and "after" in route.query

    top = {route.path for route in ROUTES if has_cursor(route) and not route.params}
    assert top == {path for method, path, _, field, _ in NAMED if (method, field) == ("GET", "after")}
