"""A request to the hosted service, every parameter read: what changes an answer is obeyed or refused by its name, never ignored.

Parameters that say who asks or how the answer is kept (`user`, `metadata`, `store`, ...) change no answer and are taken as they
are. Knows neither HTTP nor a model: a base's tokenizer is all it needs. Next: `reply.py` (what the client is told), `protocol.py`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kivnun.data.chat_shape import Message, Sentences, check_chat_messages
from kivnun.data.jsonl import as_list, as_object, type_name
from kivnun.errors import DataError
from kivnun.model.sampling import LIKELY_TOKENS, ROWS_AT_ONCE
from kivnun.serve.constraints import grammar_of_format
from kivnun.serve.parameters import (
    DEFAULT_COMPLETION_TOKENS,
    Endpoint,
    Refusal,
    bad,
    flag,
    include_usage_in,
    number,
    required,
    shown,
    stops_in,
    token_limits,
    whole,
)
from kivnun.serve.protocol import MAX_PROMPTS, MAX_TOP_LOGPROBS, AdapterName, Ask
from kivnun.serve.tools import ToolUse, tool_use

MAX_BIASES = 1024
MAX_LEGACY_LOGPROBS = 5
# Of prompts that are told with their logprobs: others wait while one of them is scored, and all are told in one message.
MAX_SCORED_TOKENS = 1 << 15

_BOTH = (
    "model", "temperature", "top_p", "n", "stop", "max_tokens", "seed", "logit_bias", "presence_penalty", "frequency_penalty",
    "logprobs", "stream", "stream_options",
)  # fmt: skip
READ: dict[Endpoint, tuple[str, ...]] = {
    "chat.completion": (
        *_BOTH, "messages", "max_completion_tokens", "top_logprobs", "response_format", "tools", "tool_choice",
        "parallel_tool_calls",
    ),
    "text_completion": (*_BOTH, "prompt", "echo", "best_of"),
}  # fmt: skip
# About who asks, and where an answer is kept: they change no answer.
NO_EFFECT = (
    "user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
    "service_tier",
)  # fmt: skip
# Values that ask for nothing.
_NOTHING: dict[str, tuple[object, ...]] = {
    "modalities": (["text"],),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none",),
}
_INSTEAD = {"functions": "; use tools", "function_call": "; use tool_choice", "suffix": ": the bases write on, they do not fill in"}


class Tokens(Protocol):
    """What a base's tokenizer must do: `data.template.ChatTokenizer`, or the toy's."""

    @property
    def has_template(self) -> bool: ...
    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]: ...
    def special_id(self, text: str) -> int | None:
        """Return the id of a special token; None where the base has none of this text."""
        ...

    def call_marks(self) -> tuple[str, str] | None: ...
    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that a token stands for."""
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """Whom a request is put to: the name it gave, its tokenizer and longest row, and whether answers can be held to a form."""

    model: str
    tokens: Tokens
    longest: int
    constrains: bool = True


@dataclass(frozen=True, slots=True)
class Question:
    """A checked request. Choice i answers `prompts[i // n]`; of `best_of` answers to each prompt the `n` likeliest are shown."""

    endpoint: Endpoint
    model: str
    prompts: list[list[int]]
    limits: list[int]
    n: int
    best_of: int
    temperature: float
    top_p: float
    seed: int
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool
    grammar: str | None
    tools: ToolUse | None

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.n

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def likely_tokens(self) -> int:
        """Return how many tokens the answer may come to, prompts and what is written, as far as that can be said before."""
        return self.prompt_tokens + sum(min(limit, LIKELY_TOKENS) for limit in self.limits) * self.best_of

    def ask(self, number: int, tenant: str, adapter: AdapterName | None) -> Ask:
        """Return it as it is put to a worker."""
        return Ask(
            id=number, tenant=tenant, adapter=adapter, prompts=self.prompts, limits=self.limits, n=self.best_of,
            stop_ids=list(self.stop_ids), stop=list(self.stop), temperature=self.temperature, top_p=self.top_p, seed=self.seed,
            presence_penalty=self.presence_penalty, frequency_penalty=self.frequency_penalty, logit_bias=list(self.logit_bias),
            logprobs=0 if self.logprobs is None and self.best_of > self.n else self.logprobs,
            prompt_logprobs=self.echo and self.logprobs is not None, grammar=self.grammar,
            spelt=[] if self.tools is None else list(self.tools.spelt),
        )  # fmt: skip


def read_question(body: Mapping[str, Any], endpoint: Endpoint, asked: Asked) -> Question:
    """Return the question in a body without nulls. Raises Refusal, which names the parameter."""
    refuse_unknown(body, endpoint)
    chat = endpoint == "chat.completion"
    use = tool_use(body, asked.tokens) if chat else None
    prompts = _chat_prompts(body, asked, use) if chat else _text_prompts(body, asked)
    n = whole(body, "n", 1, 1, ROWS_AT_ONCE)
    best_of = whole(body, "best_of", n, n, ROWS_AT_ONCE)
    if best_of * len(prompts) > ROWS_AT_ONCE:
        raise bad("n", f"answers times prompts must be at most {ROWS_AT_ONCE}, got {best_of * len(prompts)}")
    echo, stream = flag(body, "echo"), flag(body, "stream")
    scored = sum(map(len, prompts)) if echo and "logprobs" in body else 0
    if scored > MAX_SCORED_TOKENS:
        raise bad(
            "echo", f"echo with logprobs takes prompts of {MAX_SCORED_TOKENS:,} tokens in all, got {scored:,}: ask in portions"
        )
    if stream and best_of > n:
        raise bad("best_of", "best_of above n cannot be streamed: which answer is best is known at the end")
    grammar = grammar_of_format(body["response_format"]) if "response_format" in body else None
    grammar = use.grammar if use is not None and use.grammar is not None else grammar
    if grammar is not None and not asked.constrains:
        raise bad(
            "response_format" if "response_format" in body else "tool_choice", "answers of this base cannot be held to a form"
        )
    return Question(
        endpoint=endpoint,
        model=asked.model,
        prompts=prompts,
        limits=_limits(body, endpoint, prompts, asked.longest, echo),
        n=n,
        best_of=best_of,
        temperature=number(body, "temperature", 1.0, 0, 2),
        top_p=number(body, "top_p", 1.0, 0, 1),
        seed=whole(body, "seed", secrets.randbits(31), -(2**63), 2**63 - 1),
        presence_penalty=number(body, "presence_penalty", 0.0, -2, 2),
        frequency_penalty=number(body, "frequency_penalty", 0.0, -2, 2),
        logit_bias=_biases(body, asked.tokens.vocab_size),
        stop=stops_in(body),
        stop_ids=asked.tokens.stop_ids,
        logprobs=_chat_logprobs(body) if chat else _legacy_logprobs(body),
        echo=echo,
        stream=stream,
        include_usage=include_usage_in(body.get("stream_options"), stream),
        grammar=grammar,
        tools=use,
    )


def refuse_unknown(body: Mapping[str, Any], endpoint: Endpoint) -> None:
    """Raise Refusal for a parameter that would have to change the answer and cannot."""
    for name, value in body.items():
        if name in READ[endpoint] or name in NO_EFFECT or any(value == nothing for nothing in _NOTHING.get(name, ())):
            continue
        allowed = ", ".join(sorted((*READ[endpoint], *NO_EFFECT)))
        message = f"{shown(name)} is not supported here{_INSTEAD.get(name, '')}; supported are {allowed}"
        raise Refusal(400, message, param=name[:100], code="unsupported_parameter")


def _chat_prompts(body: Mapping[str, Any], asked: Asked, use: ToolUse | None) -> list[list[int]]:
    given = required(body, "messages")
    if not asked.tokens.has_template:
        raise bad("model", "this base has no chat template: ask /v1/completions")
    problems = Sentences()
    messages = check_chat_messages(given, "messages", problems)
    if problems:
        raise bad("messages", "; ".join(problems[:20]))
    try:
        return [_checked("messages", asked.tokens.prompt_ids(messages, None if use is None else use.offered))]
    except DataError as error:
        raise bad("messages", error.message) from None


def _text_prompts(body: Mapping[str, Any], asked: Asked) -> list[list[int]]:
    """Return prompts given as text or as token ids, one or many."""
    given = required(body, "prompt")
    items = [given] if isinstance(given, str) else as_list(given)
    if items and all(_is_id(item) for item in items):
        items = [items]
    if not items or len(items) > MAX_PROMPTS:
        raise bad("prompt", f"prompt must be a text, token ids, or a list of up to {MAX_PROMPTS} of either, got {type_name(given)}")
    return [_checked("prompt", _ids_of(item, asked.tokens)) for item in items]


def _ids_of(item: Any, tokens: Tokens) -> list[int]:
    if isinstance(item, str):
        try:
            return tokens.encode(item)
        except DataError as error:
            raise bad("prompt", error.message) from None
    ids = as_list(item)
    if ids is None or not all(_is_id(one) and one < tokens.vocab_size for one in ids):
        raise bad("prompt", f"prompt holds {type_name(item)}: each must be a text, or token ids from 0 to {tokens.vocab_size - 1}")
    return ids


def _is_id(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool) and item >= 0


def _checked(name: str, ids: list[int]) -> list[int]:
    if not ids:
        raise bad(name, f"{name} is empty: nothing would predict the first token")
    return ids


def _limits(body: Mapping[str, Any], endpoint: Endpoint, prompts: Sequence[list[int]], longest: int, echo: bool) -> list[int]:
    if echo and body.get("max_tokens", DEFAULT_COMPLETION_TOKENS) == 0:
        for ids in prompts:
            if len(ids) > longest:
                raise bad("prompt", f"the context takes {longest} tokens, the prompt has {len(ids)}", "context_length_exceeded")
        return [0] * len(prompts)  # the prompt alone is to be scored
    return token_limits(body, endpoint, prompts, longest)


def _chat_logprobs(body: Mapping[str, Any]) -> int | None:
    top = whole(body, "top_logprobs", 0, 0, MAX_TOP_LOGPROBS)
    if not flag(body, "logprobs"):
        if top:
            raise bad("top_logprobs", "top_logprobs needs logprobs: true")
        return None
    return top


def _legacy_logprobs(body: Mapping[str, Any]) -> int | None:
    given = body.get("logprobs")
    return None if given is None or given is False else whole(body, "logprobs", 0, 0, MAX_LEGACY_LOGPROBS)


def _biases(body: Mapping[str, Any], vocab_size: int) -> tuple[tuple[int, float], ...]:
    name, given = "logit_bias", as_object(body.get("logit_bias", {}))
    if given is None or len(given) > MAX_BIASES:
        raise bad(name, f"logit_bias must be an object of at most {MAX_BIASES} token ids and numbers")
    biases: list[tuple[int, float]] = []
    for key in given:
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise bad(name, f"logit_bias names {shown(key)}: a token id is a number from 0 to {vocab_size - 1}")
        value = given[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
            raise bad(name, f"logit_bias of {key} must be a number from -100 to 100, got {shown(value)}")
        biases.append((int(key), float(value)))
    return tuple(biases)
