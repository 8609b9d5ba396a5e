"""Continuous batching: one base, rows that join and leave between two tokens, rows of different adapters in flight at once.

Each step gives every row in flight one token: a pass per adapter, with the adapter lent to the base for that pass alone, so that
what a row says is, to the bit, what it says alone (`model/generate.py`). New rows are admitted before a step, a bounded number of
prompt tokens at a time, from the tenant that has the fewest rows in flight. Adapters are loaded and grammars read by threads of
their own, so that nobody waits for another tenant's disk. Next: `loading.py`, `writing.py` (text), `adapters.py`, `listening.py`
(who asks).
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from kivnun.errors import DataError, KivnunError
from kivnun.model.adapters import Adapter
from kivnun.model.attention import KVCache
from kivnun.model.generate import Row, decode_step, likeliest, new_row, prefill, prompt_log_probs, take_next
from kivnun.model.load import Base
from kivnun.model.sampling import LIKELY_TOKENS, ROWS_AT_ONCE
from kivnun.model.sites import Site
from kivnun.serve.adapters import AdapterCache
from kivnun.serve.base_tokens import BaseTokens
from kivnun.serve.listening import Tell
from kivnun.serve.loading import Loading
from kivnun.serve.masks import GrammarForm
from kivnun.serve.protocol import Ask, Begun, Done, Failed, Piece, TokenLogprobs
from kivnun.serve.writing import Writing

logger = logging.getLogger(__name__)

DIED = 70  # the exit status of a worker whose model cannot go on


@dataclass(frozen=True, slots=True)
class Capacity:
    """What is taken on at once. `held_tokens` bounds the cache: of each row its prompt and what it is likely to write."""

    rows: int = ROWS_AT_ONCE
    prefill_tokens: int = 2048  # admitted before a step; one longer row is admitted by itself
    held_tokens: int = 1 << 18
    waiting: int = 512
    waiting_of_tenant: int = 128


@dataclass(slots=True, eq=False)
class _Job:
    question: Ask
    tell: Tell
    sites: Mapping[str, Site] = field(default_factory=dict[str, Site])
    choices: list[_Choice] = field(default_factory=list["_Choice"])
    cancelled: bool = False
    begun: bool = False
    closed: bool = False
    scored: list[list[TokenLogprobs]] = field(default_factory=list[list[TokenLogprobs]])  # prompts whose tokens are to be told
    taken: bool = False  # whether an adapter is to be given back
    form: GrammarForm | None = None
    failure: Exception | None = None  # of loading its adapter, or of reading its grammar

    @property
    def adapter(self) -> str | None:
        return None if self.question.adapter is None else self.question.adapter.content_hash


@dataclass(slots=True, eq=False)
class _Choice:
    job: _Job
    place: int
    row: Row
    writing: Writing

    @property
    def held(self) -> int:
        return self.row.prompt_length + min(self.row.params.max_new_tokens, LIKELY_TOKENS)

    @property
    def reason(self) -> Literal["stop", "length"]:
        return "stop" if self.row.ended or self.writing.stopped else "length"


class Scheduler:
    """Answers questions on a loaded base. `ask` and `close` may be called from any thread."""

    def __init__(
        self,
        name: str,
        version: str,
        base: Base,
        tokens: BaseTokens,
        adapters: AdapterCache[Adapter],
        capacity: Capacity | None = None,
        die: Callable[[], None] = lambda: os._exit(DIED),
    ) -> None:
        """`die` ends the process where the model's thread cannot go on: a worker that takes questions and answers none is worse
        than none, and another one is started."""
        self.base, self.version = name, version
        self._die = die
        self._base, self._tokens, self._adapters = base, tokens, adapters
        self._capacity = capacity or Capacity()
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._loading = Loading(self._load)
        self._waiting: OrderedDict[str, deque[_Choice]] = OrderedDict()
        self._to_score: deque[_Job] = deque()
        self._active: list[_Choice] = []
        self._cache = KVCache()
        self._slots = itertools.count()
        self._open: dict[str, int] = {}  # questions that have not ended, by tenant
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="kivnun-model", daemon=True)
        self._thread.start()

    def ask(self, question: Ask, tell: Tell) -> Callable[[], None]:
        job = _Job(question, tell)
        with self._lock:
            mine = self._open.get(question.tenant, 0)
            busy = sum(self._open.values()) >= self._capacity.waiting or mine >= self._capacity.waiting_of_tenant
            if not busy:
                self._open[question.tenant] = mine + 1
        if busy:
            tell(Failed(id=question.id, code="busy", message="too many answers wait"))
            return lambda: None
        self._route(job)

        def cancel() -> None:
            job.cancelled = True  # looked at before the next token

        return cancel

    def close(self) -> None:
        for job in self._loading.close():
            job.failure = KivnunError("the worker ends", hint="ask again")
            self._inbox.put(job)
        self._inbox.put(None)
        self._thread.join()

    @property
    def rows(self) -> int:
        """Return how many rows are in flight."""
        return len(self._active)

    @property
    def questions(self) -> int:
        """Return how many questions have not ended."""
        return sum(self._open.values())

    def _route(self, job: _Job) -> None:
        """Hand a question on: at once where all that it needs is in memory, so that it waits for nobody's disk."""
        adapter = job.question.adapter
        held = None if adapter is None else self._adapters.take_held(adapter.content_hash)
        if held is not None:
            job.sites, job.taken = held.sites, True
        is_ready = (adapter is None or held is not None) and job.question.grammar is None
        if is_ready:
            self._inbox.put(job)
        else:
            self._loading.put(job.question.tenant, job)

    # --- adapters ------------------------------------------------------------------------------------------------------------

    def _load(self, job: _Job) -> None:
        """Have what a question needs, and hand it on; in a thread of `Loading`."""
        question = job.question
        try:
            if question.adapter is not None and not job.taken and not job.cancelled:
                job.sites = self._adapters.take(question.tenant, question.adapter).sites
                job.taken = True
            if question.grammar is not None and not job.cancelled:
                job.form = GrammarForm.of(self._tokens.spelling, question.grammar)
        except Exception as error:
            job.failure = error
        self._inbox.put(job)

    # --- the loop ------------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            with torch.no_grad():
                while self._receive():
                    self._step()
        except BaseException as error:
            logger.critical("the model's thread has failed", exc_info=error, extra={"action": "answerer_failed", "base": self.base})
            self._die()

    def _step(self) -> None:
        """Give every row a token; before that let those in that fit, and score one prompt."""
        self._drop_cancelled()
        self._score_one()
        new = self._admitted()
        self._pass(new, lambda rows: prefill(self._base, self._cache, rows))
        old = [choice for choice in self._active if choice not in new]
        self._pass(old, lambda rows: decode_step(self._base, self._cache, rows))

    def _receive(self) -> bool:
        """Take in what was asked; wait where there is nothing else to do. Return False at the end."""
        idle = not self._active and not self._waiting and not self._to_score
        while True:
            try:
                job = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if job is None:
                self._give_up()
                return False
            self._take_on(job)
            idle = False

    def _take_on(self, job: _Job) -> None:
        question = job.question
        if job.failure is not None:
            self._fail(job, job.failure)
            return
        for place in range(len(question.prompts) * question.n):
            at = place // question.n
            form = None if job.form is None else job.form.copy()
            row = new_row(next(self._slots), question.prompts[at], question.params(at), place % question.n, form)
            writing = Writing(self._tokens.chat.tokens, tuple(question.stop), tuple(question.spelt))
            job.choices.append(_Choice(job, place, row, writing))
        if question.prompt_logprobs:
            self._to_score.append(job)
        else:
            self._wait(job)

    def _wait(self, job: _Job) -> None:
        self._waiting.setdefault(job.question.tenant, deque()).extend(job.choices)

    def _score_one(self) -> None:
        """Score one prompt of the question whose turn it is, so that nobody waits for more than that between two tokens."""
        if not self._to_score:
            return
        job = self._to_score.popleft()
        try:
            job.scored.append(self._scored(job, job.question.prompts[len(job.scored)]))
        except Exception as error:
            self._fail(job, error)
            return
        if len(job.scored) < len(job.question.prompts):
            self._to_score.append(job)
        else:
            self._wait(job)

    def _admitted(self) -> list[_Choice]:
        """Admit rows that wait, and begin their answers."""
        new: list[_Choice] = []
        tokens = 0
        held = sum(choice.held for choice in self._active)
        while self._waiting and len(self._active) < self._capacity.rows:
            flying = dict.fromkeys(self._waiting, 0)
            for choice in self._active:
                tenant = choice.job.question.tenant
                flying[tenant] = flying.get(tenant, 0) + 1
            tenant = min(self._waiting, key=lambda name: flying[name])  # the first of equals has waited longest
            choice = self._waiting[tenant][0]
            length = choice.row.prompt_length
            if (new and tokens + length > self._capacity.prefill_tokens) or (
                self._active and held + choice.held > self._capacity.held_tokens
            ):
                break
            self._waiting[tenant].popleft()
            self._waiting.move_to_end(tenant)
            if not self._waiting[tenant]:
                del self._waiting[tenant]
            if self._begins(choice):
                self._active.append(choice)
                new.append(choice)
                tokens, held = tokens + length, held + choice.held
        return new

    def _begins(self, choice: _Choice) -> bool:
        """Tell that an answer begins; return whether this row of it is to be written."""
        job, question = choice.job, choice.job.question
        if job.cancelled:
            self._end_all(job)
        if choice.row.done:
            return False
        if not job.begun:
            job.begun = True
            job.tell(Begun(id=question.id, adapter=job.adapter, prompt_logprobs=job.scored or None))
            job.scored = []
        if choice.row.params.max_new_tokens == 0:
            self._end(choice)
            return False
        return True

    def _scored(self, job: _Job, prompt: Sequence[int]) -> list[TokenLogprobs]:
        with self._base.using(job.sites):
            scores = prompt_log_probs(self._base, prompt, job.question.logprobs or 0)
        first: TokenLogprobs = (prompt[0], None, [])
        return [first, *((token, logprob, top) for token, (logprob, top) in zip(prompt[1:], scores, strict=True))]

    def _pass(self, choices: Iterable[_Choice], compute: Callable[[list[Row]], Tensor]) -> None:
        """Give each of these rows a token, those of one adapter together."""
        groups: dict[str | None, list[_Choice]] = {}
        for choice in choices:
            if not choice.row.done:
                groups.setdefault(choice.job.adapter, []).append(choice)
        for group in groups.values():
            try:
                with self._base.using(group[0].job.sites):
                    logits_NV = compute([choice.row for choice in group])
            except Exception as error:
                for choice in group:
                    self._fail(choice.job, error)
            else:
                for choice, logits_V in zip(group, logits_NV, strict=True):
                    self._write(choice, logits_V)
        self._active = [choice for choice in self._active if not choice.row.done]

    def _write(self, choice: _Choice, logits_V: Tensor) -> None:
        row, job = choice.row, choice.job
        if job.cancelled or row.done:  # the question has failed by another of its rows
            return
        try:
            token = take_next(row, logits_V)
            if token is not None:
                count = job.question.logprobs
                logprobs = None if count is None else (token, *likeliest(logits_V, token, count))
                self._tell_piece(choice, *choice.writing.token(token, logprobs))
        except Exception as error:  # of this answer alone; the others go on
            self._fail(job, error)
            return
        if row.done or choice.writing.stopped:
            self._end(choice)

    def _end(self, choice: _Choice) -> None:
        job = choice.job
        self._tell_piece(choice, *choice.writing.finish())
        self._drop(choice)
        if all(one.row.done for one in job.choices):
            reasons: list[Literal["stop", "length"]] = [one.reason for one in job.choices]
            job.tell(
                Done(id=job.question.id, reasons=reasons, tokens=[one.writing.count for one in job.choices], adapter=job.adapter)
            )
            self._close(job)

    def _tell_piece(self, choice: _Choice, text: str, tokens: list[TokenLogprobs]) -> None:
        if text or tokens:
            choice.job.tell(
                Piece(id=choice.job.question.id, choice=choice.place, text=text, tokens=tokens, written=choice.writing.count)
            )

    # --- ends ----------------------------------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        gone = {choice.job for choice in self._active if choice.job.cancelled} | {job for job in self._to_score if job.cancelled}
        self._to_score = deque(job for job in self._to_score if not job.cancelled)
        for tenant, waiting in list(self._waiting.items()):
            gone |= {choice.job for choice in waiting if choice.job.cancelled}
            kept = deque(choice for choice in waiting if not choice.job.cancelled and not choice.row.done)
            if kept:
                self._waiting[tenant] = kept
            else:
                del self._waiting[tenant]
        for job in gone:
            self._end_all(job)

    def _fail(self, job: _Job, error: Exception) -> None:
        """End a question without an answer. What a caller may know is told; the rest is in the log, without contents."""
        if job.cancelled:
            self._end_all(job)
            return
        invalid = isinstance(error, DataError)
        if not invalid:
            logger.error("an answer failed", exc_info=error, extra={"action": "answer_failed"})
        message = error.message if isinstance(error, KivnunError) else type(error).__name__
        job.tell(Failed(id=job.question.id, code="invalid" if invalid else "broken", message=message))
        job.cancelled = True
        self._end_all(job)

    def _end_all(self, job: _Job) -> None:
        for choice in job.choices:
            self._drop(choice)
        self._active = [choice for choice in self._active if choice.job is not job]
        self._close(job)

    def _drop(self, choice: _Choice) -> None:
        choice.row.done = True
        self._cache.drop(choice.row.slot)

    def _close(self, job: _Job) -> None:
        if job.closed:
            return
        job.closed = True
        with self._lock:
            left = self._open.get(job.question.tenant, 1) - 1
            self._open[job.question.tenant] = left
            if not left:
                del self._open[job.question.tenant]
        if job.taken:
            job.taken = False
            self._adapters.give_back(job.adapter or "")

    def _give_up(self) -> None:
        jobs = {choice.job for choice in self._active} | {choice.job for waiting in self._waiting.values() for choice in waiting}
        jobs |= {*self._to_score}
        for job in jobs:
            self._fail(job, KivnunError("the worker ends", hint="ask again"))
