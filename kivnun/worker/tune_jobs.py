"""The worker that trains: it leases jobs, runs a trainer for each, and writes down how far they are. Nothing is ever lost.

    claim -> fetch data, snapshot, adapter to start from -> trainer -> tell steps, keep snapshots -> model, results, price, status

Whatever may be killed here at any moment: what others see is rows, each transaction shows the lease, and blobs come before the rows
that name them. Another worker goes on from the newest snapshot and comes to the same bits. Next: `one_job.py` (a job's way through
it), `trainer.py`, `../jobs/running.py` (what is written).
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable

from kivnun.errors import KivnunError
from kivnun.jobs import leases, running
from kivnun.jobs.database import Transaction
from kivnun.jobs.effects import Watch, unwatched
from kivnun.jobs.errors import DatabaseDown, StaleLease
from kivnun.jobs.ids import new_id
from kivnun.jobs.leases import BEAT_S, TERM_S, Lease, Watcher
from kivnun.jobs.place import Place
from kivnun.jobs.running import Claim
from kivnun.worker.drain import Drain
from kivnun.worker.one_job import OneJob, Shared
from kivnun.worker.trainer import Trainers

LOOK_S = 0.25  # between two looks at the line, the commands and the record of a run
DRAIN_S = 25.0  # for steps in progress and for what does not answer, once the worker is told to end
AFTER_TROUBLE_S = 1.0  # before the next look at the line
HEED_S = 0.5  # between two looks for jobs that were cancelled, whatever their own threads wait for
ROOM_BYTES = 256 << 20  # of the disk of the work folders: with less left, no job is taken

log = logging.getLogger(__name__)


def work(
    place: Place,
    stop: threading.Event,
    watch: Watch = unwatched,
    *,
    concurrency: int = 1,
    clock: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
    term_s: float = TERM_S,
    beat_s: float = BEAT_S,
    look_s: float = LOOK_S,
    drain_s: float = DRAIN_S,
    room_bytes: int = ROOM_BYTES,
    until_idle: bool = False,
    trainers: Trainers | None = None,
) -> None:
    """Work on jobs until `stop` is set, `concurrency` at once; then save what runs, hand it back to the queue and return.

    `clock` gives seconds since 1970, `monotonic` never goes back. `until_idle` returns once nothing is left to do. `trainers` are
    those of a process that works here more than once; they are left open."""
    config = place.service_config()
    shared = Shared(
        db=place.database(watch),
        blobs=place.blobs(watch),
        config=config,
        folder=place.data / "work",
        owner=f"{socket.gethostname()}:{os.getpid()}:{new_id('')[:8]}",
        clock=clock,
        monotonic=monotonic,
        new_id=new_id,
        stop=stop,
        look_s=look_s,
        drain=Drain(stop, drain_s, monotonic),
    )
    loads_torch = any(base.trainer == "pipeline" for base in config.bases.values())
    own = trainers or Trainers(loads_torch=loads_torch)
    try:
        _Worker(shared, own, Watcher(monotonic, term_s), concurrency, beat_s, room_bytes).run(until_idle)
    finally:
        if trainers is None:
            own.close()
        shared.db.close()


class _Worker:
    """The loop that claims, and the threads of the jobs that it has claimed."""

    def __init__(
        self, shared: Shared, trainers: Trainers, watcher: Watcher, concurrency: int, beat_s: float, room_bytes: int
    ) -> None:
        self._shared, self._trainers, self._watcher = shared, trainers, watcher
        self._concurrency, self._beat_s, self._room_bytes = concurrency, beat_s, room_bytes
        self._short_of_room = False
        self._jobs: dict[OneJob, threading.Thread] = {}
        self._ended = threading.Event()

    def run(self, until_idle: bool) -> None:
        beating = threading.Thread(target=self._beat, name="kivnun-beat", daemon=True)
        beating.start()
        try:
            self._claim_until_told(until_idle)
        except BaseException:
            for job in list(self._jobs):  # their trainers are about to go: that is no crash of theirs
                job.lose()
            raise
        finally:
            for thread in list(self._jobs.values()):
                thread.join()
            self._ended.set()
            beating.join()

    def _claim_until_told(self, until_idle: bool) -> None:
        shared, swept = self._shared, False
        while not shared.stop.is_set():
            found = False
            try:
                if not swept:
                    self._sweep()
                    swept = True
                self._trainers.mend()
                found = self._claim_what_fits()
            except DatabaseDown:
                log.warning("the database does not answer", extra={"action": "claim"})
                shared.stop.wait(AFTER_TROUBLE_S)
            except Exception:  # what ails the machine, or a fault of the program: the jobs that run have no part in it
                log.exception("could not look for jobs", extra={"action": "claim"})
                shared.stop.wait(AFTER_TROUBLE_S)
            if until_idle and not found and not self._jobs and not self._is_anything_left():
                break
            shared.stop.wait(0.0 if found else shared.look_s)

    def _claim_what_fits(self) -> bool:
        """Claim jobs while there is room; return whether there was one."""
        self._jobs = {job: thread for job, thread in self._jobs.items() if thread.is_alive()}
        found = False
        while len(self._jobs) < self._concurrency and not self._shared.stop.is_set() and self._has_room():
            claim = self._claim()
            if claim is None:
                break
            found = True
            job = OneJob(self._shared, self._trainers, claim)
            thread = threading.Thread(target=job.run, name=f"kivnun-{claim.job.id}")
            thread.start()
            self._jobs[job] = thread
        return found

    def _has_room(self) -> bool:
        """Return whether the disk has room for a job's folder; say once that it has not."""
        free = shutil.disk_usage(self._shared.folder).free
        short = free < self._room_bytes
        if short and not self._short_of_room:
            log.error("this worker takes no job: its disk has too little room", extra={"action": "disk", "bytes": free})
        self._short_of_room = short
        return not short

    def _claim(self) -> Claim | None:
        """Take a job whose worker was lost, else the one whose turn it is. Nothing is written where there is none."""
        shared = self._shared
        left_alone = shared.db.read(running.left_alone)
        self._watcher.forget_all_but(seen.name for _, seen in left_alone)
        for job_id, seen in left_alone:
            if not self._watcher.is_dead(seen):
                continue
            claim = shared.db.write("take over", lambda tx, j=job_id, s=seen: self._take_over(tx, j, s))
            self._watcher.forget(seen.name)
            if claim is not None:
                return claim
        limits = shared.config.limits
        if not shared.db.read(lambda tx: running.something_waits(tx, limits)):
            return None
        return shared.db.write("claim", lambda tx: running.claim_next(tx, shared.owner, limits, shared.clock(), shared.new_id))

    def _take_over(self, tx: Transaction, job_id: str, seen: leases.Seen) -> Claim | None:
        shared = self._shared
        return running.take_over(tx, job_id, seen, shared.owner, shared.prices, shared.clock(), shared.new_id)

    def _is_anything_left(self) -> bool:
        return bool(self._shared.db.read(running.left_alone))

    def _sweep(self) -> None:
        """Remove the work folders that a killed worker of this machine left."""
        self._shared.folder.mkdir(parents=True, exist_ok=True)
        folders = {folder: folder.name.rpartition("-") for folder in self._shared.folder.iterdir()}
        names = [running.lease_name(job_id) for job_id, _, _ in folders.values()]
        held = self._shared.db.read(lambda tx: leases.look(tx, names))
        for folder, (job_id, _, epoch) in folders.items():
            lease = held.get(running.lease_name(job_id))
            if lease is None or lease.owner is None or str(lease.epoch) != epoch:
                shutil.rmtree(folder, ignore_errors=True)

    def _beat(self) -> None:
        """Show that the holder of the leases lives; stop at once what was cancelled, or whose lease is somebody else's by now."""
        shared, due = self._shared, 0.0
        while not self._ended.wait(min(self._beat_s, HEED_S)):
            holding = {job.lease: job for job in list(self._jobs) if not job.done.is_set()}
            if not holding:
                continue
            try:
                cancelled = shared.db.read(lambda tx, held=list(holding): running.cancelled(tx, held))
                for lease in cancelled:
                    holding[lease].cancel()
                if shared.monotonic() < due:
                    continue
                lost = shared.db.write("beat", lambda tx, held=list(holding): _beaten(tx, held))
                due = shared.monotonic() + self._beat_s
                for lease in lost:
                    holding[lease].lose()
            except KivnunError:
                log.warning("the database does not answer", extra={"action": "beat"})
            except Exception:  # whatever it was, a beat that ends would let every job of this worker be taken
                log.exception("a beat was missed", extra={"action": "beat"})


def _beaten(tx: Transaction, held: list[Lease]) -> list[Lease]:
    """Beat for each lease; return those that are held no longer."""
    lost: list[Lease] = []
    for lease in held:
        try:
            leases.beat(tx, lease)
        except StaleLease:
            lost.append(lease)
    return lost
