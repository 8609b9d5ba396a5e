"""The one thread that owns the model: it takes jobs in their order and tells each one's listener what it writes.

A job is cancelled by setting a flag that is looked at with every token, so that a closed connection costs no more than one.
Next: `app.py` (who queues jobs), `model/generate.py` (who answers).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from kivnun.data.template import ChatTokenizer, StreamDecoder
from kivnun.serve.stop_text import StopText
from kivnun.serve.wire import Request
from kivnun.train.engine import FixedModel

__all__ = ["Busy", "Ended", "Failed", "Job", "Piece", "Said", "StopText", "Worker"]

WAITING = 64  # jobs; more are told to come back


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that a choice goes on with."""

    choice: int
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """Every choice has ended: why each did, and the tokens of all."""

    reasons: list[str]
    tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The job came to nothing."""

    error: BaseException


Said = Piece | Ended | Failed


@dataclass(slots=True)
class Job:
    """A request, who hears of it, and whether anybody still wants it. `tell` is called in the worker's thread."""

    request: Request
    tell: Callable[[Said], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class Busy(Exception):
    """Too many jobs wait."""


class _Cancelled(Exception):
    """Ends a generation that nobody waits for."""


class _Choice:
    """One answer while it is written."""

    def __init__(self, number: int, job: Job, decoder: StreamDecoder, limit: int) -> None:
        self._number, self._job, self._decoder, self._limit = number, job, decoder, limit
        self._text = StopText(job.request.stop)
        self._tokens = 0

    def token(self, token: int) -> bool:
        """Take a token; return whether the answer ends with it."""
        self._tokens += 1
        self._say(self._text.push(self._decoder.push(token)))
        return self._text.ended or self._tokens == self._limit

    def finish(self) -> str:
        """Say the rest and return why the answer ended."""
        self._say(self._text.finish(self._decoder.finish()))
        return "length" if self._tokens == self._limit and not self._text.ended else "stop"

    def _say(self, text: str) -> None:
        if text:
            self._job.tell(Piece(self._number, text))


class Worker:
    """Owns the models, which `load` gives by "tuned" and "base", in a thread of its own from their loading on."""

    def __init__(self, load: Callable[[], dict[str, FixedModel]], tokenizer: ChatTokenizer) -> None:
        self._load, self._tokenizer = load, tokenizer
        self._jobs: queue.Queue[Job | None] = queue.Queue(WAITING)
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._current: Job | None = None
        self._thread = threading.Thread(target=self._work, name="kivnun-model", daemon=True)

    def start(self) -> None:
        """Load the models; return when they are there. Raises what loading raised."""
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def alive(self) -> bool:
        return self._ready.is_set() and self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Busy where too many wait."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise Busy from None

    def stop(self) -> None:
        """Cancel what is being written and what waits, and end the thread."""
        while True:
            try:
                waiting = self._jobs.get_nowait()
            except queue.Empty:
                break
            if waiting is not None:
                waiting.cancelled.set()
        current = self._current
        if current is not None:
            current.cancelled.set()
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        try:
            models = self._load()
        except BaseException as error:  # told to who started the worker
            self._failure = error
            return
        finally:
            self._ready.set()
        while (job := self._jobs.get()) is not None:
            self._current = job
            try:
                if not job.cancelled.is_set():
                    self._answer(models[job.request.which], job)
            except _Cancelled:
                pass
            except Exception as error:
                job.tell(Failed(error))
            self._current = None

    def _answer(self, model: FixedModel, job: Job) -> None:
        request = job.request
        prompts = [ids for ids in request.prompts for _ in range(request.n)]
        limits = [limit for limit in request.limits for _ in range(request.n)]
        choices = [_Choice(number, job, self._tokenizer.stream_decoder(), limit) for number, limit in enumerate(limits)]

        def hear(place: int, token: int) -> bool:
            if job.cancelled.is_set():
                raise _Cancelled
            return choices[place].token(token)

        streams = [number % request.n for number in range(len(prompts))]
        written = model.sample(prompts, request.params, hear, streams)
        reasons = [choice.finish() for choice in choices]
        if not job.cancelled.is_set():
            job.tell(Ended(reasons, sum(map(len, written))))
