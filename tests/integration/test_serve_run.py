"""One run served: OpenAI's own client against a real process, and the answers that `kivnun chat` gives."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn

from kivnun.cli.main import run as command
from kivnun.cli.serve_run import serve_run
from kivnun.model.families import longest_row
from kivnun.opened import OpenedRun, open_run
from kivnun.serve.app import MAX_BODY_BYTES, make_app
from kivnun.serve.wire import Refusal, Served, parse
from kivnun.serve.worker import WAITING, Busy, Ended, Failed, Job, Piece, Said, StopText, Worker
from runs import chats, run_spec, write_spec

KEY = "kivnun-test-key"
ASKED = [{"role": "user", "content": "three 2"}]


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("serve")
    run_spec(write_spec(place, base, chats()), place / "words")
    return place / "words"


@contextmanager
def process(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start the command on a free port; give its address, and end it as Ctrl-C does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MY_KEY": KEY}
    words = [sys.executable, "-m", "kivnun", "serve-run", str(folder), "--port", "0", "--json", *options]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line, server.stderr.read() if server.stderr else ""
        said = json.loads(line)
        assert said["models"] == ["words", "words:base"]
        try:
            yield said["url"], server
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=30)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[openai.OpenAI]:
    with (
        process(folder, "--api-key-env", "MY_KEY") as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as made,
    ):
        yield made


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "words", "messages": ASKED, "max_tokens": 8, "temperature": 0, **more})


def joined(stream: Any) -> tuple[dict[int, str], dict[int, str], list[Any]]:
    """Return the texts and ends of a streamed chat by choice, and all chunks."""
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    chunks = list(stream)
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    return texts, ends, chunks


@pytest.mark.parametrize("which", ["words", "words:base"])
def test_an_answer_is_that_of_chat(which: str, client: openai.OpenAI, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--base"] if which.endswith(":base") else []
    assert command(["chat", str(folder), "--once", "three 2", "--max-new-tokens", "8", "--json", *base]) == 0
    said = json.loads(capsys.readouterr().out)
    found = ask(client, model=which)
    assert found.choices[0].message.content == said["reply"]
    assert found.choices[0].finish_reason == said["finish_reason"]
    assert found.usage.completion_tokens == said["tokens"]
    assert found.usage.prompt_tokens + found.usage.completion_tokens == found.usage.total_tokens
    assert (found.model, found.object, found.choices[0].message.role) == (which, "chat.completion", "assistant")


def test_a_drawn_answer_is_that_of_chat_with_the_same_seed(
    client: openai.OpenAI, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = ["--temperature", "1.5", "--top-p", "0.9", "--seed", "5", "--max-new-tokens", "8"]
    assert command(["chat", str(folder), "--once", "three 2", "--json", *drawn]) == 0
    found = ask(client, temperature=1.5, top_p=0.9, seed=5)
    assert found.choices[0].message.content == json.loads(capsys.readouterr().out)["reply"]


def test_streamed_pieces_joined_are_the_whole_answer(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 1.5, "seed": 4, "max_completion_tokens": 12, "max_tokens": openai.omit}
    whole = ask(client, **options)
    texts, ends, chunks = joined(ask(client, stream=True, stream_options={"include_usage": True}, **options))
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len(set(texts.values())) > 1  # choices draw apart
    assert len(chunks) > 3 + 3 + 1 + 3  # text came in more than one piece per choice


def test_a_seed_repeats_an_answer_and_without_one_answers_differ(client: openai.OpenAI) -> None:
    def texts(**more: Any) -> list[str]:
        return [choice.message.content for choice in ask(client, temperature=1.8, n=4, max_tokens=12, **more).choices]

    assert texts(seed=11) == texts(seed=11)
    assert texts(seed=11) != texts(seed=12)
    assert texts() != texts()
    assert ask(client, seed=11).system_fingerprint == ask(client).system_fingerprint
    one = ask(client, temperature=1.8, max_tokens=12, seed=11).choices[0].message.content
    assert one == texts(seed=11)[0]  # the first of four is the one alone


def test_an_answer_ends_before_a_stop_string(client: openai.OpenAI) -> None:
    whole = ask(client, max_tokens=16).choices[0].message.content
    stop = whole[3:5]
    assert len(stop) == 2
    found = ask(client, max_tokens=16, stop=["never seen", stop])
    assert found.choices[0].message.content == whole[: whole.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    texts, ends, _ = joined(ask(client, max_tokens=16, stop=stop, stream=True))
    assert (texts[0], ends[0]) == (whole[: whole.index(stop)], "stop")


def test_completions_take_plain_text_and_lists_of_it(client: openai.OpenAI) -> None:
    def complete(prompt: Any, **more: Any) -> Any:
        return client.completions.create(model="words", prompt=prompt, **{"temperature": 1.0, "seed": 3, "max_tokens": 6, **more})

    one, two = complete("one 1"), complete("two 22")
    both = complete(["one 1", "two 22"], n=2)
    assert [both.choices[0].text, both.choices[2].text] == [one.choices[0].text, two.choices[0].text]
    assert both.usage.prompt_tokens == one.usage.prompt_tokens + two.usage.prompt_tokens
    assert (one.object, one.choices[0].finish_reason in ("stop", "length")) == ("text_completion", True)
    streamed = "".join(choice.text for chunk in complete("one 1", stream=True) for choice in chunk.choices)
    assert streamed == one.choices[0].text
    assert complete("one 1", max_tokens=openai.omit).usage.completion_tokens <= 16


def test_models_are_listed_and_found_and_health_needs_no_key(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["words", "words:base"]
    assert client.models.retrieve("words:base").owned_by == "kivnun"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with openai.OpenAI(base_url=str(client.base_url).removesuffix("/v1/"), api_key="none") as plain:
        assert plain.get("/health", cast_to=object) == {"status": "ok"}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 3}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 65}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 5000}, "max_tokens"),
    ({"max_completion_tokens": 4}, "max_completion_tokens"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"seed": 1.5}, "seed"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"logprobs": True}, "logprobs"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"logit_bias": {"5": 3}}, "logit_bias"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}}, "response_format"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tools"),
    ({"modalities": ["text", "audio"], "audio": {"voice": "x", "format": "wav"}}, "audio"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"user": "me"}, "user"),
    ({"extra_body": {"made_up": 1}}, "made_up"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "assistant", "content": "a", "weight": 1}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]}, "messages"),
]


@pytest.mark.parametrize(("given", "param"), REFUSED, ids=[f"{param}-{number}" for number, (_, param) in enumerate(REFUSED)])
def test_what_cannot_be_done_is_refused_by_its_name(given: dict[str, Any], param: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **given)
    error = caught.value
    assert (error.status_code, error.param, error.type) == (400, param, "invalid_request_error")
    assert error.code in ("invalid_value", "unsupported_parameter", "context_length_exceeded")
    assert error.request_id is not None
    assert error.request_id.startswith("req_")


def test_values_that_ask_for_nothing_are_taken(client: openai.OpenAI) -> None:
    nothing: dict[str, Any] = {
        "presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": False, "logit_bias": {}, "user": None,
        "response_format": {"type": "text"},
    }  # fmt: skip
    assert ask(client, **nothing).choices == ask(client).choices
    parts = [{"role": "user", "content": [{"type": "text", "text": "three "}, {"type": "text", "text": "2"}]}]
    assert ask(client, messages=parts).choices == ask(client).choices


def test_other_errors_are_the_clients_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, model="gpt-4o")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="words", input="a")
    with openai.OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0) as stranger:
        for call in (lambda: ask(stranger), stranger.models.list):
            with pytest.raises(openai.AuthenticationError) as refused:
                call()
            assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.APIStatusError) as large:
        ask(client, messages=[{"role": "user", "content": "a" * (MAX_BODY_BYTES + 1)}])
    assert (large.value.status_code, large.value.code) == (413, "request_too_large")
    with pytest.raises(openai.APIStatusError) as form:
        client.post("/chat/completions", cast_to=object, content=b"{}", options={"headers": {"content-type": "text/plain"}})
    assert (form.value.status_code, form.value.code) == (415, "unsupported_media_type")
    with pytest.raises(openai.BadRequestError, match="context takes 256 tokens"):
        ask(client, messages=[{"role": "user", "content": "word " * 400}])


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"model": "words", "model": "words"}', b'\xff{"model": 1}', b'{"model": NaN}', b'{"messages": []}']
)
def test_bodies_that_are_no_request_get_an_error_and_the_server_lives(body: bytes, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", cast_to=object, content=body)
    assert caught.value.type == "invalid_request_error"
    assert ask(client).choices


# --- in this process: what a client that leaves does to its job --------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(folder: Path) -> OpenedRun:
    return open_run(folder)


def served_by(opened: OpenedRun, chats: bool = True) -> Served:
    ids = {"tuned": "words", "base": "words:base"}
    return Served(ids, opened.tokenizer, longest_row(opened.base_folder), chats)


class Gated(Worker):
    """A worker whose jobs stop after their first piece until they are cancelled: what a slow model is to a client that leaves."""

    jobs: list[Job]

    def submit(self, job: Job) -> None:
        self.jobs = [*getattr(self, "jobs", []), job]
        tell, told = job.tell, threading.Event()

        def gated(what: Said) -> None:
            tell(what)
            if isinstance(what, Piece) and not told.is_set():
                told.set()
                assert job.cancelled.wait(timeout=30), "nobody cancelled the job"

        job.tell = gated
        super().submit(job)


@contextmanager
def listening(worker: Worker, served: Served) -> Iterator[int]:
    worker.start()
    server = uvicorn.Server(uvicorn.Config(make_app(worker, served, "test"), log_level="error", timeout_graceful_shutdown=3))
    door = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[door])))
    thread.start()
    try:
        yield door.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        door.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_closed_connection_stops_its_generation(stream: bool, opened: OpenedRun) -> None:
    worker = Gated(lambda: {"tuned": opened.tuned, "base": opened.base_model}, opened.tokenizer)
    with listening(worker, served_by(opened)) as port:
        body = json.dumps({"model": "words", "messages": ASKED, "stream": stream, "max_tokens": 100}).encode()
        with socket.create_connection(("127.0.0.1", port)) as connection:
            heads = (
                "POST /v1/chat/completions HTTP/1.1",
                "host: a",
                "content-type: application/json",
                f"content-length: {len(body)}",
            )
            connection.sendall("\r\n".join((*heads, "", "")).encode() + body)
            if stream:
                assert b"200 OK" in connection.recv(4096)
        # The job waits for this; the next one shows that the worker is free again.
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            for _ in client.chat.completions.create(model="words", messages=ASKED, stream=True, max_tokens=3):  # type: ignore[call-overload]
                break
        assert worker.jobs[0].cancelled.is_set()


def queued(worker: Worker, opened: OpenedRun, *, cancel: bool = False) -> tuple[list[Said], threading.Event]:
    """Queue a job of at most eight tokens, cancelled at its first piece where asked; return what it says and whether it ended."""
    raw = json.dumps({"model": "words", "messages": ASKED, "max_tokens": 8, "temperature": 0}).encode()
    heard: list[Said] = []
    ended = threading.Event()

    def tell(what: Said) -> None:
        heard.append(what)
        if not isinstance(what, Piece):
            ended.set()
        elif cancel:
            job.cancelled.set()

    job = Job(parse(raw, "chat.completion", served_by(opened)), tell)
    worker.submit(job)
    return heard, ended


def answered(worker: Worker, opened: OpenedRun) -> list[Said]:
    """Return what a job says to its end."""
    heard, ended = queued(worker, opened)
    assert ended.wait(timeout=60)
    return heard


def test_a_cancelled_job_says_nothing_more_and_the_next_is_answered(opened: OpenedRun) -> None:
    worker = Worker(lambda: {"tuned": opened.tuned, "base": opened.base_model}, opened.tokenizer)
    worker.start()

    first, _ = queued(worker, opened, cancel=True)
    second = answered(worker, opened)
    assert [type(what) for what in first] == [Piece]
    assert isinstance(second[-1], Ended)
    worker.stop()
    assert not worker.alive


def test_a_job_that_fails_is_told_and_the_worker_lives(opened: OpenedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(lambda: {"tuned": opened.tuned, "base": opened.base_model}, opened.tokenizer)
    worker.start()
    with monkeypatch.context() as patch:
        patch.setattr("kivnun.train.engine.generate", lambda *given: 1 / 0)
        (failed,) = answered(worker, opened)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, ZeroDivisionError)
    assert isinstance(answered(worker, opened)[-1], Ended)
    worker.stop()


def test_a_failure_is_a_500_and_in_a_stream_an_error_event(opened: OpenedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(lambda: {"tuned": opened.tuned, "base": opened.base_model}, opened.tokenizer)
    with (
        listening(worker, served_by(opened)) as port,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client,
    ):
        monkeypatch.setattr("kivnun.train.engine.generate", lambda *given: 1 / 0)
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client)
        assert "division" not in str(caught.value)
        with pytest.raises(openai.APIError, match="see the server's log"):
            joined(ask(client, stream=True))


def test_too_many_waiting_jobs_are_told_to_come_back(opened: OpenedRun) -> None:
    worker = Worker(lambda: {}, opened.tokenizer)  # never started: everything waits
    raw = json.dumps({"model": "words", "messages": ASKED}).encode()
    request = parse(raw, "chat.completion", served_by(opened))
    for _ in range(WAITING):
        worker.submit(Job(request, lambda what: None))
    with pytest.raises(Busy):
        worker.submit(Job(request, lambda what: None))


def test_a_model_that_cannot_be_loaded_is_told_at_the_start(opened: OpenedRun) -> None:
    worker = Worker(lambda: {"tuned": 1 / 0}, opened.tokenizer)  # type: ignore[dict-item]
    with pytest.raises(ZeroDivisionError):
        worker.start()


def test_a_run_on_prompts_is_not_asked_as_a_chat(opened: OpenedRun) -> None:
    raw = json.dumps({"model": "words", "messages": ASKED}).encode()
    with pytest.raises(Refusal, match="ask /v1/completions"):
        parse(raw, "chat.completion", served_by(opened, chats=False))


@pytest.mark.parametrize("stops", [("ab",), ("abc", "b"), ("aab",), ("ba", "aba"), ("xyz",)])
@pytest.mark.parametrize("text", ["aabab", "abcab", "aaaab", "xyxyz", "no end", ""])
def test_stop_strings_cut_alike_however_the_text_comes(text: str, stops: tuple[str, ...]) -> None:
    """What is kept is the text up to where a stop string, the first to be complete, begins."""
    complete = next((end for end in range(len(text) + 1) if text[:end].endswith(stops)), None)
    expected = text if complete is None else text[: min(text.index(stop) for stop in stops if stop in text[:complete])]
    writer = StopText(stops)
    assert "".join(map(writer.push, text)) + writer.finish("") == expected
    assert writer.ended == (complete is not None)
    for size in (2, 3, 10):
        writer = StopText(stops)
        shown = "".join(writer.push(text[at : at + size]) for at in range(0, len(text), size)) + writer.finish("")
        assert not any(stop in shown for stop in stops)
        assert text.startswith(shown)
        assert writer.ended == (complete is not None)


def test_the_command_refuses_an_open_door_without_a_key(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve_run.name == "serve-run"
    assert command(["serve-run", str(folder), "--host", "0.0.0.0"]) == 2
    assert "can be reached by others" in capsys.readouterr().err
    assert command(["serve-run", str(folder), "--api-key-env", "KIVNUN_NO_SUCH_KEY"]) == 2
    assert "not set" in capsys.readouterr().err
