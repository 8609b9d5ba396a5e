"""Models and deployments through the clients that scripts have: OpenAI's, Azure's, and their asynchronous ones."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncAzureOpenAI, AsyncOpenAI, AzureOpenAI, OpenAI

from kivnun.jobs import models, tuning
from kivnun.jobs.config import ServiceConfig
from kivnun.jobs.ids import new_id
from kivnun.service.context import Service
from service_parts import KEY, OTHER_KEY, place, service_at

CONFIG = ServiceConfig.model_validate(
    {"bases": {"microsoft/phi-4": {}, "toy": {"trainer": "toy"}}, "aliases": {"gpt-4o-mini": "toy"}, "limits": {"files": 5}}
)
DEPLOYMENTS = "/subscriptions/s/resourceGroups/g/providers/Microsoft.CognitiveServices/accounts/a/deployments"
VERSION = {"api-version": "2024-10-01"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder: Path = tmp_path_factory.mktemp("service")
    made = service_at(place(folder), CONFIG)
    for tenant in ("default", "other"):
        job = tuning.Job(id=f"ftjob-{tenant}", tenant=tenant, created_at=1.0, model="toy", base="toy", training_file="f", method={},
                         seed=1)  # fmt: skip
        made.db.write("job", lambda tx, job=job: tuning.create(tx, job, new_id))
    return made


def _tuned(service: Service, name: str, tenant: str = "default", at: float = 5.0) -> str:
    model = models.Model(
        f"ft:microsoft/phi-4:kivnun:{name}:abcdefgh", tenant, at, f"ftjob-{tenant}", "microsoft/phi-4", 3, "m", "h"
    )
    service.db.write("model", lambda tx: models.add(tx, model))
    return model.id


def _clients(url: str) -> dict[str, OpenAI]:
    return {
        "openai": OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0),
        "azure": AzureOpenAI(azure_endpoint=url, api_version="2025-04-01-preview", api_key=KEY, max_retries=0),
        "azure v1": OpenAI(base_url=f"{url}/openai/v1/", api_key=KEY, max_retries=0),
    }


def _control(url: str, key: str = KEY) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, params=VERSION)


@pytest.mark.parametrize("dialect", ["openai", "azure", "azure v1"])
def test_a_client_lists_retrieves_and_deletes_models(service: Service, url: str, dialect: str) -> None:
    client = _clients(url)[dialect]
    tuned, foreign = _tuned(service, dialect.replace(" ", "-")), _tuned(service, f"other-{dialect[-2:]}", "other")
    listed = [model.id for model in client.models.list()]
    assert {"toy", "microsoft/phi-4", tuned} <= set(listed)
    assert foreign not in listed
    assert client.models.retrieve(tuned).owned_by == "default"
    assert client.models.retrieve("microsoft/phi-4").id == "microsoft/phi-4"
    assert "gpt-4o-mini" in listed
    alias = client.models.retrieve("gpt-4o-mini")
    assert (alias.id, alias.to_dict()["x_base"]) == ("gpt-4o-mini", "toy"), "an alias is another name of a base"
    deleted = client.models.delete(tuned)
    assert (deleted.id, deleted.deleted, deleted.object) == (tuned, True, "model")
    for gone in (tuned, foreign, "ft:toy:kivnun::nothing0"):
        with pytest.raises(openai.NotFoundError) as refused:
            client.models.retrieve(gone)
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.NotFoundError):
            client.models.delete(gone)
    assert tuned not in [model.id for model in client.models.list()]


def test_the_asynchronous_clients_do_the_same(service: Service, url: str) -> None:
    async def walk(client: AsyncOpenAI, tuned: str) -> list[str]:
        async with client:
            assert (await client.models.retrieve(tuned)).id == tuned
            await client.models.delete(tuned)
            return [model.id async for model in client.models.list()]

    for n, client in enumerate((
        AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY),
        AsyncAzureOpenAI(azure_endpoint=url, api_version="2024-10-21", api_key=KEY),
    )):  # fmt: skip
        tuned = _tuned(service, f"async-{n}")
        assert tuned not in asyncio.run(walk(client, tuned))


def test_azure_s_dialect_adds_what_its_clients_read(service: Service, url: str) -> None:
    tuned = _tuned(service, "shape")
    with httpx.Client(base_url=url, headers={"api-key": KEY}) as client:
        azure = client.get(f"/openai/models/{tuned.replace('/', '%2F')}", params=VERSION).json()
        plain = client.get(f"/v1/models/{tuned.replace('/', '%2F')}").json()
    assert azure["capabilities"] == {
        "fine_tune": True, "inference": True, "completion": True, "chat_completion": True, "embeddings": False
    }  # fmt: skip
    assert (azure["status"], azure["model"], azure["fine_tune"]) == ("succeeded", "microsoft/phi-4", "ftjob-default")
    assert azure["deprecation"] == {"fine_tune": None, "inference": None}
    assert plain == {
        "id": tuned, "object": "model", "created": 5, "owned_by": "default", "x_base": "microsoft/phi-4", "x_job": "ftjob-default",
        "x_step": 3, "x_adapter_hash": "h",
    }  # fmt: skip


def test_a_refused_base_answers_with_its_reason(url: str) -> None:
    with pytest.raises(openai.NotFoundError, match="block-sparse attention"):
        _clients(url)["openai"].models.retrieve("microsoft/Phi-3-small-8k-instruct")


def test_a_base_and_a_model_in_use_are_not_deleted(service: Service, url: str) -> None:
    client, tuned = _clients(url)["openai"], _tuned(service, "used")
    with pytest.raises(openai.BadRequestError) as refused:
        client.models.delete("toy")
    assert refused.value.code == "not_a_tuned_model"
    with _control(url) as control:
        control.put(f"{DEPLOYMENTS}/used", json=_body(tuned)).raise_for_status()
        with pytest.raises(openai.BadRequestError, match="used") as refused:
            client.models.delete(tuned)
        assert refused.value.code == "model_in_use"
        assert control.delete(f"{DEPLOYMENTS}/used").status_code == 200
    job = tuning.Job(id="ftjob-on", tenant="default", created_at=1.0, model=tuned, base="toy", training_file="f", method={}, seed=1)
    service.db.write("job", lambda tx: tuning.create(tx, job, new_id))
    with pytest.raises(openai.BadRequestError, match="ftjob-on"):
        client.models.delete(tuned)
    service.db.write("end", lambda tx: tuning.move(tx, job, "cancelled", 2.0, new_id))
    assert client.models.delete(tuned).deleted


def _body(model: str) -> dict[str, Any]:
    return {
        "sku": {"name": "Standard", "capacity": 2},
        "properties": {"model": {"format": "OpenAI", "name": model, "version": "1"}},
    }


def test_a_deployment_is_made_read_changed_and_removed_as_azure_s_recipes_do(service: Service, url: str) -> None:
    tuned = _tuned(service, "deployed")
    with _control(url) as client, _control(url, OTHER_KEY) as stranger:
        made = client.put(f"{DEPLOYMENTS}/mine", json=_body(tuned))
        assert made.status_code == 201
        told = made.json()
        assert told["id"] == f"{DEPLOYMENTS}/mine"
        assert (told["name"], told["type"]) == ("mine", "Microsoft.CognitiveServices/accounts/deployments")
        assert told["properties"]["provisioningState"] == "Succeeded"
        assert told["properties"]["model"] == {"format": "OpenAI", "name": tuned, "version": "1"}
        assert told["sku"] == {"name": "Standard", "capacity": 2}
        assert client.put(f"{DEPLOYMENTS}/mine", json=_body("gpt-4o-mini")).status_code == 200
        assert client.get(f"{DEPLOYMENTS}/mine").json()["properties"]["model"]["name"] == "gpt-4o-mini"
        assert [row["name"] for row in client.get(DEPLOYMENTS).json()["value"]] == ["mine"]
        short = client.get("/openai/deployments").json()["data"]
        assert [(row["id"], row["model"], row["object"]) for row in short] == [("mine", "toy", "deployment")]
        assert stranger.get(f"{DEPLOYMENTS}/mine").json()["error"]["code"] == "DeploymentNotFound"
        assert stranger.get(DEPLOYMENTS).json() == {"value": []}
        assert stranger.delete(f"{DEPLOYMENTS}/mine").status_code == 204
        assert client.delete(f"{DEPLOYMENTS}/mine").status_code == 200
        assert client.delete(f"{DEPLOYMENTS}/mine").status_code == 204
        assert client.get(f"{DEPLOYMENTS}/mine").status_code == 404


@pytest.mark.parametrize(
    ("name", "body", "param"),
    [
        ("mine", _body("nothing"), "properties.model.name"),
        ("mine", _body("microsoft/Phi-3-small-8k-instruct"), "properties.model.name"),
        ("mine", {"properties": {"model": {"format": "OpenAI"}}}, "properties.model.name"),
        ("-mine", _body("toy"), "name"),
        ("m" * 65, _body("toy"), "name"),
        ("mine", {**_body("toy"), "tags": {"t": "x" * 70_000}}, None),
        ("mine", {**_body("toy"), "tags": {"t": "\ud800"}}, None),
        ("mine", _body("a\0b"), "properties.model.name"),
        ("mine", _body("\ud800"), "properties.model.name"),
    ],
)
def test_a_wrong_deployment_is_refused_by_name_of_what_is_wrong(
    url: str, name: str, body: dict[str, Any], param: str | None
) -> None:
    with _control(url) as client:
        content, kind = json.dumps(body), {"content-type": "application/json"}  # every letter that is not ASCII as \\uXXXX
        answer = client.put(f"{DEPLOYMENTS}/{name}", content=content, headers=kind)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_foreign_model_cannot_be_deployed(service: Service, url: str) -> None:
    foreign = _tuned(service, "deploy-foreign", "other")
    with _control(url) as client:
        answer, unknown = client.put(f"{DEPLOYMENTS}/d", json=_body(foreign)), client.put(f"{DEPLOYMENTS}/d", json=_body("ft:x"))
    assert answer.status_code == unknown.status_code == 400
    assert answer.json()["error"]["message"].replace(foreign, "ft:x") == unknown.json()["error"]["message"]


def test_a_deletion_sent_again_is_answered_as_before_and_to_its_own_tenant_alone(service: Service, url: str) -> None:
    client, stranger = _clients(url)["openai"], OpenAI(base_url=f"{url}/v1", api_key=OTHER_KEY, max_retries=0)
    again = {"x-stainless-retry-count": "1"}
    tuned, file = _tuned(service, "lost"), client.files.create(file=("a.txt", b"a"), purpose="user_data").id
    for name, of in ((tuned, lambda made: made.models), (file, lambda made: made.files)):
        first = of(client).delete(name)
        assert of(client).delete(name, extra_headers=again) == first
        for asker, headers in ((client, {}), (stranger, again)):
            with pytest.raises(openai.NotFoundError):
                of(asker).delete(name, extra_headers=headers)
        with pytest.raises(openai.NotFoundError):
            of(client).delete(f"{name}-never", extra_headers=again)
