"""What the API and an inference worker say to each other: one JSON object a line, many questions on one connection.

The caller shows the worker's secret first (`Hello`), the worker names what it has loaded (`Welcome`); then the caller asks and
cancels, and the worker answers each question with `Begun`, `Piece`s and `Done`, or with `Failed`. Every message is checked when it
is read, and none is longer than MAX_MESSAGE_BYTES: neither side trusts the other to be sane. Token ids alone are sent, since the
API has the base's tokenizer. Next: `listening.py` (the worker's side), `kivnun/service/answers.py` (the API's).
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from kivnun.errors import IntegrityError
from kivnun.model.sampling import ROWS_AT_ONCE, SamplingParams

T = TypeVar("T")

MAX_MESSAGE_BYTES = 32 << 20
MAX_PROMPTS = 64
MAX_TOP_LOGPROBS = 20

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Message(BaseModel):
    """A line. Read strictly: an unknown field or a wrong type is no message."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class AdapterName(Message):
    """An adapter as the records name it: the blob that lists its files, and the hash of all of them."""

    manifest: str = Field(max_length=200)
    content_hash: Hash


class Hello(Message):
    """The caller's first line."""

    type: Literal["hello"] = "hello"
    secret: str = Field(max_length=200)


class Welcome(Message):
    """The worker's first line. `version` names the base's weights and the code: a seed holds for it alone."""

    type: Literal["welcome"] = "welcome"
    base: str
    version: str


class Ask(Message):
    """A question: each prompt is answered `n` times. Answer i goes on from `prompts[i // n]` and draws stream i % n, so that it
    does not depend on the other prompts. `id` is the caller's, for this connection.

    With `logprobs` each token comes with its log-probability, and with that many of the likeliest; with `prompt_logprobs` the
    prompts' tokens too. `grammar` holds answers to a form (llguidance). `spelt` are special tokens that are shown as text.
    """

    type: Literal["ask"] = "ask"
    id: int
    tenant: str = Field(max_length=64)
    adapter: AdapterName | None
    prompts: list[list[TokenId]] = Field(min_length=1, max_length=MAX_PROMPTS)
    limits: list[Annotated[int, Field(ge=0)]]
    n: int = Field(ge=1, le=ROWS_AT_ONCE)
    stop_ids: list[TokenId]
    stop: list[str] = Field(max_length=4)
    temperature: float = Field(ge=0, le=2)
    top_p: float = Field(ge=0, le=1)  # 0: the likeliest alone
    seed: int
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: list[tuple[TokenId, float]] = Field(default_factory=list[tuple[int, float]], max_length=1024)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    prompt_logprobs: bool = False
    grammar: str | None = None
    spelt: list[TokenId] = Field(default_factory=list[int])

    def params(self, prompt: int) -> SamplingParams:
        """Return how to write the answers to a prompt."""
        return SamplingParams(
            self.limits[prompt], tuple(self.stop_ids), self.temperature, self.top_p, self.seed,
            self.presence_penalty, self.frequency_penalty, tuple(self.logit_bias),
        )  # fmt: skip


class Cancel(Message):
    """Nobody waits for this answer any more."""

    type: Literal["cancel"] = "cancel"
    id: int


TokenLogprobs: TypeAlias = tuple[TokenId, float | None, list[tuple[TokenId, float]]]
"""A token, its log-probability in nats (None: nothing came before it), and the likeliest tokens there with theirs."""


class Begun(Message):
    """An answer begins: with this adapter (its content hash; None: the base), and with the prompts' log-probabilities if asked."""

    type: Literal["begun"] = "begun"
    id: int
    adapter: Hash | None
    prompt_logprobs: list[list[TokenLogprobs]] | None = None


class Piece(Message):
    """What a choice goes on with: text, and the tokens that it is made of where log-probabilities are asked for. `written` counts
    all its tokens so far."""

    type: Literal["piece"] = "piece"
    id: int
    choice: int
    text: str
    written: int
    tokens: list[TokenLogprobs] = Field(default_factory=list[TokenLogprobs])


class Done(Message):
    """Every choice has ended: why each did, the tokens of each, and the adapter they were written with."""

    type: Literal["done"] = "done"
    id: int
    reasons: list[Literal["stop", "length"]]
    tokens: list[int]
    adapter: Hash | None


class Failed(Message):
    """No answer, or no more of it. `busy`: too many wait; `invalid`: the question cannot be answered; `broken`: see the worker's
    log."""

    type: Literal["failed"] = "failed"
    id: int
    code: Literal["busy", "invalid", "broken"]
    message: str


FromCaller: TypeAlias = Hello | Ask | Cancel
FromWorker: TypeAlias = Welcome | Begun | Piece | Done | Failed
_FROM_CALLER: TypeAdapter[FromCaller] = TypeAdapter(Annotated[FromCaller, Field(discriminator="type")])
_FROM_WORKER: TypeAdapter[FromWorker] = TypeAdapter(Annotated[FromWorker, Field(discriminator="type")])


def line(message: Message) -> bytes:
    """Return a message as it is sent."""
    return message.model_dump_json().encode() + b"\n"


def from_caller(raw: bytes) -> FromCaller:
    """Return what a caller says. Raises IntegrityError for what is no message."""
    return _read(_FROM_CALLER, raw)


def from_worker(raw: bytes) -> FromWorker:
    """Return what a worker says. Raises IntegrityError for what is no message."""
    return _read(_FROM_WORKER, raw)


def _read(kind: TypeAdapter[T], raw: bytes) -> T:
    try:
        return kind.validate_json(raw)
    except ValidationError as error:
        where = ".".join(map(str, error.errors(include_input=False)[0]["loc"]))
        hint = "the API and its workers must be of one version"
        raise IntegrityError(
            f"a message between the API and a worker cannot be read, at {where or 'its start'}", hint=hint
        ) from None
