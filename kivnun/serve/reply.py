"""What a client is told: whole answers and chunks in OpenAI's shape, with log-probabilities and calls of functions.

Made from what a worker said, whichever way it went; the same text streamed and whole. Next: `question.py`, `tools.py`.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kivnun.serve.protocol import TokenLogprobs
from kivnun.serve.question import Question, Tokens
from kivnun.serve.tools import Call, calls_in, may_become_call

LEAST = -9999.0  # what stands for the logarithm of nothing


@dataclass(frozen=True, slots=True)
class Head:
    """What all parts of one answer have in common. `extra` are `x_...` fields."""

    id: str
    created: int
    question: Question
    tokens: Tokens
    fingerprint: str
    extra: dict[str, Any]

    @property
    def chat(self) -> bool:
        return self.question.endpoint == "chat.completion"

    def common(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.question.model,
            "system_fingerprint": self.fingerprint, **self.extra,
        }  # fmt: skip

    def usage(self, completion_tokens: int) -> dict[str, Any]:
        prompt = self.question.prompt_tokens
        return {
            "prompt_tokens": prompt, "completion_tokens": completion_tokens, "total_tokens": prompt + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        }  # fmt: skip


def new_id(endpoint: str) -> str:
    """Return a new answer's id."""
    return ("chatcmpl-" if endpoint == "chat.completion" else "cmpl-") + secrets.token_hex(12)


@dataclass(slots=True)
class Choice:
    """One answer as far as it is written."""

    text: str = ""
    tokens: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    reason: str = ""

    @property
    def likelihood(self) -> float:
        """Return the mean log-probability of a token: by which the best of several answers is chosen."""
        return sum(logprob or 0.0 for _, logprob, _ in self.tokens) / max(len(self.tokens), 1)


def whole(
    head: Head, choices: Sequence[Choice], completion_tokens: int, prompts: Sequence[Sequence[TokenLogprobs]] | None
) -> dict[str, Any]:
    """Return the body of an answer that is not streamed. `choices` holds `best_of` to each prompt, `prompts` the log-probabilities
    of the prompts' tokens where they are echoed with them."""
    question = head.question
    shown = [_chat_choice(head, index, choice) if head.chat else _text_choice(head, index, choice, prompts)
             for index, choice in enumerate(_best(question, choices))]  # fmt: skip
    return {**head.common(question.endpoint), "choices": shown, "usage": head.usage(completion_tokens)}


def _best(question: Question, choices: Sequence[Choice]) -> list[Choice]:
    if question.best_of == question.n:
        return list(choices)
    groups = [choices[at : at + question.best_of] for at in range(0, len(choices), question.best_of)]
    return [choice for group in groups for choice in sorted(group, key=lambda one: -one.likelihood)[: question.n]]


def _chat_choice(head: Head, index: int, choice: Choice) -> dict[str, Any]:
    use = head.question.tools
    text, calls = (choice.text, []) if use is None else calls_in(choice.text, use)
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    return {
        "index": index, "message": message, "logprobs": _chat_logprobs(head, choice.tokens),
        "finish_reason": "tool_calls" if calls and choice.reason == "stop" else choice.reason,
    }  # fmt: skip


def _call(call: Call) -> dict[str, Any]:
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _text_choice(head: Head, index: int, choice: Choice, prompts: Sequence[Sequence[TokenLogprobs]] | None) -> dict[str, Any]:
    question = head.question
    asked = index // question.n
    before = _text_of(head.tokens, question.prompts[asked]) if question.echo else ""
    tokens = [*(prompts[asked] if prompts is not None else ()), *choice.tokens]
    start = 0 if prompts is not None else len(before)
    return {
        "index": index, "text": before + choice.text, "logprobs": _legacy_logprobs(head, tokens, start),
        "finish_reason": choice.reason,
    }  # fmt: skip


# --- streams -----------------------------------------------------------------------------------------------------------------


class Stream:
    """An answer chunk by chunk. Text that may become a call of a function is held back until that is known."""

    def __init__(self, head: Head, prompts: Sequence[Sequence[TokenLogprobs]] | None) -> None:
        self._head, self._prompts = head, prompts
        self._held = [Choice() for _ in range(head.question.choices)]
        self._shown = [0] * head.question.choices  # letters: offsets, and whether there was text

    def opening(self) -> Iterator[dict[str, Any]]:
        """Yield what comes before any text: who speaks, or the prompt where it is echoed."""
        question = self._head.question
        for index in range(question.choices):
            if self._head.chat:
                yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None}, "", None)
            elif question.echo:
                text = _text_of(self._head.tokens, question.prompts[index // question.n])
                tokens = [] if self._prompts is None else self._prompts[index // question.n]
                yield self._chunk(index, {}, text, _legacy_logprobs(self._head, tokens, 0))
                self._shown[index] = len(text)

    def piece(self, index: int, text: str, tokens: Sequence[TokenLogprobs]) -> Iterator[dict[str, Any]]:
        """Yield what a choice's next text shows."""
        held, use = self._held[index], self._head.question.tools
        held.text += text
        held.tokens += tokens
        if use is not None and (use.grammar is not None or may_become_call(held.text, not self._shown[index])):
            return
        yield from self._release(index)

    def end(self, index: int, reason: str) -> Iterator[dict[str, Any]]:
        """Yield the rest of a choice and why it ended."""
        held, use = self._held[index], self._head.question.tools
        text, calls = (held.text, []) if use is None else calls_in(held.text, use, not self._shown[index])
        if calls:
            held.text = text
        yield from self._release(index)
        for number, call in enumerate(calls):
            yield self._chunk(index, {"tool_calls": [{"index": number, **_call(call)}]}, "", None)
        yield self._chunk(index, {}, "", None, "tool_calls" if calls and reason == "stop" else reason)

    def counts(self, completion_tokens: int) -> dict[str, Any]:
        """Return the chunk that holds the usage and no choice."""
        return {**self._head.common(self._kind), "choices": [], "usage": self._head.usage(completion_tokens)}

    def _release(self, index: int) -> Iterator[dict[str, Any]]:
        held = self._held[index]
        if held.text or held.tokens:
            head = self._head
            logprobs = _chat_logprobs(head, held.tokens) if head.chat else _legacy_logprobs(head, held.tokens, self._shown[index])
            yield self._chunk(index, {"content": held.text}, held.text, logprobs)
            self._shown[index] += len(held.text)
        self._held[index] = Choice()

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._head.chat else "text_completion"

    def _chunk(self, index: int, delta: dict[str, Any], text: str, logprobs: Any, reason: str | None = None) -> dict[str, Any]:
        said = {"delta": delta} if self._head.chat else {"text": text}
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self._head.question.include_usage else {}
        return {**self._head.common(self._kind), "choices": [choice], **usage}


# --- log-probabilities -------------------------------------------------------------------------------------------------------


def _text_of(tokens: Tokens, ids: Sequence[int]) -> str:
    return b"".join(map(tokens.bytes_of, ids)).decode("utf-8", "replace")


def _spelt(tokens: Tokens, token: int) -> str:
    return tokens.bytes_of(token).decode("utf-8", "replace")


def _number(logprob: float | None) -> float:
    return LEAST if logprob is None else max(logprob, LEAST)


def _chat_logprobs(head: Head, tokens: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
    if head.question.logprobs is None:
        return None
    return {
        "content": [
            {**_entry(head, token, logprob), "top_logprobs": [_entry(head, other, said) for other, said in top]}
            for token, logprob, top in tokens
        ],
        "refusal": None,
    }


def _entry(head: Head, token: int, logprob: float | None) -> dict[str, Any]:
    spelt = head.tokens.bytes_of(token)
    return {"token": spelt.decode("utf-8", "replace"), "logprob": _number(logprob), "bytes": list(spelt)}


def _legacy_logprobs(head: Head, tokens: Sequence[TokenLogprobs], start: int) -> dict[str, Any] | None:
    if head.question.logprobs is None:
        return None
    spelt = [_spelt(head.tokens, token) for token, _, _ in tokens]
    offsets, at = [], start
    for text in spelt:
        offsets.append(at)
        at += len(text)
    tops = [
        None if logprob is None else {_spelt(head.tokens, other): _number(said) for other, said in [*top, (token, logprob)]}
        for token, logprob, top in tokens
    ]
    logprobs = [None if logprob is None else _number(logprob) for _, logprob, _ in tokens]
    return {"tokens": spelt, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}
