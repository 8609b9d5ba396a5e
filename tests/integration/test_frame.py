"""What every request goes through: caps, headers, both shapes of errors, and a log without contents or secrets."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import APIRouter, FastAPI
from openai import AzureOpenAI, OpenAI
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import StreamingResponse

from kivnun.errors import SpecError
from kivnun.jobs import tuning
from kivnun.jobs.errors import DatabaseDown, StoreDown
from kivnun.jobs.ids import new_id
from kivnun.service import logs
from kivnun.service.auth import Reader
from kivnun.service.context import Service
from kivnun.service.errors import ApiError
from service_parts import KEY, OTHER_KEY, TOY, api, place, service_at

CANARY = "canary-9f31-of-a-prompt"
CAP = 10_000
broken = APIRouter()  # handlers that fail in every way


@broken.get("/x_broken/{how}")
def fail(how: str, who: Reader) -> dict[str, Any]:
    """Fail as handlers do when they should not."""
    if how == "conflict":
        raise ApiError(409, "not in this state", code="conflict")
    raise {
        "database": DatabaseDown("the database does not answer", hint="see its log"),
        "store": StoreDown("the store does not answer", hint="see its log"), "spec": SpecError(CANARY, hint=CANARY),
    }.get(how, RuntimeError(f"{CANARY} {KEY}"))  # fmt: skip


@broken.get("/x_broken_stream")
async def break_off() -> StreamingResponse:
    async def pieces() -> Any:
        yield b"one\n"
        raise RuntimeError(CANARY)

    return StreamingResponse(pieces())


@broken.post("/x_echo")
def echo(body: dict[str, Any], who: Reader) -> dict[str, Any]:
    return body


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder: Path = tmp_path_factory.mktemp("service")
    return service_at(place(folder), TOY.model_copy(update={"max_body_bytes": CAP}))


@pytest.fixture(scope="module")
def log() -> Iterator[io.StringIO]:
    """The log of everything in this module."""
    written, root = io.StringIO(), logging.getLogger()
    before, level = root.handlers[:], root.level
    logs.configure(written)
    yield written
    root.handlers[:] = before
    root.setLevel(level)


@pytest.fixture(scope="module")
def url(service: Service, log: io.StringIO) -> Iterator[str]:
    patched = pytest.MonkeyPatch()
    from kivnun.service import app as module

    real = module.make_app

    def with_broken(made: Service) -> FastAPI:
        app = real(made)
        for prefix in ("/v1", "/openai"):
            app.include_router(broken, prefix=prefix)
        return app

    patched.setattr("service_parts.make_app", with_broken)
    with api(service) as address:
        logs.configure(log)  # after uvicorn has set up its own
        yield address
    patched.undo()


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}) as made:
        yield made


def test_every_answer_has_a_name_that_the_client_finds(url: str, client: httpx.Client) -> None:
    stock = OpenAI(base_url=f"{url}/v1", api_key=KEY)
    assert (stock.models.list()._request_id or "").startswith("req_")
    with pytest.raises(openai.NotFoundError) as refused:
        stock.models.retrieve("nothing")
    assert (refused.value.request_id or "").startswith("req_")
    for answer in (client.get("/v1/models"), client.get("/v1/nothing"), client.get("/v1/x_broken/anyhow"), client.get("/health")):
        assert answer.headers["x-request-id"].startswith("req_")
        assert answer.headers["openai-organization"] == "kivnun"
        assert answer.headers["openai-processing-ms"].isdecimal()
        assert answer.headers["openai-version"] == "2020-10-01"


def test_limits_are_told_on_good_and_bad_answers_of_a_good_key(client: httpx.Client) -> None:
    for path in ("/v1/models", "/v1/models/nothing", "/v1/x_broken/anyhow", "/v1/x_usage?start=x"):
        told = {name for name in client.get(path).headers if name.startswith("x-ratelimit-")}
        assert len(told) == 6, path


@pytest.mark.parametrize(
    ("how", "status", "code", "type"),
    [
        ("anyhow", 500, "internal_error", "server_error"), ("spec", 500, "internal_error", "server_error"),
        ("database", 503, "database_unavailable", "server_error"), ("store", 503, "store_unavailable", "server_error"),
        ("conflict", 409, "conflict", "invalid_request_error"),
    ],
)  # fmt: skip
def test_a_failure_has_the_shape_of_its_dialect_and_nothing_of_what_failed(
    client: httpx.Client, how: str, status: int, code: str, type: str
) -> None:
    for prefix, query in (("/v1", {}), ("/openai", {"api-version": "preview"})):
        answer = client.get(f"{prefix}/x_broken/{how}", params=query)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"], error["param"]) == (status, code, type, None)
        assert ("innererror" in error) == (prefix == "/openai")
        assert CANARY not in answer.text
        assert (answer.headers.get("x-should-retry") == "false") == (status == 409)
        assert ("retry-after-ms" in answer.headers) == (status == 503)


def test_a_failure_within_a_stream_cuts_it_off(client: httpx.Client) -> None:
    with client.stream("GET", "/v1/x_broken_stream") as answer:
        assert answer.status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            answer.read()


def test_a_body_is_capped_by_what_it_says_and_by_what_it_is(client: httpx.Client, url: str) -> None:
    exact = json.dumps({"a": "x" * (CAP - 9)}).encode()
    assert len(exact) == CAP
    json_type = {"content-type": "application/json"}
    assert client.post("/v1/x_echo", content=exact, headers=json_type).status_code == 200
    for content in (exact + b" ", iter([exact, b" "])):
        answer = client.post("/v1/x_echo", content=content, headers=json_type)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:  # it says 1 TB, and sends nothing
        connection.sendall(b"POST /v1/x_echo HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000000000\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 413"


@pytest.mark.parametrize(
    "sent",
    [
        b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: h\r\n\r\nGET /health HT",
        b"POST /v1/x_echo HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n",
    ],
)  # fmt: skip
def test_a_connection_that_nothing_comes_of_is_closed(url: str, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kivnun.service.timely.HEAD_S", 0.2)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(sent)
        with suppress(ConnectionError):
            for _ in range(10):  # byte by byte for as long as it may
                connection.sendall(b"x")
                time.sleep(0.05)
            while connection.recv(65536):
                pass


def test_a_body_that_drips_is_not_waited_for(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kivnun.service.frame.PIECE_S", 0.2)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(f"POST /v1/x_echo HTTP/1.1\r\nHost: h\r\nApi-Key: {KEY}\r\nContent-Length: 100\r\n\r\n".encode())
        connection.settimeout(0.05)
        answer = b""
        for _ in range(60):  # it is never silent for long
            connection.sendall(b"1")
            with suppress(TimeoutError):
                answer = connection.recv(12)
                break
        assert answer == b"HTTP/1.1 408"


@pytest.mark.parametrize("key", ["", "sk-wrong"])
def test_a_large_body_is_not_read_for_a_key_that_opens_nothing(url: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kivnun.service.frame.LARGE_BYTES", 100)
    host, port = url.removeprefix("http://").split(":")
    for framed in ("Content-Length: 101", "Transfer-Encoding: chunked"):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(f"POST /v1/x_echo HTTP/1.1\r\nHost: h\r\nApi-Key: {key}\r\n{framed}\r\n\r\n".encode())
            assert connection.recv(12) == b"HTTP/1.1 401"


@pytest.mark.parametrize("coding", ["gzip", "zstd", "br", "identity, gzip", "x" * 500])
def test_a_coded_body_is_refused_before_it_is_read(client: httpx.Client, coding: str) -> None:
    answer = client.post("/v1/x_echo", content=b"\x1f\x8b" * 10, headers={"content-encoding": coding})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media")
    assert client.post("/v1/x_echo", json={}, headers={"content-encoding": "identity"}).status_code == 200


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", "invalid_json"), (b"\xff\xfe{}", "invalid_json"), (b"[" * 9000, None), (b"[]", "invalid_value"),
        (b"", "missing_required_parameter"),
    ],
)  # fmt: skip
def test_a_malformed_body_is_the_client_s_fault(client: httpx.Client, content: bytes, code: str | None) -> None:
    answer = client.post("/v1/x_echo", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert code is None or answer.json()["error"]["code"] == code


@pytest.mark.parametrize("version", ["2024-10-21", "2025-04-01-preview", "preview", "latest", "v1"])
def test_any_version_of_azure_s_api_is_taken(url: str, version: str) -> None:
    assert AzureOpenAI(azure_endpoint=url, api_version=version, api_key=KEY).models.list().data


@pytest.mark.parametrize("version", ["", "2024", "2024-10-21-beta", "2024-10-21\n", "x" * 500])
def test_a_malformed_version_is_refused_and_a_missing_one_too(client: httpx.Client, version: str) -> None:
    for path in ("/openai/models", "/openai/v1/models"):
        answer = client.get(path, params={"api-version": version})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "api-version")
    assert client.get("/openai/models").json()["error"]["code"] == "missing_required_parameter"
    assert client.get("/openai/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"), ("GET", "/v2/models", 404, "not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("PATCH", "/v1/models", 405, "method_not_allowed"), ("GET", "/v1/models/a%00b", 400, "invalid_value"),
        ("GET", "/v1/x_usage?tenant=%00", 400, "invalid_value"), ("GET", "/v1/models/%ff%fe", 404, "model_not_found"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_told_in_the_same_shape(client: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert status != 405 or answer.headers["allow"] == "GET"


def test_the_service_is_ready_while_its_parts_answer(service: Service, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert httpx.get(url + "/ready").json() == {"status": "ok", "database": "ok", "store": "ok"}

    def down(name: str) -> bool:
        raise StoreDown("the store does not answer", hint="see its log")

    monkeypatch.setattr(service.blobs, "has", down)
    answer = httpx.get(url + "/ready")
    assert (answer.status_code, answer.json()) == (503, {"status": "down", "database": "ok", "store": "down"})
    assert httpx.get(url + "/health").json() == {"status": "ok"}


def test_a_database_that_went_away_makes_the_service_unready_and_not_dead(tmp_path: Path) -> None:
    made = service_at(place(tmp_path))
    gone = dataclasses.replace(made, db=type(made.db)(f"sqlite:///{tmp_path}/no/such/folder/kivnun.sqlite"))
    with api(gone) as address:
        assert httpx.get(address + "/ready").status_code == 503
        answer = httpx.get(address + "/v1/models", headers={"api-key": KEY})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable")
        assert "retry-after-ms" in answer.headers
        assert httpx.get(address + "/health").status_code == 200


def test_metrics_count_requests_by_template_and_jobs_by_status_and_name_nobody(service: Service, client: httpx.Client) -> None:
    job = tuning.Job(
        id="ftjob-metrics", tenant="other", created_at=1.0, model="toy", base="toy", training_file="f", method={}, seed=1,
        status="queued", queued_at=service.clock() - 50,
    )  # fmt: skip
    service.db.write("job", lambda tx: tuning.create(tx, job, new_id))
    client.get("/v1/models/ft:secret-name")
    answer = client.get("/metrics")
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert samples[("kivnun_jobs", ("status", "queued"))] == 1
    assert samples[("kivnun_queue_length",)] == 1
    assert 50 <= samples[("kivnun_queue_oldest_seconds",)] < 90
    assert samples[("kivnun_tokens_total", ("kind", "training"))] == 0
    route = ("route", "/models/{model:path}")
    assert samples[("kivnun_requests_total", ("method", "GET"), route, ("status", "404"))] >= 1
    assert samples[("kivnun_request_seconds_count", ("method", "GET"), route)] >= 1
    for name in ("secret-name", '"other"', "default", "ftjob-"):
        assert name not in answer.text
    for key, status in ((OTHER_KEY, 403), ("sk-wrong", 401)):
        assert client.get("/metrics", headers={"authorization": f"Bearer {key}"}).status_code == status


def test_the_log_tells_of_each_request_and_holds_neither_contents_nor_secrets(client: httpx.Client, log: io.StringIO) -> None:
    log.truncate(0)
    log.seek(0)
    client.post("/v1/x_echo", json={"prompt": CANARY, CANARY: 1}, params={CANARY: CANARY}, headers={"x-canary": CANARY})
    client.post("/v1/x_keys", json={"name": CANARY, "scopes": [CANARY]})
    client.get(f"/v1/models/{CANARY}")
    client.get("/v1/models", headers={"authorization": f"Bearer sk-{CANARY}"})
    client.get("/v1/x_broken/anyhow")
    client.get("/v1/x_broken/database")
    with pytest.raises(httpx.RemoteProtocolError):
        client.get("/v1/x_broken_stream")
    made = client.post("/v1/x_keys", json={"name": CANARY, "scopes": ["read"]}).json()
    for logger in ("kivnun.elsewhere", "uvicorn.error", "some.library"):
        try:
            raise ValueError(CANARY)
        except ValueError:
            logging.getLogger(logger).exception("of %s", CANARY, extra={"prompt": CANARY, "action": "told"})
    logging.getLogger("some.library").warning(f"quotes {CANARY}")
    written = log.getvalue()
    lines = [json.loads(line) for line in written.splitlines()]
    for secret in (CANARY, KEY, made["key"]):
        assert secret not in written
    answered = [line for line in lines if line.get("action") == "request"]
    assert [(line["method"], line["route"], line["status"]) for line in answered] == [
        ("POST", "/x_echo", 200), ("POST", "/x_keys", 400), ("GET", "/models/{model:path}", 404), ("GET", "/models", 401),
        ("GET", "/x_broken/{how}", 500), ("GET", "/x_broken/{how}", 503), ("GET", "/x_broken_stream", 200),
        ("POST", "/x_keys", 200),
    ]  # fmt: skip
    assert all(line["request"].startswith("req_") for line in answered)
    assert (answered[0]["tenant"], answered[0]["key"][:4]) == ("default", "key_")
    failed = next(line for line in lines if line.get("action") == "request_failed")
    assert failed["error"]["type"] == "builtins.RuntimeError"
    assert any("test_frame.py" in frame and frame.endswith(" fail") for frame in failed["error"]["at"])
    allowed = {"time", "level", "logger", "message", "error", *logs.NAMES, *logs.COUNTS}
    assert all(set(line) <= allowed for line in lines)
