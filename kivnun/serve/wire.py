"""What a client may ask and what it is told, in OpenAI's words: bodies to requests, answers and errors to bodies.

A parameter that would have no effect is refused by its name, unless it holds the value that means nothing (null, a penalty of 0):
a caller that believes to be obeyed when it is not cannot be helped later. Nothing here knows HTTP or a model.
Next: `worker.py` (who answers), `app.py` (the routes).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kivnun.data.chat_shape import Sentences, check_chat_messages
from kivnun.data.jsonl import as_list, type_name
from kivnun.data.template import ChatTokenizer
from kivnun.errors import DataError
from kivnun.model.sampling import ROWS_AT_ONCE, SamplingParams
from kivnun.serve.parameters import (
    Endpoint,
    Refusal,
    bad,
    error_body,
    flag,
    include_usage_in,
    number,
    object_in,
    required,
    stops_in,
    token_limits,
    whole,
)

__all__ = ["Endpoint", "Head", "Refusal", "Request", "Served", "error_body", "parse"]

# What each endpoint reads. Everything else is refused, but for the values below that ask for nothing.
READ = {
    "chat.completion": (
        "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "stop", "seed", "stream",
        "stream_options",
    ),
    "text_completion": ("model", "prompt", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options"),
}  # fmt: skip
_NOTHING: dict[str, tuple[object, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "logprobs": (False,), "top_logprobs": (0,),
    "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none",), "store": (False,), "echo": (False,),
    "modalities": (["text"],), "best_of": (1,), "suffix": ("",), "metadata": ({},),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Served:
    """What is offered: model ids by "tuned" and "base", the tokenizer, the longest row in tokens, and whether the tuned model was
    trained on chats."""

    ids: Mapping[str, str]
    tokenizer: ChatTokenizer
    longest: int
    trained_on_chats: bool

    def which(self, model: str) -> str | None:
        return next((which for which, name in self.ids.items() if name == model), None)


@dataclass(frozen=True, slots=True)
class Request:
    """A checked request. Choice i goes on from `prompts[i // n]` and draws stream i % n, so that a prompt's choices do not depend
    on the others' prompts."""

    endpoint: Endpoint
    model: str
    which: str
    prompts: list[list[int]]
    n: int
    limits: list[int]
    params: SamplingParams
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.n

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


def parse(raw: bytes, endpoint: Endpoint, served: Served) -> Request:
    """Return the request in a body. Raises Refusal, which names the parameter."""
    body = object_in(raw)
    _refuse_unknown(body, endpoint)
    model = required(body, "model")
    which = served.which(model) if isinstance(model, str) else None
    if which is None:
        offered = ", ".join(served.ids.values())
        raise Refusal(404, f"there is no model {model!r} here; there are {offered}", param="model", code="model_not_found")
    prompts = _chat_prompts(body, served, which) if endpoint == "chat.completion" else _text_prompts(body, served)
    n = whole(body, "n", 1, 1, ROWS_AT_ONCE)
    if n * len(prompts) > ROWS_AT_ONCE:
        raise bad("n", f"n times the number of prompts must be at most {ROWS_AT_ONCE}, got {n * len(prompts)}")
    limits = token_limits(body, endpoint, prompts, served.longest)
    seed = whole(body, "seed", secrets.randbits(31), -(2**63), 2**63 - 1)
    params = SamplingParams(
        max(limits), served.tokenizer.stop_ids, number(body, "temperature", 1.0, 0, 2), number(body, "top_p", 1.0, 0, 1), seed
    )
    stream, options = flag(body, "stream"), body.get("stream_options")
    return Request(endpoint, model, which, prompts, n, limits, params, stops_in(body), stream, include_usage_in(options, stream))


# --- one parameter each ------------------------------------------------------------------------------------------------------


def _refuse_unknown(body: Mapping[str, Any], endpoint: Endpoint) -> None:
    for name, value in body.items():
        if name in READ[endpoint] or any(value == nothing and type(value) is type(nothing) for nothing in _NOTHING.get(name, ())):
            continue
        if name in ("presence_penalty", "frequency_penalty") and value == 0:
            continue
        raise Refusal(
            400,
            f"{name} is not supported here; supported are {', '.join(READ[endpoint])}",
            param=name,
            code="unsupported_parameter",
        )


def _chat_prompts(body: Mapping[str, Any], served: Served, which: str) -> list[list[int]]:
    given = required(body, "messages")
    if which == "tuned" and not served.trained_on_chats:
        raise bad("model", "this model was tuned on plain prompts or text, not on chats: ask /v1/completions")
    if not served.tokenizer.has_template:
        raise bad("model", "this base has no chat template: ask /v1/completions")
    problems = Sentences()
    messages = check_chat_messages(given, "messages", problems)
    if problems:
        raise bad("messages", "; ".join(problems))
    try:
        return [_checked("messages", served.tokenizer.prompt_ids(messages))]
    except DataError as error:
        raise bad("messages", error.message) from None


def _text_prompts(body: Mapping[str, Any], served: Served) -> list[list[int]]:
    given = required(body, "prompt")
    texts = [given] if isinstance(given, str) else as_list(given)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise bad("prompt", f"prompt must be a string or a list of strings, got {type_name(given)}")
    return [_checked("prompt", served.tokenizer.encode(text)) for text in texts]


def _checked(name: str, ids: list[int]) -> list[int]:
    if not ids:
        raise bad(name, f"{name} is empty: nothing would predict the first token")
    return ids


# --- answers -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Head:
    """What all parts of one answer have in common."""

    id: str
    created: int
    request: Request
    fingerprint: str

    def whole(self, texts: Sequence[str], reasons: Sequence[str], completion_tokens: int) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        chat = self.request.endpoint == "chat.completion"
        choices = [
            {
                "index": index,
                **({"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}),
                "logprobs": None,
                "finish_reason": reason,
            }
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return {**self._common(self.request.endpoint), "choices": choices, "usage": self.usage(completion_tokens)}

    def opening(self) -> Iterator[dict[str, Any]]:
        """Yield the chunks that come before any text: in a chat, who speaks."""
        if self.request.endpoint == "chat.completion":
            for index in range(self.request.choices):
                yield self._chunk([self._choice(index, {"role": "assistant", "content": ""}, None)])

    def piece(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk([self._choice(index, {"content": text}, None, text)])

    def end(self, index: int, reason: str) -> dict[str, Any]:
        return self._chunk([self._choice(index, {}, reason)])

    def counts(self, completion_tokens: int) -> dict[str, Any]:
        """Return the chunk that holds the usage and no choice."""
        return {**self._chunk([]), "usage": self.usage(completion_tokens)}

    def usage(self, completion_tokens: int) -> dict[str, int]:
        prompt = self.request.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion_tokens, "total_tokens": prompt + completion_tokens}

    def _choice(self, index: int, delta: dict[str, Any], reason: str | None, text: str = "") -> dict[str, Any]:
        said = {"delta": delta} if self.request.endpoint == "chat.completion" else {"text": text}
        return {"index": index, **said, "logprobs": None, "finish_reason": reason}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.request.endpoint == "chat.completion" else "text_completion"
        usage = {"usage": None} if self.request.include_usage else {}
        return {**self._common(kind), "choices": choices, **usage}

    def _common(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.request.model,
            "system_fingerprint": self.fingerprint,
        }  # fmt: skip
