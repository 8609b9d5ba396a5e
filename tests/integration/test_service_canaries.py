"""One tenant's whole life at a service, from an upload to answers, with canaries in all that it says and is told.

Then none of them is in any log, in the metrics, or in what another tenant is told. `test_frame.py` does the same for requests that
fail within, `test_service_logs.py` for a single line.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from service_process import ADMIN_KEY, Running, ended, running, wait_until
from webhook_receiver import Receiver, status

BASES = [pytest.param("toy", id="toy"), pytest.param("kivnun/tiny-phi", id="model", marks=pytest.mark.slow)]
TENANT = "tenant-of-the-canaries"


@dataclass
class Aviary:
    """Texts that nobody else may ever see, each of its own letters."""

    released: dict[str, str] = field(default_factory=dict[str, str])

    def __call__(self, where: str) -> str:
        """Return a canary for a place; its letters are those that any name may have."""
        return self.released.setdefault(where, f"canary-{secrets.token_hex(8)}")

    def add(self, where: str, secret: str) -> None:
        """Watch a text that was made elsewhere."""
        assert len(secret) > 12, f"{where} is too short to be looked for"
        self.released[where] = secret

    def seen_in(self, text: str) -> list[str]:
        """Return the places whose canaries a text holds, in letters of either case or in JSON's spelling of others."""
        lowered = text.lower()
        return [
            where for where, bird in self.released.items() if bird.lower() in lowered or json.dumps(bird)[1:-1].lower() in lowered
        ]


@dataclass
class Life:
    """A service in which a tenant has lived, and the ids of what it has made."""

    service: Running
    aviary: Aviary
    base: str
    ids: dict[str, str]
    other: str  # another tenant's key


def new_tenant(operator: httpx.Client, name: str, key_name: str) -> str:
    """Make a tenant; return a key of it with every scope."""
    assert operator.post("/v1/x_tenants", json={"id": name}).status_code == 200
    made = operator.post("/v1/x_keys", json={"name": key_name, "scopes": ["admin"], "tenant": name})
    return made.raise_for_status().json()["key"]


def example_file(folder: Path, aviary: Aviary) -> Path:
    """Write a training file: plain rows, and some with a function and a call of it."""
    call = {"name": aviary("name of a called function"), "arguments": json.dumps({"x": aviary("argument")})}
    calling = {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": call}]}
    tool = {"type": "function", "function": {"name": call["name"], "description": aviary("description"), "parameters": {}}}
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"{aviary('example')} {at}"}, {"role": "assistant", "content": aviary("reply")}]}
        for at in range(10)
    ]
    rows += [{"messages": [{"role": "user", "content": aviary("example of a call")}, calling], "tools": [tool]} for _ in range(2)]
    path = folder / f"{aviary('file name')}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def broken_file(folder: Path, aviary: Aviary) -> Path:
    bird = aviary("row that is wrong")
    lines = [json.dumps({"messages": [{"role": bird, "content": bird}]}), json.dumps({bird: bird}), '{"messages": ' + bird]
    path = folder / f"{aviary('name of a wrong file')}.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def trained(client: OpenAI, folder: Path, aviary: Aviary, base: str, ids: dict[str, str]) -> str:
    """Upload, train and wait; return the tuned model."""
    ids["file_id"] = client.files.create(file=example_file(folder, aviary), purpose="fine-tune").id
    wrong = client.files.create(file=broken_file(folder, aviary), purpose="fine-tune")
    assert client.files.retrieve(wrong.id).status == "error"
    numbers = {"n_epochs": 1, "batch_size": 4}
    job = client.fine_tuning.jobs.create(
        model=base, training_file=ids["file_id"], seed=7, suffix=aviary("suffix"), metadata={"a": aviary("metadata")},
        method={"type": "supervised", "supervised": {"hyperparameters": numbers}},  # type: ignore[arg-type, typeddict-item]
    )  # fmt: skip
    ids["job_id"] = job.id
    done = ended(client, job.id)
    assert done.status == "succeeded", done.error
    assert done.fine_tuned_model
    assert aviary("suffix") in done.fine_tuned_model
    return done.fine_tuned_model


def asked(client: OpenAI, model: str, aviary: Aviary) -> Iterator[str]:
    """Ask in every way; yield each answer."""
    messages: Any = [{"role": "system", "content": aviary("system prompt")}, {"role": "user", "content": aviary("prompt")}]
    function = {"name": aviary("function"), "description": aviary("what it does"), "parameters": {"type": "object"}}
    more: dict[str, Any] = {"max_tokens": 40, "stop": [aviary("stop")], "user": aviary("user"), "temperature": 1}
    ways: list[dict[str, Any]] = [{}, {"tools": [{"type": "function", "function": function}]}]
    for tools in ways:
        answer = client.chat.completions.create(model=model, messages=messages, **more, **tools)
        yield answer.choices[0].message.content or ""
        stream: Any = client.chat.completions.create(model=model, messages=messages, stream=True, **more, **tools)
        yield "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    yield (
        client.completions.create(model=model, prompt=aviary("prompt of a completion"), max_tokens=40, temperature=1)
        .choices[0]
        .text
    )


def refused(client: OpenAI, model: str, url: str, aviary: Aviary) -> None:
    """Ask for what cannot be had, in ways that are refused at every depth."""
    bird = aviary("what is refused")
    message: Any = [{"role": "user", "content": bird}]
    schema = {"type": "json_schema", "json_schema": {"name": bird, "schema": {"type": bird}}}
    ways: list[Callable[[], Any]] = [
        lambda: client.chat.completions.create(model=model, messages=message, extra_body={bird: bird}),
        lambda: client.chat.completions.create(model=model, messages=message, response_format=schema),  # type: ignore[arg-type]
        lambda: client.chat.completions.create(model=model, messages=[{"role": bird, "content": bird}]),  # type: ignore[list-item]
        lambda: client.chat.completions.create(model=bird, messages=message),
        lambda: client.chat.completions.create(model=model, messages=[{"role": "user", "content": bird * 3_000}]),
        lambda: client.completions.create(model=model, prompt=[bird, 5]),  # type: ignore[list-item]
        lambda: client.fine_tuning.jobs.create(model=bird, training_file=bird),
        lambda: client.files.retrieve(bird),
        lambda: client.files.create(file=(bird, b"{}\n"), purpose=bird),  # type: ignore[arg-type]
    ]
    for way in ways:
        with pytest.raises((openai.BadRequestError, openai.NotFoundError, openai.UnprocessableEntityError)):
            way()
    headers = {"authorization": f"Bearer {client.api_key}", "content-type": "application/json"}
    assert httpx.post(f"{url}/v1/chat/completions", content=f'{{"{bird}": {bird}', headers=headers).status_code == 400
    assert httpx.get(f"{url}/v1/{bird}?{bird}={bird}", headers=headers).status_code == 404
    wrong = f"sk-{aviary('wrong key')}"
    assert httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {wrong}"}).status_code == 401


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    made = Receiver(script=[status(500)])  # its first try fails, so that this is told as well
    end = made.start()
    yield made
    end()


@pytest.fixture(scope="module", params=BASES)
def life(request: pytest.FixtureRequest, receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    """A tenant's whole life; the service goes on."""
    base: str = request.param
    folder, aviary, ids = tmp_path_factory.mktemp("life"), Aviary(), dict[str, str]()
    entry = "{trainer: toy, resident: true}" if base == "toy" else "{resident: true}"
    config = f"version: 1\nbases: {{{base}: {entry}}}\nwebhook_hosts: ['{receiver.host}']\n"
    with running(folder, config) as service, httpx.Client(base_url=service.url, timeout=60) as operator:
        operator.headers["authorization"] = f"Bearer {ADMIN_KEY}"
        key = new_tenant(operator, TENANT, aviary("name of a key"))
        aviary.add("key", key)
        aviary.add("the operator's key", ADMIN_KEY)
        got = len(receiver.got)
        with OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=8) as client:
            hook: Any = client.post(
                "/webhook_endpoints",
                cast_to=object,
                body={
                    "name": aviary("name of a webhook"),
                    "url": f"{receiver.url}/{aviary('path of a webhook')}",
                    "event_types": ["fine_tuning.job.succeeded"],
                },
            )
            ids["endpoint_id"] = hook["id"]
            aviary.add("webhook secret", hook["signing_secret"].removeprefix("whsec_"))
            model = trained(client, folder, aviary, base, ids)
            for number, answer in enumerate(asked(client, model, aviary)):
                if len(answer.strip()) > 12:  # a model that writes less than that writes what anybody may
                    aviary.add(f"answer {number}", answer.strip())
            refused(client, model, service.url, aviary)
            wait_until(lambda: len(receiver.got) > got, "the webhook is not sent")
        yield Life(service, aviary, base, ids, new_tenant(operator, "another", "k"))


def told_to_another(life: Life) -> dict[str, str]:
    """Return what another tenant is told that asks for everything, its own and the first one's."""
    ids = life.ids
    foreign = [
        f"files/{ids['file_id']}", f"files/{ids['file_id']}/content", f"fine_tuning/jobs/{ids['job_id']}",
        f"fine_tuning/jobs/{ids['job_id']}/events", f"fine_tuning/jobs/{ids['job_id']}/checkpoints",
        f"webhook_endpoints/{ids['endpoint_id']}",
    ]  # fmt: skip
    own = ["files", "fine_tuning/jobs", "models", "x_keys", "webhook_endpoints", "x_usage", "batches"]
    told: dict[str, str] = {}
    with httpx.Client(base_url=f"{life.service.url}/v1", headers={"authorization": f"Bearer {life.other}"}, timeout=60) as other:
        for status_code, paths in ((404, foreign), (200, own)):
            for path in paths:
                answer = other.get(f"/{path}")
                assert answer.status_code == status_code, path
                told[path] = f"{answer.text} {answer.headers}"
        told["a job on a foreign file"] = other.post(
            "/fine_tuning/jobs", json={"model": life.base, "training_file": ids["file_id"]}
        ).text
    return told


def test_nothing_that_a_tenant_says_or_is_told_is_in_a_log_or_a_metric_or_before_another_tenant(life: Life) -> None:
    service, aviary = life.service, life.aviary
    assert len(aviary.released) > 22
    listed = httpx.get(f"{service.url}/v1/files", headers={"authorization": f"Bearer {aviary('key')}"})
    assert "file name" in aviary.seen_in(listed.text), "its own canaries are seen by it"
    told = told_to_another(life)
    metrics = httpx.get(f"{service.url}/metrics", headers={"authorization": f"Bearer {ADMIN_KEY}"})
    assert "kivnun_requests_total" in metrics.text
    told["metrics"] = metrics.text
    assert service.stop() == 0
    logs = [service.log, *service.data.rglob("*.log")]
    told |= {str(path): path.read_text(encoding="utf-8", errors="replace") for path in logs}
    assert '"action": "request"' in told[str(service.log)]
    assert {where: seen for where, text in told.items() if (seen := aviary.seen_in(text))} == {}
