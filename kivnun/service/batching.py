"""The duty that runs batches: many questions of a file, answered whenever there is room, each answer recorded once.

A batch goes through validating -> in_progress -> finalizing -> completed. Its file is read line by line; a bounded number of lines
is being answered at any time, of each tenant no more than its share; what a crash cuts off is asked again, and nothing else is.
A line that is refused ends in the error file; answers of "later" (429, 503) are waited out. Next: `kivnun/jobs/batches.py`,
`batch_files.py` (what is read and written), `answering.py`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kivnun.artifacts import storage_errors
from kivnun.errors import IntegrityError, StorageError
from kivnun.jobs import batches, files, tenants
from kivnun.jobs.batches import Batch, Ending, LineAnswer
from kivnun.jobs.errors import DatabaseDown, StaleLease, StoreDown
from kivnun.jobs.files import File
from kivnun.jobs.usage import Charge
from kivnun.service.batch_files import Request, Written, answer_line, asked_at, requests_of, validated, write_answers
from kivnun.service.context import Service
from kivnun.service.errors import ApiError
from kivnun.service.settled import SettledClock, since_boot

logger = logging.getLogger(__name__)

AT_ONCE = 32  # lines being answered, of all batches
AT_ONCE_A_TENANT = 16
OPEN_AT_ONCE = 32  # batches whose files are kept in the scratch folder; one of a tenant
DESKS = 2  # batches being validated, opened or closed
RECORDED_AT_ONCE = 200
WAIT_S = 0.05  # for an answer, before looking around again
LINE_TIMEOUT_S = 600.0
CUT_OFF_S = 5.0  # for what is under way to notice that it is cut off
TRIES = 4  # of a line that fails for no reason of its own, and in a row of a batch that cannot be handled
FIRST_DELAY_S, LAST_DELAY_S = 0.5, 30.0


class Answers(Protocol):
    """Answers questions, as `answering.Answering` does."""

    async def complete(self, tenant: str, key_id: str, endpoint: str, body: dict[str, Any]) -> tuple[dict[str, Any], Charge]:
        """Return the body of the answer to a batch's endpoint as it was named, which tells the dialect, and what it used, which is
        charged with the record of the answer. Raises ApiError."""
        ...


@dataclass(slots=True)
class _Asked:
    """A line on its way to an answer, and how often it failed for no reason of its own."""

    request: Request
    failures: int = 0


@dataclass(slots=True)
class _Run:
    """A batch whose lines are being answered."""

    batch: Batch
    share: int  # of its lines, being answered at once
    path: Path
    lines: Iterator[Request]
    again: list[_Asked] = field(default_factory=list[_Asked])
    going: dict[int, Future[None]] = field(default_factory=lambda: dict[int, "Future[None]"]())
    at_end: bool = False
    paused_until: float = 0.0
    pauses: int = 0

    def take(self, now: float) -> _Asked | None:
        """Return the next line to ask; None where there is none at this moment."""
        if now < self.paused_until or len(self.going) >= self.share:
            return None
        if self.again:
            return self.again.pop(0)
        following = None if self.at_end else next(self.lines, None)
        self.at_end = following is None
        return None if following is None else _Asked(following)

    def is_answered(self) -> bool:
        return self.at_end and not self.going and not self.again

    def pause(self, now: float, least_s: float) -> None:
        """Ask nothing for a while: whoever answers has no room. Longer each time in a row."""
        if now >= self.paused_until:
            self.paused_until = now + max(least_s, min(LAST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self.pauses, 10)))
            self.pauses += 1


@dataclass(slots=True)
class _Setback:
    """How often in a row a batch could not be handled, how often by a fault of its own, and when it is tried again."""

    failures: int = 0
    faults: int = 0
    until: float = -math.inf

    def add(self, now: float, is_fault: bool) -> None:
        self.until = now + min(LAST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self.failures, 10))
        self.failures += 1
        self.faults += is_fault


@dataclass(slots=True)
class _Outcome:
    run: _Run
    asked: _Asked
    answer: tuple[dict[str, Any], Charge] | Exception


class RunBatches:
    """Validates, answers and closes batches."""

    name = "batches"

    def __init__(self, service: Service, answering: Answers, monotonic: Callable[[], float] = since_boot) -> None:
        self._service, self._answering, self._monotonic = service, answering, monotonic
        self._time = SettledClock(service.clock, monotonic)
        self._runs: dict[str, _Run] = {}
        self._outcomes: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        self._unrecorded: list[tuple[_Run, LineAnswer]] = []
        self._desks = ThreadPoolExecutor(DESKS, "batch-desk")
        self._at_desk: dict[str, tuple[Batch, Future[_Run | None]]] = {}
        self._setbacks: dict[str, _Setback] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="batch-answers", daemon=True)
        self._thread.start()

    def turn(self) -> bool:
        """Look at every batch that has not ended, ask what there is room for, and record what was answered."""
        self._clear_desks()
        found, revoked = self._service.db.read(lambda tx: (batches.open_batches(tx), batches.of_revoked_keys(tx)))
        over = self._time.over()
        running = {batch.id for batch in found if batch.status == "in_progress" and over < batch.expires_at} - revoked
        for run in [run for run in self._runs.values() if run.batch.id not in running]:
            self._end(run)
        self._setbacks = {batch.id: self._setbacks[batch.id] for batch in found if batch.id in self._setbacks}
        for batch in found:
            self._handle(batch, over, batch.id in revoked)
        self._ask()
        recorded = self._record()
        for run in [run for run in self._runs.values() if run.is_answered()]:
            batch = run.batch
            self._service.db.write("finalize batch", lambda tx, batch=batch: batches.finalize(tx, batch, self._service.clock()))
            self._end(run)
            recorded = True
        return recorded or any(run.going for run in self._runs.values())

    def close(self) -> None:
        """End what is going on; the lines that it cuts off are asked again by the next clerk."""
        for run in list(self._runs.values()):
            self._end(run)
        self._desks.shutdown(cancel_futures=True)
        asyncio.run_coroutine_threadsafe(_cut_off(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- a batch as a whole -------------------------------------------------------------------------------------------------

    def _handle(self, batch: Batch, over: float, is_revoked: bool) -> None:
        """Do what a batch's status asks for, beside what is being answered meanwhile."""
        setback = self._setbacks.get(batch.id, _Setback())
        if self._monotonic() < setback.until or batch.id in self._at_desk or len(self._at_desk) >= DESKS:
            return
        if batch.status == "cancelling":
            self._give(batch, lambda: self._close(batch, "cancelled"))
        elif batch.status == "finalizing":
            self._give(batch, lambda: self._close(batch, "completed"))
        elif is_revoked:
            self._give(batch, lambda: self._close(batch, "cancelled", [_key_revoked(batch)]))
        elif over >= batch.expires_at:
            self._give(batch, lambda: self._close(batch, "expired"))
        elif setback.faults >= TRIES:
            self._give(batch, lambda: self._give_up(batch))
        elif batch.status == "validating":
            self._give(batch, lambda: self._validate(batch))
        elif self._has_room(batch):
            self._give(batch, lambda: self._open(batch))

    def _has_room(self, batch: Batch) -> bool:
        """Return whether a batch may be opened: one of a tenant is answered at a time."""
        held = [run.batch for run in self._runs.values()]
        held += [other for other, _ in self._at_desk.values() if other.status == "in_progress"]
        return len(held) < OPEN_AT_ONCE and all(other.tenant != batch.tenant for other in held)

    def _give(self, batch: Batch, work: Callable[[], _Run | None]) -> None:
        self._at_desk[batch.id] = batch, self._desks.submit(self._tried, batch, work)

    def _tried(self, batch: Batch, work: Callable[[], _Run | None]) -> _Run | None:
        """Do something for a batch, later where the store or the disk has no room for it now.

        What goes wrong otherwise, time and again in one batch, ends that batch, not the duty."""
        try:
            with storage_errors(self._service.scratch):
                opened = work()
        except (DatabaseDown, StaleLease):
            raise
        except (StorageError, StoreDown):
            self._set_back(batch, is_fault=False)
            logger.warning("a batch waits for the disk or the store", extra={"action": "batch_waits", "batch": batch.id})
        except Exception as error:
            told = {"action": "batch_trouble", "batch": batch.id}
            logger.error("a batch could not be handled", exc_info=error, extra=told)
            self._set_back(batch, is_fault=True)
        else:
            self._setbacks.pop(batch.id, None)
            return opened
        return None

    def _set_back(self, batch: Batch, *, is_fault: bool) -> None:
        self._setbacks.setdefault(batch.id, _Setback()).add(self._monotonic(), is_fault)

    def _give_up(self, batch: Batch) -> None:
        """End a batch that cannot go on. One that has answers, which were paid for, ends with them, as if its time were over."""
        errors = [_error("internal_error", "the batch could not be handled; the server's log says why")]
        current = self._service.db.read(lambda tx: batches.find(tx, batch.id, batch.tenant))
        if current is not None and current.completed + current.failed:
            self._close(batch, "expired", errors)
        else:
            self._fail(batch, errors)

    def _clear_desks(self) -> None:
        """Take what is done from the desks. Raises what went wrong there for no reason of one batch."""
        for batch, work in list(self._at_desk.values()):
            if work.done():
                del self._at_desk[batch.id]
                opened = work.result()
                if opened is not None:
                    self._runs[batch.id] = opened

    def _validate(self, batch: Batch) -> None:
        path = self._fetched(batch)
        if path is None:
            return
        try:
            total, model, errors = validated(path, batch.endpoint)
        finally:
            path.unlink()
        if errors:
            self._fail(batch, errors)
        else:
            now = self._service.clock()
            self._service.db.write("begin batch", lambda tx: batches.begin(tx, batch, total, model, now))

    def _open(self, batch: Batch) -> _Run | None:
        path = self._fetched(batch)
        if path is None:
            return None
        service = self._service
        try:
            done, limits = service.db.read(
                lambda tx: (
                    batches.answered(tx, batch.id),
                    tenants.limits_of(tx, batch.tenant, service.config.limits),
                )
            )
            return _Run(batch, min(AT_ONCE_A_TENANT, limits.answers_at_once), path, requests_of(path, done))
        except BaseException:
            path.unlink()
            raise

    def _end(self, run: _Run) -> None:
        """Ask nothing more of a batch; whatever is under way is cut off."""
        del self._runs[run.batch.id]
        for going in run.going.values():
            going.cancel()
        run.path.unlink(missing_ok=True)

    def _close(self, batch: Batch, ending: Ending, errors: Sequence[dict[str, Any]] = ()) -> None:
        """Write a batch's files and end it, unless something came between; then the next turn sees what."""
        service = self._service
        with self._scratch(batch, "output") as output_path, self._scratch(batch, "error") as error_path:
            written = self._written(batch, ending, output_path, error_path)
            now = service.clock()
            kept = [self._kept(batch, path, kind, now) for path, kind in ((output_path, "output"), (error_path, "error"))]
        counts, usage = (written.completed, written.failed), written.usage()
        service.db.write(
            "close batch",
            lambda tx: batches.close(tx, batch, ending, counts, kept[0], kept[1], usage, now, service.new_id, errors),
        )

    def _written(self, batch: Batch, ending: Ending, output_path: Path, error_path: Path) -> Written:
        with (
            output_path.open("wb") as output,
            error_path.open("wb") as error,
            self._unanswered(batch, ending) as requests,
        ):
            return write_answers(batch.id, self._answers(batch), requests, ending, output, error)

    def _answers(self, batch: Batch) -> Iterator[LineAnswer]:
        line = 0
        while found := self._service.db.read(lambda tx, line=line: batches.answers_after(tx, batch.id, line, RECORDED_AT_ONCE)):
            yield from found
            line = found[-1].line

    @contextmanager
    def _unanswered(self, batch: Batch, ending: Ending) -> Iterator[Iterator[Request]]:
        """Give the requests of a batch that ends early; none where all are answered, or where none was ever asked."""
        file = self._service.db.read(lambda tx: files.find(tx, batch.input_file, batch.tenant))
        if ending == "completed" or not batch.total or file is None:
            yield iter(())
            return
        try:
            path = self._copied(batch, file)
        except IntegrityError as error:  # the answers are there all the same
            told = {"action": "batch_input_lost", "batch": batch.id}
            logger.error("the input of a batch cannot be read: its unanswered lines are not listed", exc_info=error, extra=told)
            yield iter(())
            return
        try:
            yield requests_of(path)
        finally:
            path.unlink()

    def _kept(self, batch: Batch, path: Path, kind: str, now: float) -> File | None:
        """Keep a file of answers in the store; one that holds nothing is none."""
        size = path.stat().st_size
        if not size:
            return None
        service = self._service
        blob = service.blobs.put(batch.tenant, path)
        after = batch.output_expires_after
        return File(
            service.new_id("file-"), batch.tenant, now, "batch_output", f"{batch.id}_{kind}.jsonl", size, blob, "processed",
            expires_at=None if after is None else now + after,
        )  # fmt: skip

    def _fetched(self, batch: Batch) -> Path | None:
        """Return the input as a file of the scratch folder; None, and the batch has failed, where it is gone."""
        file = self._service.db.read(lambda tx: files.find(tx, batch.input_file, batch.tenant))
        if file is None:
            self._fail(batch, [_error("invalid_file", f"the input file {batch.input_file} was deleted", "input_file_id")])
            return None
        return self._copied(batch, file)

    def _copied(self, batch: Batch, file: File) -> Path:
        self._service.scratch.mkdir(parents=True, exist_ok=True)
        path = self._service.scratch / f"{self._service.new_id(batch.id + '-')}.jsonl"
        try:
            self._service.blobs.fetch(file.blob, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path

    @contextmanager
    def _scratch(self, batch: Batch, kind: str) -> Iterator[Path]:
        self._service.scratch.mkdir(parents=True, exist_ok=True)
        path = self._service.scratch / f"{batch.id}.{kind}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _fail(self, batch: Batch, errors: list[dict[str, Any]]) -> None:
        service = self._service
        service.db.write("fail batch", lambda tx: batches.fail(tx, batch, errors, service.clock(), service.new_id))

    # --- its lines ----------------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Ask lines while there is room, in turn of the batches that have the fewest being answered."""
        room = AT_ONCE - sum(len(run.going) for run in self._runs.values())
        while room > 0:
            now = self._monotonic()
            for run in sorted(self._runs.values(), key=lambda run: len(run.going)):
                asked = run.take(now)
                if asked is not None:
                    work = self._answered(run, asked)
                    run.going[asked.request.line] = asyncio.run_coroutine_threadsafe(work, self._loop)
                    room -= 1
                    break
            else:
                return

    async def _answered(self, run: _Run, asked: _Asked) -> None:
        batch = run.batch
        try:
            endpoint = asked_at(batch.endpoint, batch.dialect)
            work = self._answering.complete(batch.tenant, batch.api_key, endpoint, asked.request.body)
            answer: tuple[dict[str, Any], Charge] | Exception = await asyncio.wait_for(work, LINE_TIMEOUT_S)
        except Exception as error:
            answer = error
        self._outcomes.put(_Outcome(run, asked, answer))

    def _record(self) -> bool:
        """Record what was answered since, in one transaction for each batch; wait a moment for it where something is under way."""
        is_waiting = any(run.going for run in self._runs.values())
        while len(self._unrecorded) < RECORDED_AT_ONCE:
            try:
                outcome = self._outcomes.get(timeout=WAIT_S) if is_waiting else self._outcomes.get_nowait()
            except queue.Empty:
                break
            is_waiting = False
            outcome.run.going.pop(outcome.asked.request.line, None)
            answer = self._settled(outcome)
            if answer is not None:
                self._unrecorded.append((outcome.run, answer))
        by_batch: dict[str, tuple[Batch, list[LineAnswer]]] = {}
        for run, answer in self._unrecorded:
            by_batch.setdefault(run.batch.id, (run.batch, []))[1].append(answer)
        now = self._service.clock()
        for batch, answers in by_batch.values():
            self._service.db.write("record answers", lambda tx, b=batch, a=answers: batches.record(tx, b, a, now))
        recorded, self._unrecorded = bool(self._unrecorded), []
        return recorded

    def _settled(self, outcome: _Outcome) -> LineAnswer | None:
        """Return what a line's outcome comes to; None where it is to be asked again."""
        run, asked, answer = outcome.run, outcome.asked, outcome.answer
        request_id = self._service.new_id("req_")
        if isinstance(answer, Exception):
            error = answer if isinstance(answer, ApiError) else _as_refusal(answer)
            is_final = error.code == "insufficient_quota" or error.headers.get("x-should-retry") == "false"
            is_later = error.status in (408, 429, 503) and not is_final
            asked.failures += not is_later
            if is_later or (error.status >= 500 and asked.failures < TRIES):
                run.again.append(asked)
                run.pause(self._monotonic(), float(error.headers.get("retry-after-ms", 0)) / 1000)
                return None
            return answer_line(run.batch.id, asked.request, error, request_id, None)
        run.pauses = 0
        body, charge = answer
        return answer_line(run.batch.id, asked.request, body, request_id, charge)


async def _cut_off() -> None:
    """End every other task of this loop, connections to workers too."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=CUT_OFF_S)


def _as_refusal(error: Exception) -> ApiError:
    """Return what a failure that is no answer comes to: "later" where the service was down, else its own fault."""
    if isinstance(error, DatabaseDown | StoreDown | StaleLease | StorageError):
        return ApiError(503, error.message, code=error.code, type="server_error")
    told = {"action": "batch_line_failed"}
    logger.error("a line of a batch could not be answered", exc_info=error, extra=told)
    return ApiError(500, "the request failed; the server's log says why", code="internal_error", type="server_error")


def _key_revoked(batch: Batch) -> dict[str, Any]:
    message = f"the key {batch.api_key} that asked for this batch was revoked: what has no answer yet is not run; ask with another"
    return _error("api_key_revoked", message)


def _error(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "param": param, "line": None}
