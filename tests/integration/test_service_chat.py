"""Chats and completions of the hosted service, by OpenAI's own client in both dialects, on the toy base."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import sqlalchemy as sa
from huggingface_hub import constants

from answer_parts import add_model, place_with, registered, until, worker, worker_process
from hub import Hub
from kivnun.jobs import answerers, wanted
from kivnun.jobs.answerers import TERM_S, Answerer
from kivnun.jobs.config import Limits
from kivnun.jobs.deployments import put, remove
from kivnun.jobs.place import Place
from kivnun.jobs.schema import deployments, usage
from kivnun.jobs.usage import Charge
from kivnun.model.families import BUILT_IN
from kivnun.serve.toy import ToyTokens, toy_answer
from kivnun.service.answering import Answering
from kivnun.service.answers import CONNECT_S, Links
from service_parts import KEY, OTHER_KEY, api, service_at

CONFIG = """
version: 1
bases: {toy: {trainer: toy}, slow: {trainer: toy}, nobody: {trainer: toy}, acme/tiny: {}, acme/gone: {}}
aliases: {gpt-4o-mini: toy}
"""
ASKED: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
PROMPT = ToyTokens().prompt_ids(ASKED)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    made = place_with(tmp_path_factory.mktemp("chat"), CONFIG)
    for name in ("one", "two"):
        folder = made.data / "made" / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(name)
        add_model(made, "toy", f"ft:toy:kivnun:{name}:abcdefgh", folder)
    return made


@pytest.fixture(scope="module")
def url(place: Place) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patched, worker(place, "toy"), api(service_at(place, place.service_config())) as address:
        patched.setattr("kivnun.service.answering.PATIENCE_S", 0.3)
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture
def azure(url: str) -> Iterator[openai.AzureOpenAI]:
    with openai.AzureOpenAI(azure_endpoint=url, api_key=KEY, api_version="2024-10-21", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, model: str = "toy", **more: Any) -> Any:
    return client.chat.completions.create(model=model, messages=ASKED, **{"temperature": 0, **more})  # type: ignore[call-overload]


def hash_of(place: Place, name: str) -> str:
    from kivnun.artifacts import hash_folder

    return hash_folder(place.data / "made" / name)


def test_a_base_answers_and_says_what_it_used(client: openai.OpenAI) -> None:
    answer = ask(client)
    assert answer.choices[0].message.content == toy_answer(None, PROMPT).decode()
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("chat.completion", "toy", "stop")
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.total_tokens == len(PROMPT) + answer.usage.completion_tokens
    assert answer.system_fingerprint.startswith("kivnun-")
    assert answer.x_adapter_hash is None
    assert ask(client, "gpt-4o-mini").choices == answer.choices


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_tuned_model_answers_with_its_own_adapter(name: str, client: openai.OpenAI, place: Place) -> None:
    answer = ask(client, f"ft:toy:kivnun:{name}:abcdefgh")
    assert answer.x_adapter_hash == hash_of(place, name)
    assert answer.choices[0].message.content == toy_answer(hash_of(place, name), PROMPT).decode()


def test_streamed_pieces_joined_are_the_whole_answer(client: openai.OpenAI, azure: openai.AzureOpenAI) -> None:
    for one in (client, azure):
        chunks = list(ask(one, stream=True, n=2, stream_options={"include_usage": True}))
        whole = ask(one, n=2)
        for index in (0, 1):
            mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
            assert mine[0].delta.role == "assistant"
            assert "".join(choice.delta.content or "" for choice in mine) == whole.choices[index].message.content
            assert mine[-1].finish_reason == "stop"
        assert chunks[-1].usage == whole.usage
        assert len({chunk.id for chunk in chunks}) == 1


def test_the_asynchronous_clients_get_the_same(url: str, client: openai.OpenAI) -> None:
    async def both() -> list[Any]:
        answers: list[Any] = []
        async with (
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as plain,
            openai.AsyncAzureOpenAI(azure_endpoint=url, api_key=KEY, api_version="2024-10-21") as theirs,
        ):
            for one in (plain, theirs):
                answers.append(await one.chat.completions.create(model="toy", messages=ASKED, temperature=0))  # type: ignore[arg-type]
                stream = await one.chat.completions.create(model="toy", messages=ASKED, temperature=0, stream=True)  # type: ignore[arg-type]
                text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
                assert text == answers[0].choices[0].message.content
        return answers

    assert [answer.choices for answer in asyncio.run(both())] == [ask(client).choices] * 2


def test_azure_answers_by_deployment_and_the_path_wins(place: Place, url: str, azure: openai.AzureOpenAI) -> None:
    db = place.database()
    values = {"tenant": "default", "name": "mine", "created_at": 1.0, "updated_at": 1.0, "body": {}}
    db.write("deployment", lambda tx: tx.execute(sa.insert(deployments).values(**values, model="ft:toy:kivnun:one:abcdefgh")))
    db.close()
    assert ask(azure, "mine").x_adapter_hash == hash_of(place, "one")
    assert ask(azure, "ft:toy:kivnun:two:abcdefgh").x_adapter_hash == hash_of(place, "two")
    with openai.AzureOpenAI(
        azure_endpoint=url, api_key=KEY, api_version="2024-10-21", azure_deployment="mine", max_retries=0
    ) as fixed:
        assert ask(fixed, "ft:toy:kivnun:two:abcdefgh").x_adapter_hash == hash_of(place, "one")
    with pytest.raises(openai.NotFoundError) as caught:
        ask(azure, "missing")
    assert caught.value.code == "DeploymentNotFound"
    with openai.OpenAI(base_url=f"{url}/openai/v1", api_key=KEY, max_retries=0) as newer:
        assert ask(newer).choices


def test_a_deployments_name_is_a_model_at_every_door(place: Place, url: str, client: openai.OpenAI) -> None:
    """Azure looks among deployments first, OpenAI among models: where both have the name `slow`, they differ."""
    db = place.database()
    for name in ("named", "slow"):
        db.write("deployment", lambda tx, name=name: put(tx, "default", name, "ft:toy:kivnun:one:abcdefgh", {}, 1.0))
    one = hash_of(place, "one")
    with openai.OpenAI(base_url=f"{url}/openai/v1", api_key=KEY, max_retries=0) as newer:
        assert [ask(newer, name).x_adapter_hash for name in ("named", "slow")] == [one, one]
        assert ask(newer, "named").model == "named"
        with pytest.raises(openai.NotFoundError):
            ask(newer, "missing")
    assert ask(client, "named").x_adapter_hash == one
    assert {chunk.x_adapter_hash for chunk in ask(client, "named", stream=True)} == {one}
    answering = Answering(service_at(place, place.service_config()))

    def in_a_batch(name: str, endpoint: str) -> Any:
        body = {"model": name, "messages": ASKED, "temperature": 0}
        return asyncio.run(answering.complete("default", None, endpoint, body))[0]["x_adapter_hash"]

    assert [in_a_batch("named", "/v1/chat/completions"), in_a_batch("slow", "/chat/completions")] == [one, one]
    with worker(place, "slow"):
        assert [ask(client, "slow").x_adapter_hash, in_a_batch("slow", "/v1/chat/completions")] == [None, None]
    with pytest.raises(openai.NotFoundError), openai.OpenAI(base_url=f"{url}/v1", api_key=OTHER_KEY, max_retries=0) as other:
        ask(other, "named")
    db.write("deployments", lambda tx: [remove(tx, "default", name) for name in ("named", "slow")])
    db.close()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Return a hub that holds a base, and is the one that the API asks."""
    with Hub() as hub:
        hub.put("acme/tiny", BUILT_IN["kivnun/tiny-phi"])
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


def test_a_base_that_is_fetched_delays_no_other_and_its_weights_are_left_to_workers(
    hub: Hub, place: Place, client: openai.OpenAI
) -> None:
    hub.stall_at["tokenizer.json"] = 100
    db = place.database()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, client, "acme/tiny")
        assert hub.stalled.wait(20)
        assert db.read(wanted.asks)["acme/tiny"] >= 1  # a worker may begin to fetch the weights
        assert ask(client).choices
        assert not waiting.done()
        hub.released.set()
        with pytest.raises(openai.InternalServerError, match="no worker answers for acme/tiny"):
            waiting.result()
    db.close()
    assert {"config.json", "tokenizer.json"} <= hub.fetched()
    assert not [name for name in hub.fetched() if name.endswith(".safetensors")]


def test_a_base_whose_tokenizer_cannot_be_had_is_told_so_and_asked_for_again(
    hub: Hub, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.status = 503
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, "acme/gone")
    assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
    hub.status = None
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, "acme/gone")  # the hub has none of this name
    assert (refused.value.code, refused.value.param) == ("model_not_available", "model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, "acme/gone")
    assert refused.value.code == "model_not_available"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.put("acme/gone", BUILT_IN["kivnun/tiny-phi"])
    with pytest.raises(openai.InternalServerError, match="no worker answers"):
        ask(client, "acme/gone")


def test_another_tenants_model_answers_the_same_404_as_none(url: str, client: openai.OpenAI) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=OTHER_KEY, max_retries=0) as other:
        with pytest.raises(openai.NotFoundError) as foreign:
            ask(other, "ft:toy:kivnun:one:abcdefgh")
        with pytest.raises(openai.NotFoundError) as missing:
            ask(other, "ft:toy:kivnun:one:abcdefgi")
    assert (foreign.value.code, foreign.value.param) == ("model_not_found", "model")
    assert foreign.value.message.replace("abcdefgh", "abcdefgi") == missing.value.message


def test_a_seed_repeats_an_answer_and_without_one_answers_differ(client: openai.OpenAI) -> None:
    def text(**more: Any) -> str:
        return ask(client, temperature=1, **more).choices[0].message.content

    assert text(seed=3) == text(seed=3) != text(seed=4)
    assert text() != text()
    several = ask(client, temperature=1, seed=3, n=3).choices
    assert len({choice.message.content for choice in several}) == 3
    assert several[0].message.content == text(seed=3)


def test_limits_and_stop_strings_end_an_answer(client: openai.OpenAI) -> None:
    whole = ask(client).choices[0].message.content
    short = ask(client, max_completion_tokens=7).choices[0]
    assert (short.message.content, short.finish_reason) == (whole[:7], "length")
    stopped = ask(client, stop=[whole[20:23]]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (whole[: whole.index(whole[20:23])], "stop")


def test_log_probabilities_come_in_both_shapes(client: openai.OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=1)
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    assert bytes(byte for entry in content for byte in entry.bytes).decode() == answer.choices[0].message.content
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in content)
    streamed = [chunk.choices[0] for chunk in ask(client, logprobs=True, top_logprobs=1, stream=True)]
    assert [entry for choice in streamed if choice.logprobs for entry in choice.logprobs.content] == content
    legacy = client.completions.create(model="toy", prompt="abc", logprobs=1, echo=True, max_tokens=4, temperature=0).choices[0]
    assert legacy.text == "abc" + toy_answer(None, list(b"abc")).decode()[:4]
    assert legacy.logprobs is not None
    assert legacy.logprobs.tokens == list(legacy.text)
    assert legacy.logprobs.text_offset == list(range(7))


@pytest.mark.parametrize(("asked", "likeliest"), [(0, []), (1, [(66, -0.1)])])
def test_a_legacy_answers_likeliest_tokens_hold_the_sampled_one(
    asked: int, likeliest: list[tuple[int, float]], client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kivnun.serve.toy._scored", lambda token: (token, -3.0, likeliest))
    said = client.completions.create(model="toy", prompt="abc", logprobs=asked, max_tokens=2, temperature=0).choices[0].logprobs
    assert said is not None
    assert said.top_logprobs == [
        {letter: -3.0, **{chr(token): value for token, value in likeliest}} for letter in said.tokens or ()
    ]


def test_completions_take_text_and_tokens_one_or_many(client: openai.OpenAI) -> None:
    def texts(prompt: Any, **more: Any) -> list[str]:
        return [choice.text for choice in client.completions.create(model="toy", prompt=prompt, temperature=0, **more).choices]

    assert texts("ab") == texts([97, 98]) == texts(["ab"]) == texts([[97, 98]])
    assert texts(["ab", "c"]) == texts("ab") + texts("c")
    assert len(texts("ab")[0]) == 16
    assert texts("ab", max_tokens=0, echo=True) == ["ab"]
    best = client.completions.create(model="toy", prompt="ab", n=1, best_of=3, seed=1).choices
    assert len(best) == 1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 3}, "temperature"), ({"top_p": -0.1}, "top_p"), ({"n": 65}, "n"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 100_000}, "max_tokens"), ({"stop": ["a"] * 5}, "stop"), ({"seed": 1.5}, "seed"),
    ({"stream_options": {"include_usage": True}}, "stream_options"), ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"), ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"reasoning_effort": "low"}, "reasoning_effort"), ({"modalities": ["audio"]}, "modalities"),
    ({"extra_body": {"made_up": 1}}, "made_up"), ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tool_choice": "required"}, "tool_choice"), ({"messages": []}, "messages"), ({"model": ""}, "model"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "param"), REFUSED, ids=[f"{param}-{number}" for number, (_, param) in enumerate(REFUSED)])
def test_what_cannot_be_done_is_refused_by_its_name(given: dict[str, Any], param: str, client: openai.OpenAI) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        client.chat.completions.create(**{"model": "toy", "messages": ASKED, **given})
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")


def test_a_conversation_that_ends_with_the_assistant_goes_on_with_a_new_message(
    client: openai.OpenAI, azure: openai.AzureOpenAI
) -> None:
    said: list[dict[str, Any]] = [*ASKED, {"role": "assistant", "content": "a"}]
    for one in (client, azure):
        for messages in (said, [*said, {"role": "assistant", "content": "b"}], said[1:]):
            answer = one.chat.completions.create(model="toy", messages=messages, temperature=0)  # type: ignore[arg-type]
            assert answer.choices[0].message.content == toy_answer(None, ToyTokens().prompt_ids(messages)).decode()
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for last, why in (({"content": None, "tool_calls": [call]}, "answer the calls"), ({"content": "a", "weight": 1}, "a weight")):
        with pytest.raises(openai.BadRequestError, match=why) as caught:
            client.chat.completions.create(model="toy", messages=[*ASKED, {"role": "assistant", **last}])  # type: ignore[list-item]
        assert caught.value.param == "messages"


def test_values_that_openai_allows_are_taken(client: openai.OpenAI) -> None:
    assert ask(client, top_p=0).choices == ask(client).choices
    unsaid: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
    nulls: dict[str, Any] = {"type": "function", "function": {"name": "f", "description": None, "parameters": None, "strict": None}}
    assert ask(client, tools=[nulls]).choices == ask(client, tools=[unsaid]).choices


def test_parameters_that_change_no_answer_are_taken(client: openai.OpenAI) -> None:
    more: dict[str, Any] = {
        "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "prompt_cache_key": "k",
        "safety_identifier": "s", "response_format": {"type": "text"}, "frequency_penalty": 0, "tools": [],
    }  # fmt: skip
    assert ask(client, **more).choices == ask(client).choices


JSON = "application/json"
BODIES: list[tuple[bytes, str, int]] = [
    (b"", JSON, 400), (b"{", JSON, 400), (b"[1]", JSON, 400), (b"\xff", JSON, 400),
    (b'{"model": "toy", "model": "toy"}', JSON, 400),
    (b"{}", "text/plain", 415), (b"[" * 100_000, JSON, 400), (b'"' + b"a" * (9 << 20) + b'"', JSON, 413),
]  # fmt: skip


@pytest.mark.parametrize(("body", "kind", "status"), BODIES, ids=[str(number) for number in range(len(BODIES))])
def test_bodies_that_are_no_request_are_refused(body: bytes, kind: str, status: int, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.post("/chat/completions", cast_to=object, content=body, options={"headers": {"content-type": kind}})
    assert caught.value.status_code == status
    assert status != 415 or caught.value.code == "unsupported_media"
    assert ask(client).choices


def test_kept_answers_are_told_not_to_be_there(client: openai.OpenAI, azure: openai.AzureOpenAI) -> None:
    for one in (client, azure):
        for call in (one.chat.completions.list, lambda one=one: one.chat.completions.retrieve("chatcmpl-1")):
            with pytest.raises(openai.BadRequestError, match="answers are not kept") as caught:
                call()
            assert caught.value.code == "unsupported_endpoint"
    assert ask(client).choices


def test_a_base_without_a_worker_says_come_back(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, "nobody")
    assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
    assert caught.value.response.headers["retry-after-ms"]


def test_a_worker_killed_in_the_middle_is_told_and_the_next_one_answers(place: Place, client: openai.OpenAI) -> None:
    with worker_process(place, "slow", token_s=0.05) as process:
        stream = ask(client, "slow", stream=True)
        heard = [next(stream), next(stream)]
        process.kill()
        with pytest.raises(openai.APIError, match="the worker that wrote the answer is gone"):
            heard += list(stream)
        assert len(heard) < 40
    with pytest.raises(openai.InternalServerError):
        ask(client, "slow")
    old = registered(place, "slow")
    with worker(place, "slow"):
        assert ask(client, "slow").choices[0].finish_reason == "stop"
        assert not set(old) & set(registered(place, "slow"))  # the dead one's row is cleared


def test_a_stream_that_breaks_in_the_middle_is_told_as_an_event(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr("kivnun.serve.reply.Stream.piece", broken)
    with pytest.raises(openai.APIError, match="the answer failed") as caught:
        list(ask(client, stream=True))
    assert (caught.value.code, caught.value.type) == ("internal_error", "server_error")
    (said,) = [record for record in caplog.records if record.exc_info and record.exc_info[0] is ZeroDivisionError]
    assert getattr(said, "request", "").startswith("req_")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place_at_the_worker(
    stream: bool, place: Place, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kivnun.serve import toy

    made: list[toy.ToyAnswerer] = []
    begin = toy.ToyAnswerer.__init__

    def remember(self: toy.ToyAnswerer, *args: Any) -> None:
        made.append(self)
        begin(self, *args)

    monkeypatch.setattr(toy.ToyAnswerer, "__init__", remember)
    with worker(place, "slow", token_s=0.3), openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        if stream:
            answer = ask(client, "slow", stream=True)
            next(answer)
            until(lambda: made[0].answering == 1)
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                ask(client, "slow", timeout=0.5)
        until(lambda: made[0].answering == 0, 2)  # the whole would take fourteen seconds


def test_what_was_asked_and_answered_is_written_down(place: Place, client: openai.OpenAI) -> None:
    db = place.database()

    def used() -> dict[tuple[str, str], int]:
        rows = db.read(lambda tx: list(tx.execute(sa.select(usage.c.kind, usage.c.model, usage.c.tokens))))
        return {(row.kind, row.model): row.tokens for row in rows}

    before, model = used(), "ft:toy:kivnun:two:abcdefgh"
    whole = ask(client, model).usage
    list(ask(client, model, stream=True))
    with pytest.raises(openai.BadRequestError):
        ask(client, model, n=0)
    after = used()
    db.close()
    assert after["prompt", model] - before.get(("prompt", model), 0) == 2 * whole.prompt_tokens
    assert after["completion", model] - before.get(("completion", model), 0) == 2 * whole.completion_tokens


def test_an_answer_for_a_batch_tells_what_it_used_and_writes_nothing_down(place: Place, url: str) -> None:
    service = service_at(place, place.service_config())
    body = {"model": "toy", "messages": ASKED, "max_tokens": 5}

    def rows() -> list[Any]:
        return service.db.read(lambda tx: list(tx.execute(sa.select(usage.c.id, usage.c.tokens).order_by(usage.c.id))))

    before = rows()
    answer, used = asyncio.run(Answering(service).complete("default", "key_b", "/v1/chat/completions", body))
    assert rows() == before
    asked, written = answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]
    assert used == Charge("default", "toy", "toy", "key_b", (("prompt", asked, 0.0), ("completion", written, 0.0)))
    service.db.close()


def test_a_tenant_that_has_used_up_its_minute_is_told_so(place: Place, url: str) -> None:
    service = service_at(
        place, place.service_config().model_copy(update={"limits": Limits(tokens_per_minute=400, answers_at_once=1)})
    )
    with api(service) as address, openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        for _ in range(3):
            ask(client, max_tokens=100)  # what was charged and not used is given back
        with pytest.raises(openai.RateLimitError) as caught:
            ask(client, max_tokens=390)
        assert caught.value.code == "rate_limit_exceeded"
        assert ask(client, max_tokens=20).choices


def test_many_tenants_and_models_at_once_get_their_own_answers(place: Place, client: openai.OpenAI) -> None:
    def one(number: int) -> None:
        name = ("one", "two")[number % 2]
        answer = ask(client, f"ft:toy:kivnun:{name}:abcdefgh", temperature=1, seed=number)
        expected = toy_answer(hash_of(place, name), PROMPT, (number, 0)).decode()
        assert answer.choices[0].message.content == expected

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(40)))
    assert threading.active_count() < 100


# --- workers that come and go ---------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Return a place whose workers beat fast."""
    monkeypatch.setattr("kivnun.jobs.answerers.BEAT_S", 0.05)
    return place_with(tmp_path / "elsewhere", CONFIG)


def row(name: str, where: str, machine: str = "another", beat: int = 1) -> Answerer:
    return Answerer(name, "toy", where, machine, 1.0, "secret", beat)


def write_rows(place: Place, *rows: Answerer) -> None:
    db = place.database()
    for each in rows:
        db.write("row", lambda tx, each=each: answerers.show(tx, each, each.beat))
    db.close()


def test_a_worker_that_starts_removes_the_dead_of_its_own_machine_alone(elsewhere: Place) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{unused.getsockname()[1]}"
    here = answerers.this_machine()
    write_rows(elsewhere, row("a", "unix:/srv/other/a.sock"), row("b", closed), row("c", "10.0.0.9:7000"), row("d", closed, here))
    with worker(elsewhere, "toy"):
        assert {"a", "b", "c"} <= set(registered(elsewhere, "toy"))
        assert "d" not in registered(elsewhere, "toy")


def test_a_worker_shows_that_it_lives_and_removes_those_that_stand_still(elsewhere: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kivnun.jobs.answerers.SWEPT_S", 0.5)
    write_rows(elsewhere, row("lost", "10.0.0.9:7000"))
    db = elsewhere.database()

    def beat() -> int | None:
        return next((each.beat for each in db.read(answerers.page) if each.id != "lost"), None)

    with worker(elsewhere, "toy"):
        assert "lost" in registered(elsewhere, "toy"), "nothing is told from one look"
        until(lambda: "lost" not in registered(elsewhere, "toy"))
        own = registered(elsewhere, "toy")
        db.write("lost by mistake", lambda tx: answerers.forget(tx, own[0]))
        until(lambda: registered(elsewhere, "toy") == own)
        before = beat()
        assert before is not None
        until(lambda: (beat() or 0) > before)
    assert registered(elsewhere, "toy") == []
    db.close()


def test_a_worker_whose_beat_stands_still_is_not_asked_and_one_that_fails_is_let_alone_and_keeps_nobody_waiting(
    elsewhere: Place,
) -> None:
    now, tried = [0.0], list[str]()

    async def fails(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tried.append("fails")
        writer.close()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tried.append("silent")
        try:
            await reader.read()
        finally:
            writer.close()

    async def look(living: Answerer) -> None:
        links = Links(lambda: now[0])
        servers = [await asyncio.start_server(each, "127.0.0.1", 0) for each in (fails, silent)]
        here = answerers.this_machine()
        failing, hanging = (
            row(name, f"127.0.0.1:{server.sockets[0].getsockname()[1]}", here)
            for name, server in zip(("fails", "silent"), servers, strict=True)
        )
        assert await links.best("toy", [failing]) is None
        assert await links.best("toy", [failing]) is None
        assert tried == ["fails"], "it is let alone for a while"
        now[0] += 1.0
        assert await links.best("toy", [failing, replace(failing, id="b", machine="another")]) is None
        assert tried == ["fails", "fails"], "and what is another machine's own is never tried"
        async with asyncio.timeout(CONNECT_S / 2):
            link = await links.best("toy", [hanging, living])
        assert link is not None
        assert tried[2:] == ["silent"]
        now[0] += TERM_S
        assert await links.best("toy", [living]) is None, "its beat has stood still for a term"
        assert await links.best("toy", [replace(living, beat=living.beat + 1)]) is link
        link.close()
        for server in servers:
            server.close()

    with worker(elsewhere, "toy"):
        db = elsewhere.database()
        (living,) = db.read(answerers.page)
        db.close()
        asyncio.run(look(living))
