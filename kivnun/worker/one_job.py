"""A claimed job's way through a worker: prepared, trained, told of, ended. One thread for each job.

The trainer writes its record into the work folder and knows nothing of databases; this thread reads the record, writes rows and
keeps blobs, and looks for commands with each look at the record. Next: `relay.py` (what is told), `trainer.py` (who computes).
"""

from __future__ import annotations

import contextlib
import logging
import random
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

from kivnun.artifacts import make_folder, storage_errors
from kivnun.errors import IntegrityError, KivnunError, RunFolderError, StorageError
from kivnun.jobs import results, running, snapshots
from kivnun.jobs.blobs import PIECE_BYTES, BlobStore
from kivnun.jobs.config import Price, ServiceConfig
from kivnun.jobs.database import Database, Transaction
from kivnun.jobs.errors import DatabaseDown, StaleLease, StoreDown
from kivnun.jobs.files import File
from kivnun.jobs.ids import NewId
from kivnun.jobs.running import Adapter, Claim, Snapshot, Told
from kivnun.jobs.schema import files, models
from kivnun.jobs.states import ACTIVE, Status
from kivnun.jobs.toy import is_toy
from kivnun.worker.drain import Drain, apart
from kivnun.worker.relay import NotReproduced, Relay, Saved, without_paths
from kivnun.worker.trainer import Outcome, Trainer, Trainers

T = TypeVar("T")
CARD = frozenset({"README.md", "manifest.json"})  # of an adapter: they tell of the run, and are no part of the model
RECORD = "events.jsonl"
STEPS_AT_ONCE = 1000  # read of the records for the tables
CRASH_WAIT_S = 0.5  # before a trainer that ended by an error is started again; twice as long each time
# Before one that was killed is: mostly for memory, which others use. What they do ends in minutes, and is no fault of this job.
KILLED_WAITS_S = (0.5, 60.0, 300.0)
LONGEST_WAIT_S = 5.0  # between two tries of what did not answer
# Shares of a drain: then a trainer that has not heeded is ended, then what does not answer is given up. The rest is to hand back.
TRAINER_SHARE, GIVE_UP_SHARE = 0.7, 0.8

# What a trainer's errors are to the owner of a job: code and param; whatever is not here is a fault of the service.
_FAULTS: dict[str, tuple[str, str | None]] = {
    "data_invalid": ("invalid_training_file", "training_file"),
    "non_finite_loss": ("training_diverged", None),
    "does_not_fit": ("out_of_memory", None),
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shared:
    """What all jobs of a worker share."""

    db: Database
    blobs: BlobStore
    config: ServiceConfig
    folder: Path
    owner: str
    clock: Callable[[], float]
    monotonic: Callable[[], float]
    new_id: NewId
    stop: threading.Event
    look_s: float
    drain: Drain

    @cached_property
    def prices(self) -> Mapping[str, Price]:
        return {name: base.price for name, base in self.config.bases.items()}


class GivenUp(Exception):
    """The worker has to end and something does not answer: another worker goes on from what was saved."""


class Cancelled(Exception):
    """The job was cancelled while its thread waited for something else than the database."""


class Unusable(Exception):
    """The job cannot be run: what it needs is not there, or is not what it should be."""


class OneJob:
    """A job from its claim to its end, or until the lease is lost."""

    def __init__(self, shared: Shared, trainers: Trainers, claim: Claim) -> None:
        self.lease = claim.lease
        self.done = threading.Event()
        self._shared, self._trainers, self._job = shared, trainers, claim.job
        self._folder = shared.folder / f"{claim.job.id}-{claim.lease.epoch}"
        self._lost, self._over = threading.Event(), threading.Event()  # the lease; the job, which may also have been cancelled
        self._trainer: Trainer | None = None
        self._asked = False  # whether the trainer was asked to stop
        self._saved_step = 0

    @property
    def _run(self) -> Path:
        return self._folder / "run"

    def lose(self) -> None:
        """Stop at once: the lease is somebody else's."""
        self._lost.set()
        self.cancel()

    def cancel(self) -> None:
        """Compute no more, whatever the job's own thread waits for; it settles what is due."""
        self._over.set()
        if self._trainer is not None:
            self._trainer.kill()

    def run(self) -> None:
        """Go the whole way. Whatever happens, the trainer is gone and the lease free or lost at the end."""
        job = self._job.id
        try:
            self._go()
        except StaleLease:
            log.warning("lost the job to another worker", extra={"action": "lost", "job": job})
        except GivenUp:
            log.warning("left the job to another worker", extra={"action": "left", "job": job})
            self._let_go()
        except (Unusable, IntegrityError) as error:
            log.error("a job cannot be run: %s", error, extra={"action": "unusable", "job": job})
            self._fail("internal_error", "the service could not prepare the training; nothing is charged")
        except NotReproduced as error:
            log.error("%s", error, extra={"action": "not reproduced", "job": job})
            self._fail("not_reproduced", f"{error}: the training is not what was reported, so that it was stopped")
        except Exception:
            # A fault of the program: the lease is left to run out, so that nobody tries again at once and for ever.
            log.exception("a job's thread ended by an error", extra={"action": "fault", "job": job})
            self._fail("internal_error", "the service made an error; nothing is charged")
        finally:
            if self._trainer is not None:
                self._trainer.kill()
            self.done.set()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _go(self) -> None:
        try:
            self._prepare()
            self._train()
        except Cancelled:
            self._end_early("cancelled")

    def _let_go(self) -> None:
        """Put the job back into its line where that can be done at once; else its lease runs out."""
        with contextlib.suppress(KivnunError):
            self._shared.db.write("hand back", self._hand_back)

    def _hand_back(self, tx: Transaction) -> Status:
        shared = self._shared
        return running.hand_back(tx, self.lease, self._job.id, shared.prices, shared.clock(), shared.new_id)

    # --- before -------------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Fill the work folder: spec, data, the adapter to start from, the newest snapshot."""
        for old in self._shared.folder.glob(f"{self._job.id}-*"):
            shutil.rmtree(old, ignore_errors=True)
        self._unless_cancelled(self._write_spec)
        self._fetch(self._job.training_file, "training.jsonl")
        if self._job.validation_file is not None:
            self._fetch(self._job.validation_file, "validation.jsonl")
        self._fetch_start()
        for snapshot in self._read(lambda tx: running.newest(tx, self._job.id)):
            try:
                self._fetch_folder(snapshot.manifest, self._run)
                self._saved_step = snapshot.step
                return
            except IntegrityError as error:
                log.error("a snapshot is damaged: %s", error, extra={"action": "snapshot", "job": self._job.id})
                shutil.rmtree(self._run, ignore_errors=True)

    def _write_spec(self) -> None:
        assert self._job.spec is not None, "a job is queued with its spec"
        with storage_errors(self._folder):
            make_folder(self._folder)
            (self._folder / "spec.yaml").write_text(self._job.spec, encoding="utf-8")

    def _fetch(self, file_id: str, name: str) -> None:
        query = sa.select(files.c.blob).where(files.c.id == file_id, files.c.tenant == self._job.tenant)
        blob = self._read(lambda tx: tx.execute(query).scalar_one_or_none())
        if blob is None:
            raise Unusable(f"the file {file_id} is not there")
        self._unless_cancelled(lambda: snapshots.fetch_file(self._shared.blobs, blob, self._folder / name))

    def _fetch_start(self) -> None:
        """Fetch the adapter that the job goes on with, where its model is a tuned one."""
        name, tenant = self._job.model, self._job.tenant
        named = (models.c.id == name) | (models.c.checkpoint == name)
        query = sa.select(models.c.manifest, models.c.content_hash).where(models.c.tenant == tenant, named)
        row = self._read(lambda tx: tx.execute(query).one_or_none())
        if row is None:
            return
        if snapshots.content_hash(self._fetch_folder(row.manifest, self._folder / "start")) != row.content_hash:
            raise IntegrityError(f"the adapter of {name} is not what its row says", hint="restore the store from a copy")

    def _fetch_folder(self, manifest: str, folder: Path) -> list[snapshots.Entry]:
        return snapshots.fetch_folder(self._shared.blobs, manifest, folder, self._unless_cancelled)

    # --- while it trains ----------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        """Run trainers until the job has ended or is let go of."""
        self._start()
        while not self._followed(self._relay()):
            pass

    def _relay(self) -> Relay:
        job = self._job.id

        def read(tx: Transaction) -> tuple[dict[int, dict[str, Any]], frozenset[str], int]:
            past = min(self._saved_step, running.held(tx, self.lease, job).step)  # the last step's score follows its snapshot
            return running.metrics_told(tx, job, past), running.messages_told(tx, job), past

        return Relay(self._run / RECORD, *self._read(read))

    def _followed(self, relay: Relay) -> bool:
        """Follow the run's record to the job's end; return False where the run was started over, with another record."""
        while True:
            trainer = self._living()
            ended = trainer.ended.wait(self._shared.look_s)
            status = self._look(relay)
            if status not in ACTIVE:
                self._end_early(status)
                return True
            if ended:
                outcome = trainer.outcome()
                if outcome.code == RunFolderError.code and self._saved_step > 0:
                    self._start_over(outcome)
                    return False
                if self._after(relay, outcome):
                    return True
                continue
            self._ask_to_stop_where_due(trainer, status)

    def _start(self) -> None:
        assert self._job.spec is not None
        self._asked = False
        self._trainer = self._trainers.start("toy" if is_toy(self._job.spec) else "pipeline", self._folder)

    def _living(self) -> Trainer:
        assert self._trainer is not None
        if self._lost.is_set():
            raise StaleLease("the lease is lost", hint="nothing was written")
        return self._trainer

    def _ask_to_stop_where_due(self, trainer: Trainer, status: Status) -> None:
        if not self._asked:
            if status == "pausing" or self._shared.stop.is_set():
                self._asked = True
                trainer.ask_to_stop()
        elif self._shared.drain.is_past(TRAINER_SHARE):
            trainer.kill()

    def _look(self, relay: Relay) -> Status:
        """Tell what is new, keep what was saved, to the end of the record as it is; return the job's status."""
        status = self._look_at_part(relay)
        while relay.is_behind and status in ACTIVE:
            status = self._look_at_part(relay)
        return status

    def _look_at_part(self, relay: Relay) -> Status:
        found = relay.read()
        last = max((item.step for item in found if isinstance(item, Saved)), default=0)
        status: Status | None = None
        for saved, told in _in_turn(found):
            status = self._tell(relay, told) if saved is None else self._commit(relay, saved, newest=saved.step == last)
            if status not in ACTIVE:
                return status
        return self._status() if status is None else status

    def _status(self) -> Status:
        return self._read(lambda tx: running.held(tx, self.lease, self._job.id)).status

    def _tell(self, relay: Relay, told: Iterable[Told]) -> Status:
        job, new_id, now = self._job.id, self._shared.new_id, self._shared.clock()
        return self._write("tell", lambda tx: running.tell(tx, self.lease, job, told, relay.pace.finish(), now, new_id))

    def _commit(self, relay: Relay, saved: Saved, newest: bool) -> Status:
        """Keep a checkpoint of the run: its blobs, then its row. One that the run has replaced meanwhile is passed over."""
        exposed, snapshot = None, None
        with contextlib.suppress(FileNotFoundError):
            exposed = self._exposed(saved)
        with contextlib.suppress(FileNotFoundError):
            snapshot = self._snapshot(saved) if newest and saved.step > self._saved_step else None
        if exposed is None and snapshot is None:
            return "running"
        self._saved_step = saved.step if snapshot else self._saved_step
        organization, now, new_id = self._shared.config.organization, self._shared.clock(), self._shared.new_id
        return self._write(
            "commit", lambda tx: running.commit(tx, self.lease, self._job.id, snapshot, exposed, organization, now, new_id)
        )

    def _snapshot(self, saved: Saved) -> Snapshot | None:
        """Put what a run needs to go on from a checkpoint into the store."""
        checkpoint = self._run / "checkpoints" / f"step-{saved.step:06d}"
        wanted = {file.relative_to(self._run).as_posix(): file for _, file in snapshots.files_in(checkpoint)}
        for place in ("spec.yaml", "resolved.yaml", "start.json", "evaluation/base.json", "reference.npz"):
            if (self._run / place).is_file():
                wanted[place] = self._run / place
        wanted[RECORD] = self._folder / "record"
        self._unless_cancelled(lambda: self._copy_record(wanted[RECORD], saved.length))
        manifest, _ = self._keep(wanted)
        return Snapshot(saved.step, manifest) if checkpoint.is_dir() else None  # else what was listed may be a part

    def _copy_record(self, target: Path, length: int) -> None:
        """Copy the record up to the line of a checkpoint: the trainer goes on writing."""
        with storage_errors(target), (self._run / RECORD).open("rb") as file, target.open("wb") as out:
            while length > 0 and (piece := file.read(min(length, PIECE_BYTES))):
                out.write(piece)
                length -= len(piece)

    def _exposed(self, saved: Saved) -> Adapter | None:
        """Put the adapter of an epoch's end, or of where a job was paused, into the store."""
        name = f"step-{saved.step:06d}"
        places = [self._run / "exposed" / name, *([] if self._shared.stop.is_set() else [self._run / "stopped" / name])]
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            return None
        adapter = self._keep_adapter(folder, saved.metrics)
        return adapter if folder.is_dir() else None

    def _keep_adapter(self, folder: Path, metrics: Mapping[str, Any]) -> Adapter:
        wanted = dict(snapshots.files_in(folder, without=CARD))
        manifest, entries = self._keep(wanted)
        return Adapter(metrics["step"], manifest, snapshots.content_hash(entries), metrics)

    def _keep(self, wanted: Mapping[str, Path]) -> tuple[str, list[snapshots.Entry]]:
        return snapshots.keep_files(self._shared.blobs, self._job.tenant, wanted, self._unless_cancelled)

    # --- ends ---------------------------------------------------------------------------------------------------------------

    def _after(self, relay: Relay, outcome: Outcome) -> bool:
        """Do what is due once the trainer has ended; return False where it was started again."""
        if outcome.status == "succeeded":
            self._succeed(relay)
            return True
        no_room = outcome.code == StorageError.code
        if outcome.status == "failed" and not no_room:
            self._fail_as(outcome, relay)
            return True
        if outcome.status == "interrupted" or self._asked:
            return self._again()
        if outcome.status == "crashed":
            return self._crashed()
        # A full disk of one machine, or the loss of the process that trainers come from, says nothing of the job.
        log.error("a trainer waits: %s", outcome.message or outcome.status, extra={"action": "wait", "job": self._job.id})
        return self._again(LONGEST_WAIT_S if no_room else CRASH_WAIT_S)

    def _again(self, wait_s: float = 0.0) -> bool:
        """Start a trainer again after a while, unless the job is to end or to rest meanwhile; return whether it is."""
        shared = self._shared
        until, status = shared.monotonic() + wait_s, self._status()
        while status == "running" and not shared.stop.is_set() and shared.monotonic() < until:
            self._lost.wait(shared.look_s)
            status = self._status()
        if status not in ACTIVE:
            self._end_early(status)
            return True
        if status == "pausing":
            return self._settle("pause", running.pause) != "running"
        if shared.stop.is_set():
            self._write("hand back", self._hand_back)
            return True
        self._start()
        return False

    def _start_over(self, outcome: Outcome) -> None:
        """Begin a job from its first step that was begun where numbers are computed otherwise: an upgrade, another machine."""
        log.warning("a job starts over: %s", outcome.message, extra={"action": "start over", "job": self._job.id})
        now, new_id = self._shared.clock(), self._shared.new_id
        self._write("start over", lambda tx: running.start_over(tx, self.lease, self._job.id, now, new_id))
        shutil.rmtree(self._run)
        self._saved_step = 0
        self._start()

    def _crashed(self) -> bool:
        """Start a trainer that was killed again, from its last checkpoint; a job that kills it again and again is ended."""
        trainer = self._living()
        log.warning("a trainer ended unexpectedly: %s", trainer.where_it_ended(), extra={"action": "crash", "job": self._job.id})
        count = self._write("crash", lambda tx: running.crashed(tx, self.lease, self._job.id))
        if count > running.MAX_CRASHES:
            what = f"the training process ended unexpectedly {count} times at the same place"
            self._fail("worker_crashed", f"{what}; nothing is charged")
            return True
        return self._again(KILLED_WAITS_S[count - 1] if trainer.was_killed else CRASH_WAIT_S * 2 ** (count - 1))

    def _succeed(self, relay: Relay) -> None:
        told = [item for item in relay.read(to_the_end=True) if isinstance(item, Told)]
        if told:
            self._tell(relay, told)
        adapter = self._keep_adapter(self._run / "adapter", relay.last)
        made = [self._kept_result(path) for path in self._unless_cancelled(self._write_tables)]
        shared = self._shared
        status: Status = self._write(
            "succeed",
            lambda tx: running.succeed(
                tx,
                self.lease,
                self._job.id,
                adapter,
                made,
                shared.config.organization,
                shared.prices,
                shared.clock(),
                shared.new_id,
            ),
        )
        if status != "succeeded":
            self._end_early(status)

    def _write_tables(self) -> list[Path]:
        return results.write_tables(self._steps_told(), self._folder)

    def _steps_told(self) -> Iterator[dict[str, Any]]:
        """Yield what was told of each step, in order."""
        number = self._read(lambda tx: running.first_step_at(tx, self._job.id))
        while page := self._read(lambda tx, number=number: running.metrics_page(tx, self._job.id, number, STEPS_AT_ONCE)):
            yield from (data for _, data in page)
            number = page[-1][0] + 1

    def _kept_result(self, path: Path) -> File:
        """Put a file of results into the store; return its row, which is not recorded yet."""
        shared, tenant, size = self._shared, self._job.tenant, path.stat().st_size
        blob = self._unless_cancelled(lambda: shared.blobs.put(tenant, path))
        return File(shared.new_id("file-"), tenant, shared.clock(), "fine-tune-results", path.name, size, blob, status="processed")

    def _end_early(self, status: Status) -> None:
        """Let go of a job that was cancelled: its trainer is stopped at once, and what was told is charged."""
        if self._trainer is not None:
            self._trainer.kill()
        if status == "cancelled":
            prices, now = self._shared.prices, self._shared.clock()
            self._write("settle", lambda tx: running.settle_cancelled(tx, self.lease, self._job.id, prices, now))

    def _settle(self, name: str, move: Callable[[Transaction, running.Lease, str, float, NewId], Status]) -> Status:
        now = self._shared.clock()
        status: Status = self._write(name, lambda tx: move(tx, self.lease, self._job.id, now, self._shared.new_id))
        if status == "cancelled":
            self._end_early(status)
        return status

    def _fail_as(self, outcome: Outcome, relay: Relay) -> None:
        """End a job for what its trainer said, in words that are for its owner."""
        told = [item for item in relay.read(to_the_end=True) if isinstance(item, Told)]
        if told:
            self._tell(relay, told)
        code, param = _FAULTS.get(outcome.code, ("internal_error", None))
        if code == "internal_error":
            log.error("a run failed: %s", outcome.message, extra={"action": "failed", "job": self._job.id})
            self._fail(code, "the training could not be run on this service; nothing is charged")
        else:
            self._fail(code, without_paths(outcome.message), param)

    def _fail(self, code: str, message: str, param: str | None = None) -> None:
        now, new_id = self._shared.clock(), self._shared.new_id
        try:
            status = self._write("fail", lambda tx: running.fail(tx, self.lease, self._job.id, code, message, param, now, new_id))
            if status == "cancelled":
                self._end_early(status)
        except (StaleLease, GivenUp):
            log.warning("could not say that a job failed", extra={"action": "lost", "job": self._job.id})

    # --- what may not answer --------------------------------------------------------------------------------------------------

    def _read(self, work: Callable[[Transaction], T]) -> T:
        db = self._shared.db
        return self._patiently(lambda: db.read(work))

    def _write(self, name: str, work: Callable[[Transaction], T]) -> T:
        return self._patiently(lambda: self._shared.db.write(name, work))

    def _unless_cancelled(self, act: Callable[[], T]) -> T:
        """Do what needs the store or the disk, and may hang, for as long as the job is not cancelled and there is time."""

        def act_unless_cancelled() -> T:
            self._check_on()
            return apart(act, self._check_on)

        return self._patiently(act_unless_cancelled, self._over)

    def _check_on(self) -> None:
        """Raise what ends a wait for the store: the lease is lost, the job cancelled, or the worker is to end."""
        if self._lost.is_set():
            raise StaleLease("the lease is lost", hint="nothing was written")
        if self._over.is_set():
            raise Cancelled
        if self._is_to_give_up():
            raise GivenUp

    def _is_to_give_up(self) -> bool:
        """Return whether the worker has to end now. Before the training nothing can be saved, and there is nothing to wait for."""
        return self._shared.drain.is_past(GIVE_UP_SHARE) or (self._trainer is None and self._shared.stop.is_set())

    def _patiently(self, act: Callable[[], T], woken_by: threading.Event | None = None) -> T:
        """Do what may not answer, again and again until it does: the trainer goes on meanwhile."""
        wait = 0.05
        while True:
            if self._lost.is_set():
                raise StaleLease("the lease is lost", hint="nothing was written")
            try:
                return act()
            except (DatabaseDown, StoreDown, StorageError) as error:
                log.warning("%s", error.message, extra={"action": "wait", "job": self._job.id})
                if self._is_to_give_up():
                    raise GivenUp from error
                (woken_by or self._lost).wait(wait * random.uniform(0.5, 1.0))
                wait = min(self._shared.look_s if self._shared.stop.is_set() else LONGEST_WAIT_S, wait * 2)


def _in_turn(found: Iterable[Told | Saved]) -> Iterator[tuple[Saved | None, list[Told]]]:
    """Yield what is told together, and each checkpoint in its place among it."""
    told: list[Told] = []
    for item in found:
        if isinstance(item, Told):
            told.append(item)
            continue
        if told:
            yield None, told
        yield item, []
        told = []
    if told:
        yield None, told
