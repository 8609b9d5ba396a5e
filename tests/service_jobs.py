"""Fine-tuning jobs for tests: files of examples, stock clients of both dialects, and a network that loses answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.request import Request, urlopen

import openai
from openai import AzureOpenAI, OpenAI

from service_parts import KEY

API_VERSION = "2024-10-21"


def conversations(count: int, first: int = 0) -> bytes:
    """Return so many different conversations as JSON lines."""
    rows = (
        {
            "messages": [
                {"role": "user", "content": f"What is {number} and one?"},
                {"role": "assistant", "content": f"It is {number + 1}."},
            ]
        }
        for number in range(first, first + count)
    )
    return lines(rows)


def preferences(count: int) -> bytes:
    rows = (
        {
            "input": {"messages": [{"role": "user", "content": f"Say {number}."}]},
            "preferred_output": [{"role": "assistant", "content": f"{number}"}],
            "non_preferred_output": [{"role": "assistant", "content": f"I will not say {number}."}],
        }
        for number in range(count)
    )
    return lines(rows)


def lines(rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def openai_client(address: str, key: str = KEY, retries: int = 0) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=retries)


def azure_client(address: str, key: str = KEY) -> AzureOpenAI:
    return AzureOpenAI(azure_endpoint=address, api_version=API_VERSION, api_key=key, max_retries=0)


def azure_v1_client(address: str, key: str = KEY) -> OpenAI:
    return OpenAI(base_url=f"{address}/openai/v1", api_key=key, max_retries=0)


def uploaded(client: OpenAI, content: bytes, name: str = "train.jsonl") -> str:
    """Upload examples; return the id of a file that is judged."""
    made = client.files.create(file=(name, content), purpose="fine-tune")
    assert client.files.retrieve(made.id).status == "processed"
    return made.id


def refusal(call: Any, *given: Any, **named: Any) -> openai.APIStatusError:
    """Return the error that a call ends with."""
    try:
        call(*given, **named)
    except openai.APIStatusError as error:
        return error
    raise AssertionError("the call was answered")


@contextmanager
def losing_answers(address: str, lost: int) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Stand between a client and the API: pass every request on, and lose the first answers to POST of jobs by closing the
    connection. Give the address, and the requests that came: path, and the retry count that the client told."""
    came: list[tuple[str, str]] = []

    class Between(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            passed = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
            with urlopen(Request(f"{address}{self.path}", body, passed, method="POST")) as answer:
                content = answer.read()
            came.append((self.path, self.headers["x-stainless-retry-count"]))
            if len(came) <= lost:
                self.close_connection = True
                return
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Between)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", came
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
