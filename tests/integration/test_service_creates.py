"""Creating jobs over the wire: what is taken, what is refused and in which words, and the same create sent again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from kivnun.jobs import tuning
from kivnun.jobs.config import ServiceConfig
from kivnun.jobs.files import File, add
from kivnun.jobs.models import Model
from kivnun.jobs.models import add as add_model
from kivnun.service.context import Service
from service_jobs import azure_client, conversations, losing_answers, openai_client, refusal, uploaded
from service_parts import KEY, OTHER_KEY, api, place, service_at

CONFIG = ServiceConfig.model_validate(
    {
        "bases": {"toy": {"trainer": "toy", "max_rank": 32}, "org/toy-2": {"trainer": "toy"}},
        "aliases": {"gpt-4o-mini-2024-07-18": "toy"},
        "limits": {"waiting_jobs": 20, "requests_per_minute": 100_000},
    }
)

HTTP: httpx.Client


@pytest.fixture(scope="module", autouse=True)
def _open() -> Iterator[None]:
    """Tests of a module may run in two goes, with another module's between."""
    global HTTP
    with httpx.Client(timeout=60) as HTTP:
        yield


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    return service_at(place(tmp_path_factory.mktemp("service")), CONFIG)


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with api(service) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> OpenAI:
    return openai_client(address)


@pytest.fixture(scope="module")
def training(client: OpenAI) -> str:
    return uploaded(client, conversations(12))


@pytest.fixture(autouse=True)
def _room(service: Service) -> None:
    """Cancel what the test before left."""

    def work(tx: tuning.Transaction) -> None:
        for job in tuning.page(tx, "default", 100)[0]:
            if job.status == "validating_files":
                tuning.command(tx, job, "cancel", 0.0, service.new_id)

    service.db.write("room", work)


def post(address: str, body: Any, path: str = "/v1/fine_tuning/jobs", **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HTTP.post(address + path, content=content, headers={"api-key": KEY, "content-type": "application/json", **headers})


def error_of(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


def test_a_job_is_answered_at_once_with_everything_that_was_asked_for(client: OpenAI, training: str) -> None:
    job = client.fine_tuning.jobs.create(
        model="gpt-4o-mini-2024-07-18",
        training_file=training,
        suffix="My model!",
        seed=7,
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "learning_rate_multiplier": 0.5}}},
        extra_body={"x_lora": {"rank": 4, "targets": "all-linear"}, "trainingType": "Standard"},
    )
    asked = {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5}
    assert job.to_dict() == {
        "object": "fine_tuning.job",
        "id": job.id,
        "created_at": job.created_at,
        "finished_at": None,
        "model": "gpt-4o-mini-2024-07-18",
        "fine_tuned_model": None,
        "organization_id": "org-default",
        "status": "validating_files",
        "hyperparameters": asked,
        "method": {"type": "supervised", "supervised": {"hyperparameters": asked}},
        "training_file": training,
        "validation_file": None,
        "result_files": [],
        "trained_tokens": None,
        "error": None,
        "seed": 7,
        "estimated_finish": None,
        "integrations": [],
        "metadata": {"team": "a"},
        "user_provided_suffix": "My model!",
        "x_lora": {"rank": 4, "targets": "all-linear"},
        "trainingType": "Standard",
    }
    assert abs(job.created_at - time.time()) < 60
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    events = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    assert events == [f"Validating training file: {training}", f"Created fine-tuning job: {job.id}"]


def test_a_seed_is_made_where_none_is_given(client: OpenAI, training: str) -> None:
    seeds = {client.fine_tuning.jobs.create(model="toy", training_file=training).seed for _ in range(3)}
    assert len(seeds) == 3
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_the_deprecated_hyperparameters_still_count(client: OpenAI, training: str) -> None:
    job = client.fine_tuning.jobs.create(model="toy", training_file=training, hyperparameters={"n_epochs": 4})
    assert job.hyperparameters.n_epochs == 4
    assert job.method is not None
    assert job.method.type == "supervised"


def test_a_dpo_job_has_its_beta_in_the_method_and_empty_hyperparameters(client: OpenAI, training: str) -> None:
    job = client.fine_tuning.jobs.create(
        model="toy", training_file=training, method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3}}}
    )
    assert job.method is not None
    assert job.method.dpo is not None
    assert job.method.dpo.hyperparameters is not None
    assert job.method.dpo.hyperparameters.beta == 0.3
    assert job.to_dict()["hyperparameters"] == {}


HYPER = "method.supervised.hyperparameters"


def supervised(**hyper: Any) -> dict[str, Any]:
    return {"method": {"type": "supervised", "supervised": {"hyperparameters": hyper}}}


def dpo(**hyper: Any) -> dict[str, Any]:
    return {"method": {"type": "dpo", "dpo": {"hyperparameters": hyper}}}


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"model": None}, "invalid_value", "model"),
        ({"training_file": ""}, "invalid_value", "training_file"),
        ({"sufix": "a"}, "unknown_parameter", "sufix"),
        ({"x_unknown": 1}, "unknown_parameter", "x_unknown"),
        ({"suffix": ""}, "invalid_value", "suffix"),
        ({"suffix": "a" * 65}, "invalid_value", "suffix"),
        ({"seed": -1}, "invalid_value", "seed"),
        ({"seed": 2**31}, "invalid_value", "seed"),
        ({"seed": True}, "invalid_value", "seed"),
        ({"seed": "1"}, "invalid_value", "seed"),
        ({"metadata": {"k": 1}}, "invalid_value", "metadata.k"),
        ({"metadata": {"k" * 65: "v"}}, "invalid_value", "metadata"),
        ({"metadata": {"k": "v" * 513}}, "invalid_value", "metadata"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "invalid_value", "metadata"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "unsupported_integration", "integrations"),
        ({"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}}, "unsupported_method", "method.type"),
        ({"method": {"type": "sft"}}, "invalid_value", "method.type"),
        ({"method": {}}, "missing_required_parameter", "method.type"),
        ({"method": {"type": "dpo", "supervised": {}}}, "invalid_value", "method.supervised"),
        (supervised(n_epochs=0), "invalid_value", f"{HYPER}.n_epochs"),
        (supervised(n_epochs=51), "invalid_value", f"{HYPER}.n_epochs"),
        (supervised(n_epochs=1.5), "invalid_value", f"{HYPER}.n_epochs"),
        (supervised(n_epochs=True), "invalid_value", f"{HYPER}.n_epochs"),
        (supervised(batch_size=257), "invalid_value", f"{HYPER}.batch_size"),
        (supervised(learning_rate_multiplier=0), "invalid_value", f"{HYPER}.learning_rate_multiplier"),
        (supervised(beta=0.1), "unsupported_hyperparameter", f"{HYPER}.beta"),
        (supervised(n_epoch=1), "unknown_parameter", f"{HYPER}.n_epoch"),
        ({"hyperparameters": {"n_epochs": 1}, **supervised(n_epochs=2)}, "invalid_value", "hyperparameters"),
        ({"hyperparameters": {"n_epochs": 1}, "method": {"type": "dpo"}}, "invalid_value", "hyperparameters"),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 2.1}}}},
            "invalid_value",
            "method.dpo.hyperparameters.beta",
        ),
        ({"x_lora": {"rank": 33}}, "invalid_value", "x_lora.rank"),
        ({"x_lora": {"targets": []}}, "invalid_value", "x_lora.targets"),
        ({"x_over_long": "drop"}, "invalid_value", "x_over_long"),
        ({"x_dry_run": 1}, "invalid_value", "x_dry_run"),
        ({"model": "tot"}, "model_not_found", "model"),
        ({"model": "microsoft/Phi-3-small-8k-instruct"}, "model_not_supported", "model"),
        ({"model": "ft:toy:kivnun::none"}, "model_not_found", "model"),
        ({"training_file": "file-none"}, "invalid_file", "training_file"),
        ({"validation_file": "file-none"}, "invalid_file", "validation_file"),
        ({"suffix": "a\0b"}, "invalid_json", None),
        ({"metadata": {"k": "\ud800"}}, "invalid_json", None),
    ],
)
def test_what_is_wrong_with_a_create_is_said_by_code_and_param(
    address: str, training: str, change: dict[str, Any], code: str, param: str | None
) -> None:
    answer = post(address, {"model": "toy", "training_file": training, **change})
    assert error_of(answer) == (400, code, param)


NO_OBJECTS = [
    b"", b"{", b"[]", b"1", b'{"model": "toy", "model": "toy"}', b'{"seed": NaN}', b"\xff", b"[" * 100_000, b"1" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("body", NO_OBJECTS)
def test_a_body_that_is_no_json_object_is_told_so(address: str, body: bytes) -> None:
    assert error_of(post(address, body)) == (400, "invalid_json", None)


def test_messages_name_what_was_meant_and_what_is_offered(address: str, client: OpenAI, training: str) -> None:
    def said(**change: Any) -> str:
        return str(post(address, {"model": "toy", "training_file": training, **change}).json()["error"]["message"])

    assert said(sufix="a").endswith("did you mean suffix?")
    assert said(model="org/toy-3").endswith("did you mean org/toy-2?")
    assert "supervised and dpo" in said(method={"type": "reinforcement"})
    assert "block-sparse" in said(model="microsoft/Phi-3-small-8k-instruct")
    assert '"auto" or an integer from 1 to 50, got 99' in said(hyperparameters={"n_epochs": 99})


def test_a_file_of_another_tenant_purpose_or_of_broken_lines_is_refused(address: str, client: OpenAI) -> None:
    theirs = uploaded(openai_client(address, OTHER_KEY), conversations(10))
    batch = client.files.create(file=("b.jsonl", b"{}\n"), purpose="user_data").id
    broken = client.files.create(file=("t.jsonl", conversations(10) + b"{broken\n"), purpose="fine-tune").id
    client.files.delete(deleted := uploaded(client, conversations(10)))
    messages: list[str] = []
    for file_id in (theirs, batch, broken, deleted):
        error = refusal(client.fine_tuning.jobs.create, model="toy", training_file=file_id)
        assert (error.status_code, error.code, error.param) == (400, "invalid_file", "training_file")
        messages.append(error.message)
    assert messages[0].replace(theirs, "X") == messages[3].replace(deleted, "X"), "another's and a deleted one are told alike"
    assert "line 11" in messages[2]


def test_azures_suffix_is_shorter_and_of_fewer_characters(address: str, training: str) -> None:
    for suffix, allowed in (("a" * 40, True), ("a" * 41, False), ("a b", False), ("a_B-9", True)):
        body = {"model": "toy", "training_file": training, "suffix": suffix}
        answers = [
            post(address, body, path) for path in ("/openai/fine_tuning/jobs?api-version=2024-10-21", "/openai/v1/fine_tuning/jobs")
        ]
        assert [answer.is_success for answer in answers] == [allowed, allowed]
        assert post(address, body).is_success


def test_a_tuned_model_or_its_checkpoint_is_gone_on_with_by_its_own_tenant_alone(
    service: Service, address: str, client: OpenAI, training: str
) -> None:
    job = client.fine_tuning.jobs.create(model="org/toy-2", training_file=training)
    name = f"ft:org/toy-2:kivnun::{job.id[-8:]}"
    made = Model(name, "default", 1.0, job.id, "org/toy-2", 3, "default/" + "0" * 64, "hash")
    at_2 = replace(made, id=f"{name}:ckpt-step-2", checkpoint="ftckpt_two", step=2)
    gone = replace(made, id=f"{name}x", base="a/base-of-yesterday")
    for model in (made, at_2, gone):
        service.db.write("model", lambda tx, model=model: add_model(tx, model))
    assert client.fine_tuning.jobs.create(model=name, training_file=training).model == name
    assert client.fine_tuning.jobs.create(model=at_2.id, training_file=training).model == at_2.id
    assert client.fine_tuning.jobs.create(model="ftckpt_two", training_file=training).model == at_2.id
    assert refusal(client.fine_tuning.jobs.create, model=gone.id, training_file=training).code == "model_not_supported"
    other = openai_client(address, OTHER_KEY)
    mine = uploaded(other, conversations(10))
    assert refusal(other.fine_tuning.jobs.create, model=name, training_file=mine).code == "model_not_found"
    lora = refusal(client.fine_tuning.jobs.create, model=name, training_file=training, extra_body={"x_lora": {"rank": 4}})
    assert (lora.code, lora.param) == ("invalid_value", "x_lora")


def test_more_jobs_than_may_wait_are_refused_without_a_retry(service: Service, client: OpenAI, training: str) -> None:
    stock = client.with_options(max_retries=2)
    for _ in range(20):
        client.fine_tuning.jobs.create(model="toy", training_file=training)
    error = refusal(stock.fine_tuning.jobs.create, model="toy", training_file=training)
    assert (error.status_code, error.code) == (429, "exceeded_active_job_limit")
    assert error.response.headers["x-should-retry"] == "false"
    assert error.response.request.headers["x-stainless-retry-count"] == "0"


def test_three_posts_of_one_create_whose_answers_are_lost_make_one_job(address: str, training: str) -> None:
    with losing_answers(address, lost=2) as (between, came):
        job = openai_client(between, retries=2).fine_tuning.jobs.create(model="toy", training_file=training, suffix="lost")
    assert came == [("/v1/fine_tuning/jobs", count) for count in ("0", "1", "2")]
    listed = openai_client(address).fine_tuning.jobs.list(limit=100)
    named = [found.id for found in listed if found.to_dict()["user_provided_suffix"] == "lost"]
    assert named == [job.id]


def test_an_idempotency_key_gives_its_job_and_refuses_another_body(address: str, client: OpenAI, training: str) -> None:
    def create(suffix: str, key: str) -> str:
        headers = {"Idempotency-Key": key}
        return client.fine_tuning.jobs.create(model="toy", training_file=training, suffix=suffix, extra_headers=headers).id

    first = create("a", "key-1")
    assert create("a", "key-1") == first
    assert create("a", "key-2") != first
    other = refusal(create, "b", "key-1")
    assert (other.status_code, other.code) == (422, "idempotency_key_reused")
    assert refusal(create, "a", "k" * 256).status_code == 400
    refused = refusal(client.fine_tuning.jobs.create, model="none", training_file=training, extra_headers={"Idempotency-Key": "k3"})
    assert refused.code == "model_not_found"
    assert create("a", "k3") != first, "a create that was refused leaves its key free"


def test_fifty_threads_with_one_key_make_one_job_on_either_database(tmp_path: Path, db_url: str) -> None:
    service = service_at(place(tmp_path, db_url), CONFIG)
    body = {"model": "toy", "training_file": "file-1"}
    file = File("file-1", "default", 1.0, "fine-tune", "t.jsonl", 1, "default/" + "0" * 64, "processed")
    service.db.write("file", lambda tx: add(tx, file))
    with api(service) as address, ThreadPoolExecutor(50) as pool:
        found = list(pool.map(lambda _: post(address, body, **{"idempotency-key": "k"}), range(50)))
    assert {answer.status_code for answer in found} == {200}
    assert len({answer.json()["id"] for answer in found}) == 1
    assert len(service.db.read(lambda tx: tuning.page(tx, "default", 10))[0]) == 1
    service.db.close()


@pytest.mark.parametrize("path", ["/v1", "/openai", "/openai/v1", "/openai/deployments/mine"])
@pytest.mark.parametrize(
    ("method", "what", "offered"),
    [
        ("POST", "fine_tuning/alpha/graders/run", "supervised and dpo"),
        ("POST", "fine_tuning/alpha/graders/validate", "supervised and dpo"),
        ("GET", "fine_tuning/checkpoints/ftckpt_1/permissions", "keys"),
        ("POST", "evals", "validation_file"),
        ("GET", "evals/eval_1/runs/run_1", "validation_file"),
        ("POST", "responses", "/chat/completions"),
        ("POST", "embeddings", "/chat/completions"),
        ("POST", "images/generations", "/chat/completions"),
        ("POST", "audio/speech", "/chat/completions"),
        ("POST", "moderations", "/chat/completions"),
    ],
)
def test_what_is_not_offered_says_what_is(address: str, path: str, method: str, what: str, offered: str) -> None:
    answer = HTTP.request(method, f"{address}{path}/{what}?api-version=2024-10-21", headers={"api-key": KEY})
    assert error_of(answer) == (400, "unsupported_endpoint", None)
    assert offered in answer.json()["error"]["message"]
    assert ("innererror" in answer.json()["error"]) == path.startswith("/openai")


def test_who_shows_no_key_that_is_known_creates_nothing(address: str) -> None:
    assert HTTP.post(f"{address}/v1/fine_tuning/jobs", json={}).status_code == 401
    assert refusal(azure_client(address, "sk-none").fine_tuning.jobs.list).status_code == 401
