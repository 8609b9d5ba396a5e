"""The files of a batch: requests read and checked, answers written in the order of the requests, in OpenAI's form.

One line is in memory at a time. Next: `batching.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from kivnun.data.jsonl import LineProblem, read_objects
from kivnun.errors import DataError
from kivnun.jobs.batches import Ending, LineAnswer
from kivnun.jobs.usage import Charge
from kivnun.service.dialect import Dialect
from kivnun.service.errors import ApiError

ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
MAX_REQUESTS = 50_000
MAX_SHOWN = 100  # of the errors of a file
MAX_NAME_LETTERS = 512

_UNANSWERED: Mapping[Ending, tuple[str, str]] = {
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
    "cancelled": ("batch_cancelled", "This request was not executed: the batch was cancelled."),
}


@dataclass(frozen=True, slots=True)
class Request:
    """A line of the input. `line` counts from 1."""

    line: int
    custom_id: str
    body: dict[str, Any]


def canonical(url: str) -> str | None:
    """Return the endpoint that a URL of a batch names, with or without /v1 (Azure's scripts leave it out); None for any other."""
    full = url if url.startswith("/v1/") else f"/v1{url}"
    return full if full in ENDPOINTS else None


def asked_at(endpoint: str, dialect: Dialect) -> str:
    """Return a batch's endpoint as `Answering.complete` reads it: without /v1, a model's name is a deployment's first."""
    return endpoint.removeprefix("/v1") if dialect == "azure" else endpoint


def requests_of(path: Path, without: frozenset[int] | set[int] = frozenset()) -> Iterator[Request]:
    """Yield the requests of a file that was validated, but the lines in `without`."""
    for line, row in read_objects(path):
        if line not in without:
            assert not isinstance(row, LineProblem)
            yield Request(line, row["custom_id"], row["body"])


@dataclass(slots=True)
class _Errors:
    """What is wrong with a file: the first of it, and how much more there is."""

    shown: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    total: int = 0

    def add(self, line: int | None, code: str, message: str, param: str | None = None) -> None:
        self.total += 1
        if len(self.shown) < MAX_SHOWN:
            self.shown.append({"code": code, "message": message, "param": param, "line": line})

    def all(self) -> list[dict[str, Any]]:
        if self.total == len(self.shown):
            return self.shown
        more = f"{self.total - len(self.shown):,} more problems are not listed"
        return [*self.shown, {"code": "too_many_errors", "message": more, "param": None, "line": None}]


def validated(path: Path, endpoint: str) -> tuple[int, str | None, list[dict[str, Any]]]:
    """Return how many requests a file holds, the model of all of them (None where they differ), and what is wrong with it."""
    errors = _Errors()
    names: set[bytes] = set()
    models: set[str] = set()
    total = 0
    try:
        for line, row in read_objects(path):
            total += 1
            if total > MAX_REQUESTS:
                errors.add(line, "too_many_tasks", f"a batch holds {MAX_REQUESTS:,} requests at most; split the file")
                break
            if isinstance(row, LineProblem):
                errors.add(line, "invalid_json_line", f"the line {row}")
            else:
                _check(line, row, endpoint, names, models, errors)
    except DataError as error:
        errors.add(None, "invalid_file", error.message.replace(f"data file {path}", "the file").replace(str(path), "the file"))
    if not total and not errors.total:
        errors.add(None, "empty_file", "the file holds no requests; each line must be one")
    return total, models.pop() if len(models) == 1 else None, errors.all()


def _check(line: int, row: dict[str, Any], endpoint: str, names: set[bytes], models: set[str], errors: _Errors) -> None:
    name, url, body = row.get("custom_id"), row.get("url"), row.get("body")
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME_LETTERS:
        errors.add(line, *_wrong(row, "custom_id", f"a string of 1 to {MAX_NAME_LETTERS} letters"))
    else:
        mark = hashlib.blake2b(name.encode(), digest_size=16).digest()
        if mark in names:
            errors.add(
                line, "duplicate_custom_id", "custom_id is that of an earlier line; each must be its line's own", "custom_id"
            )
        names.add(mark)
    if row.get("method") != "POST":
        errors.add(line, *_wrong(row, "method", "'POST'"))
    if not isinstance(url, str) or canonical(url) != canonical(endpoint):
        errors.add(line, *_wrong(row, "url", f"the batch's endpoint, {endpoint}"))
    if not isinstance(body, dict):
        errors.add(line, *_wrong(row, "body", "an object"))
        return
    asked = cast("dict[str, Any]", body)
    if not isinstance(asked.get("model"), str):
        errors.add(line, *_wrong(asked, "model", "a model's name", "body.model"))
    else:
        models.add(asked["model"])
    if asked.get("stream"):
        errors.add(line, "invalid_value", "body.stream must be false or absent: nobody listens to a batch", "body.stream")


def _wrong(row: Mapping[str, Any], key: str, allowed: str, param: str | None = None) -> tuple[str, str, str]:
    code = f"invalid_{key}" if key in row else "missing_required_parameter"
    return code, f"{param or key} must be {allowed}", param or key


# --- answers ----------------------------------------------------------------------------------------------------------------


def answer_line(
    batch_id: str, request: Request, answer: dict[str, Any] | ApiError, request_id: str, charge: Charge | None
) -> LineAnswer:
    """Return the line that answers a request: the body of the answer, or of the refusal, with its HTTP status."""
    refused = isinstance(answer, ApiError)
    status, body = (answer.status, answer.body("openai")) if isinstance(answer, ApiError) else (200, answer)
    response = {"status_code": status, "request_id": request_id, "body": body}
    line = {"id": _line_id(batch_id, request.line), "custom_id": request.custom_id, "response": response, "error": None}
    return LineAnswer(request.line, not refused, line, charge)


def _unanswered_line(batch_id: str, request: Request, ending: Ending) -> dict[str, Any]:
    code, message = _UNANSWERED[ending]
    error = {"code": code, "message": message}
    return {"id": _line_id(batch_id, request.line), "custom_id": request.custom_id, "response": None, "error": error}


def _line_id(batch_id: str, line: int) -> str:
    """Return the id of a line of the output: the same however often the file is written."""
    return "batch_req_" + hashlib.sha256(f"{batch_id}:{line}".encode()).hexdigest()[:24]


@dataclass(slots=True)
class Written:
    """What was written: how many good answers and bad ones, how many lines that have none, and the tokens of them all."""

    completed: int = 0
    failed: int = 0
    unanswered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}

    def count(self, answer: LineAnswer) -> None:
        self.completed += answer.ok
        self.failed += not answer.ok
        if answer.ok:
            usage = answer.body["response"]["body"].get("usage") or {}
            self.prompt_tokens += usage.get("prompt_tokens") or 0
            self.completion_tokens += usage.get("completion_tokens") or 0


def write_answers(
    batch_id: str, answers: Iterable[LineAnswer], requests: Iterable[Request], ending: Ending, output: BinaryIO, error: BinaryIO
) -> Written:
    """Write answers and, among them in the order of the input, the requests that have none; return what was written.

    Both come in the order of their lines. `requests` is empty where every line has its answer."""
    written = Written()
    coming = iter(answers)
    following = next(coming, None)
    for request in requests:
        if following is not None and following.line == request.line:
            _write(following, output, error, written)
            following = next(coming, None)
        else:
            error.write(_json_line(_unanswered_line(batch_id, request, ending)))
            written.unanswered += 1
    while following is not None:
        _write(following, output, error, written)
        following = next(coming, None)
    return written


def _write(answer: LineAnswer, output: BinaryIO, error: BinaryIO, written: Written) -> None:
    (output if answer.ok else error).write(_json_line(answer.body))
    written.count(answer)


def _json_line(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
