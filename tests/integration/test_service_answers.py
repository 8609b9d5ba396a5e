"""Answers of a real base behind the hosted service: tuned models on demand, forms kept, and OpenAI's and LangChain's clients."""

from __future__ import annotations

import json
import math
import shutil
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from safetensors.numpy import load_file, save_file

import tiny
from answer_parts import add_model, place_with, worker
from kivnun.errors import DataError, IntegrityError
from kivnun.jobs.place import Place
from kivnun.model.adapter_folder import load_peft
from kivnun.model.adapters import AdapterShape, LowRankAdapter, new_adapter, resolve_targets
from kivnun.model.generate import SamplingParams, generate
from kivnun.model.load import Base, load_base
from kivnun.serve import resident, scheduler
from kivnun.serve.adapter_files import check_safetensors, load_adapter
from kivnun.serve.adapters import AdapterCache
from kivnun.serve.base_tokens import BaseTokens
from kivnun.serve.protocol import Begun
from service_parts import KEY, api, service_at

ASKED: list[dict[str, Any]] = [{"role": "user", "content": "three 2"}]
NAMES = [f"ft:tiny:kivnun:m{number}:aaaaaaaa" for number in range(3)]
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"$ref": "#/$defs/tags"},
    },
    "required": ["kind", "age", "tags"],
    "additionalProperties": False,
    "$defs": {"tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2}},
}


def function(name: str, parameter: str, schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a function of one parameter."""
    parameters = {
        "type": "object",
        "properties": {parameter: schema},
        "required": [parameter],
        "additionalProperties": False,
        **more,
    }
    return {"type": "function", "function": {"name": name, "description": "Tells it.", "parameters": parameters}}


WEATHER = function("weather", "place", {"enum": ["Haifa", "Eilat"]})
CLOCK = function("clock", "zone", {"$ref": "#/$defs/z"}, **{"$defs": {"z": {"type": "integer", "minimum": 0, "maximum": 12}}})


def adapter_of(loaded: Base, rank: int) -> LowRankAdapter:
    shape = AdapterShape("lora", rank, 16.0, 0.0, False, resolve_targets(loaded, "all-linear"))
    adapter = new_adapter(loaded, shape, "kaiming", rank)
    tiny.stir(adapter)
    return adapter


@pytest.fixture(scope="module")
def base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base of whole runs, with room for conversations about functions: its tokens are bytes."""
    folder = tmp_path_factory.mktemp("roomy") / "base"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    return folder


@pytest.fixture(scope="module")
def loaded(base: Path) -> Base:
    return load_base(base, "fp32")


@pytest.fixture(scope="module")
def place(base: Path, loaded: Base, tmp_path_factory: pytest.TempPathFactory) -> Place:
    config = f"version: 1\nbases: {{tiny: {{model: {base}}}}}\n"
    made = place_with(tmp_path_factory.mktemp("answers"), config)
    for rank, name in enumerate(NAMES, 2):
        folder = made.data / "made" / name
        folder.mkdir(parents=True)
        adapter_of(loaded, rank).save(folder, "tiny")
        add_model(made, "tiny", name, folder)
    return made


@pytest.fixture(scope="module")
def url(place: Place) -> Iterator[str]:
    with worker(place, "tiny"), api(service_at(place, place.service_config())) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, model: str = "tiny", **more: Any) -> Any:
    given = {"temperature": 0, "max_completion_tokens": 12, **more}
    return client.chat.completions.create(model=model, messages=ASKED, **given)  # type: ignore[call-overload]


def expected_text(base: Path, loaded: Base, folder: Path | None, count: int = 12) -> str:
    tokens = BaseTokens(base)
    sites = {} if folder is None else load_peft(loaded, folder).sites
    with loaded.using(sites):
        ids = generate(loaded, [tokens.prompt_ids(ASKED)], SamplingParams(count, tokens.stop_ids))[0]
    return tokens.chat.decode(ids, skip_special=True)


@pytest.mark.parametrize("name", ["tiny", *NAMES])
def test_an_answer_is_what_the_model_says(name: str, base: Path, loaded: Base, place: Place, client: openai.OpenAI) -> None:
    folder = None if name == "tiny" else place.data / "made" / name
    assert ask(client, name).choices[0].message.content == expected_text(base, loaded, folder)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, name, stream=True))
    assert streamed == expected_text(base, loaded, folder)


def test_log_probabilities_are_those_of_the_logits(base: Path, loaded: Base, client: openai.OpenAI) -> None:
    tokens, text = BaseTokens(base), "one two three"
    answer = client.completions.create(model="tiny", prompt=text, max_tokens=6, logprobs=5, echo=True, temperature=0).choices[0]
    assert answer.logprobs is not None
    assert answer.text.startswith(text)
    ids = tokens.encode(text)
    ids += generate(loaded, [ids], SamplingParams(6, tokens.stop_ids))[0]
    expected_TV = torch.log_softmax(tiny.packed_logits(loaded, [ids])[0].float(), 1)
    found = answer.logprobs.token_logprobs
    assert found is not None
    assert found[0] is None
    for at, value in enumerate(found[1:]):
        assert value == pytest.approx(float(expected_TV[at, ids[at + 1]]), abs=1e-4)
    chat = ask(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in chat)  # greedy: the likeliest was chosen
    assert all(math.fsum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1.0001 for entry in chat)


def test_after_the_assistants_message_a_new_one_is_written_where_the_template_lets_it(
    base: Path, loaded: Base, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = BaseTokens(base)
    messages: list[Any] = [*ASKED, {"role": "assistant", "content": "six"}]
    text = tokens.chat.prompt_text(messages)
    assert text.startswith(tokens.chat.prompt_text(ASKED) + "six")
    assert text.endswith(tokens.chat.prompt_text(ASKED)[-5:]), "the message has ended, and another one of the assistant's begins"
    ids = generate(loaded, [tokens.prompt_ids(messages)], SamplingParams(12, tokens.stop_ids))[0]
    answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_completion_tokens=12)
    assert answer.choices[0].message.content == tokens.chat.decode(ids, skip_special=True)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokens.prompt_ids(messages))

    def refuse(*_: Any, **__: Any) -> str:
        raise DataError("the chat template refuses this conversation: roles must alternate", hint="leave one out")

    monkeypatch.setattr("kivnun.data.rendering.ChatTemplate.render", refuse)
    with pytest.raises(openai.BadRequestError, match="roles must alternate") as caught:
        client.chat.completions.create(model="tiny", messages=messages)
    assert caught.value.param == "messages"


def test_a_schema_is_kept_for_every_seed(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "pet", "strict": True, "schema": SCHEMA}}
    for seed in range(4):
        answer = ask(client, NAMES[seed % 3], temperature=1.5, seed=seed, n=3, response_format=form, max_completion_tokens=150)
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            pet = json.loads(choice.message.content)
            assert set(pet) == {"kind", "age", "tags"}
            assert pet["kind"] in ("cat", "dog")
            assert 0 <= pet["age"] <= 99
            assert all(len(tag) <= 3 for tag in pet["tags"])
            assert len(pet["tags"]) <= 2


def test_a_form_that_cannot_be_kept_is_refused_with_the_reason(client: openai.OpenAI) -> None:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(40):
        deep = {"type": "array", "items": deep}
    bad: list[tuple[Any, str]] = [
        ({"type": "objekt"}, "Invalid type: objekt"), (deep, "too large"), ({"$ref": "http://169.254.169.254/"}, "not present"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"), 
        ({"type": "object", "unevaluatedProperties": False}, "unevaluated"),
        ({"enum": ["a" * 8_000] * 9}, "longer than"), ({"type": "integer", "multipleOf": 999_983}, "multiple"),
        ({"const": "a" * 70_000}, "shorten"), ({"type": "integer", "minimum": -(2**63) - 1}, "64 bits"),
    ]  # fmt: skip
    for schema, why in bad:
        with pytest.raises(openai.BadRequestError, match=why) as caught:
            ask(client, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
        assert (caught.value.code, caught.value.param) == ("invalid_json_schema", "response_format.json_schema.schema")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_be_made_is_made_and_fits_its_function(choice: Any, stream: bool, client: openai.OpenAI) -> None:
    for seed in range(2):
        more: dict[str, Any] = {
            "tools": [WEATHER, CLOCK],
            "tool_choice": choice,
            "parallel_tool_calls": False,
            "max_completion_tokens": 200,
            "temperature": 1.2,
            "seed": seed,
        }
        if stream:
            chunks = list(ask(client, stream=True, **more))
            calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
            reason = chunks[-1].choices[0].finish_reason
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""
        else:
            answer = ask(client, **more).choices[0]
            calls, reason = answer.message.tool_calls, answer.finish_reason
            assert answer.message.content is None
        assert reason == "tool_calls"
        assert calls
        for call in calls:
            arguments = json.loads(call.function.arguments)
            assert call.id.startswith("call_")
            if call.function.name == "weather":
                assert arguments["place"] in ("Haifa", "Eilat")
            else:
                assert choice == "required"
                assert 0 <= arguments["zone"] <= 12


def test_a_conversation_with_calls_goes_on(client: openai.OpenAI) -> None:
    first = (
        ask(client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_completion_tokens=200)
        .choices[0]
        .message
    )
    messages = [
        *ASKED,
        first.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "sun"},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER], max_tokens=4)  # type: ignore[list-item]
    assert answer.choices


def test_langchains_client_chats_streams_calls_and_gets_structure(url: str) -> None:
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel, Field, SecretStr

    class Weather(BaseModel):
        """Tells the weather."""

        days: int = Field(ge=0, le=9)

    chat = ChatOpenAI(
        base_url=f"{url}/v1", api_key=SecretStr(KEY), model="tiny", temperature=0, max_completion_tokens=200, max_retries=0
    )
    whole = chat.invoke([HumanMessage("three 2")])
    assert "".join(str(chunk.content) for chunk in chat.stream([HumanMessage("three 2")])) == whole.content
    for method in ("function_calling", "json_schema"):
        found = chat.with_structured_output(Weather, method=method).invoke("three 2")  # type: ignore[arg-type]
        assert isinstance(found, Weather)
    called = chat.bind_tools([Weather], tool_choice="any", parallel_tool_calls=False).invoke("three 2")
    assert called.tool_calls[0]["name"] == "Weather"  # type: ignore[attr-defined]


# --- which adapter answers ---------------------------------------------------------------------------------------------------


def test_forty_adapters_that_come_and_go_answer_each_for_itself(
    base: Path, loaded: Base, place: Place, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ready: dict[str, tuple[str, str]] = {}
    for number in range(40):
        name, folder = f"ft:tiny:kivnun:canary{number}:bbbbbbbb", tmp_path / str(number)
        folder.mkdir()
        adapter = adapter_of(loaded, 2)
        with torch.no_grad():  # a push of its own in the last layer: the same prompt, forty answers
            for parameter in adapter.parameters().values():
                parameter.mul_(0.2 + number / 8)
        adapter.save(folder, "tiny")
        ready[name] = (add_model(place, "tiny", name, folder), expected_text(base, loaded, folder, 8))
    assert len({text for _, text in ready.values()}) > 10

    monkeypatch.setattr(resident, "AdapterCache", RoomForFour)
    with worker(place, "tiny"):  # a second worker: the newest is asked as long as it has the fewest answers

        def one(number: int) -> None:
            name = f"ft:tiny:kivnun:canary{number * 7 % 40}:bbbbbbbb"
            answer = ask(client, name, max_completion_tokens=8)
            assert (answer.x_adapter_hash, answer.choices[0].message.content) == ready[name]

        with ThreadPoolExecutor(12) as pool:
            list(pool.map(one, range(60)))


class RoomForFour(AdapterCache[Any]):
    """Forty adapters in it are thrown out and loaded anew all the time."""

    def __init__(self, fetch: Any, load: Any, max_bytes: int) -> None:
        super().__init__(fetch, load, max_count=4, max_bytes=max_bytes)


def test_a_model_is_callable_within_a_second_of_its_record(
    loaded: Base, place: Place, client: openai.OpenAI, tmp_path: Path
) -> None:
    ask(client)  # the base is warm: what is new is the adapter
    seconds: list[float] = []
    for rank in (5, 6, 7):  # the machine may be doing something else for once
        name, folder = f"ft:tiny:kivnun:fresh{rank}:dddddddd", tmp_path / str(rank)
        folder.mkdir()
        adapter_of(loaded, rank).save(folder, "tiny")
        content_hash, began = add_model(place, "tiny", name, folder), time.monotonic()
        assert ask(client, name, max_completion_tokens=1).x_adapter_hash == content_hash
        seconds.append(time.monotonic() - began)
    assert min(seconds) < 1


def test_an_adapter_that_is_not_the_one_in_the_records_is_not_used(
    loaded: Base, place: Place, client: openai.OpenAI, tmp_path: Path
) -> None:
    adapter_of(loaded, 3).save(tmp_path, "tiny")
    add_model(place, "tiny", "ft:tiny:kivnun:swapped:cccccccc", tmp_path, content_hash="0" * 64)
    with pytest.raises(openai.InternalServerError):
        ask(client, "ft:tiny:kivnun:swapped:cccccccc")
    assert ask(client, NAMES[0]).x_adapter_hash


def test_an_answer_of_another_adapter_is_refused(place: Place, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(scheduler, "Begun", lambda **said: Begun(**{**said, "adapter": "f" * 64}))
    for more in ({}, {"stream": True}):
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client, NAMES[1], **more)
        assert caught.value.code == "adapter_mismatch"


# --- files that somebody made up ---------------------------------------------------------------------------------------------


def header(**tensors: Any) -> bytes:
    raw = json.dumps(tensors).encode()
    return struct.pack("<Q", len(raw)) + raw


def span(start: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


CRAFTED: list[tuple[str, bytes]] = [
    ("empty", b""), ("short", b"\0" * 7), ("huge header", struct.pack("<Q", 1 << 62) + b"{}"),
    ("header beyond the end", struct.pack("<Q", 100) + b"{}"), ("no json", struct.pack("<Q", 3) + b"abc"),
    ("deep", struct.pack("<Q", 100_000) + b"[" * 100_000), ("list", struct.pack("<Q", 2) + b"[]"),
    ("wrong size", header(a=span(0, 4, [2])) + b"\0" * 4), ("beyond", header(a=span(0, 8)) + b"\0" * 4),
    ("overlap", header(a=span(0, 4), b=span(0, 4)) + b"\0" * 4), ("negative", header(a=span(4, 0, [-1]))),
    ("overflow", header(a=span(0, 0, [1 << 40, 1 << 40]))), ("other type", header(a=span(0, 8, [1], "I64")) + b"\0" * 8),
    ("tail", header(a=span(0, 4)) + b"\0" * 5), ("pickle", b"\x80\x04\x95" + b"\0" * 50),
]  # fmt: skip


@pytest.mark.parametrize("content", [content for _, content in CRAFTED], ids=[name for name, _ in CRAFTED])
def test_a_crafted_file_is_refused_before_it_is_loaded(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(IntegrityError):
        check_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("change", ["nan", "rank", "shape", "name", "config", "kind", "bin"])
def test_an_adapter_that_does_not_fit_the_base_is_refused(change: str, loaded: Base, tmp_path: Path) -> None:
    adapter_of(loaded, 3).save(tmp_path, "tiny")
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, said = load_file(weights), json.loads(config.read_text())
    first = next(iter(tensors))
    match change:
        case "nan":
            tensors[first][0, 0] = np.nan
        case "rank":
            said["r"] = 1 << 20
        case "shape":
            tensors[first] = tensors[first][:, :-1].copy()
        case "name":
            tensors["made.up"] = tensors.pop(first)
        case "config":
            said["r"] = {"a": 1}
        case "kind":
            said["peft_type"] = "MADE_UP"
        case _:
            weights.rename(tmp_path / "adapter_model.bin")
    if change != "bin":
        save_file(tensors, weights)
    config.write_text(json.dumps(said))
    with pytest.raises(IntegrityError):
        load_adapter(loaded, tmp_path)
