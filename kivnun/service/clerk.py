"""The clerk: the process that does what no request waits for. It judges files, validates jobs, runs batches, delivers webhooks.

Each such duty is done by one clerk at a time, under a lease: another clerk may stand by and take over once this one is dead. A
duty is made anew for every lease, over a database that refuses its writes as soon as the lease is somebody else's; so a clerk
that was only asleep changes nothing any more. Next: `delivering.py`, `batching.py`, `kivnun/jobs/leases.py`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from kivnun.jobs import leases
from kivnun.jobs.database import Database
from kivnun.jobs.effects import Watch, unwatched
from kivnun.jobs.errors import DatabaseDown, StaleLease, StoreDown
from kivnun.jobs.ids import new_id
from kivnun.jobs.leases import BEAT_S, Lease
from kivnun.jobs.place import Place
from kivnun.service.answering import Answering
from kivnun.service.batching import RunBatches
from kivnun.service.context import Service
from kivnun.service.delivering import DeliverWebhooks
from kivnun.service.judging import JudgeFiles
from kivnun.service.scratch import scratch_folder
from kivnun.service.sweeping import Sweep
from kivnun.service.validating import ValidateJobs

logger = logging.getLogger(__name__)

IDLE_S = 0.1  # between two looks for work
STANDBY_S = 1.0  # between two looks at a lease that another clerk holds
FIRST_BACK_OFF_S, LAST_BACK_OFF_S = 0.5, 30.0
DRAIN_S = 25.0  # how long all may take once the clerk is told to end
GIVE_UP_SHARE = 0.8  # of it for portions in progress; one that hangs is then left to another clerk


class Duty(Protocol):
    """Work that is done portion by portion. A portion that a crash cuts off is done again."""

    name: str

    def turn(self) -> bool:
        """Do one portion; return whether there may be more at once."""
        ...


@runtime_checkable
class Closing(Protocol):
    """A duty with threads of its own, which end with its lease."""

    def close(self) -> None: ...


Maker = Callable[[Service], Duty]


DUTIES: Mapping[str, Maker] = {
    "files": functools.partial(JudgeFiles, lane="small"),
    "large_files": functools.partial(JudgeFiles, lane="large"),
    "jobs": functools.partial(ValidateJobs, lane="small"),
    "large_jobs": functools.partial(ValidateJobs, lane="large"),
    "batches": lambda service: RunBatches(service, Answering(service)),
    "webhooks": DeliverWebhooks,
    "sweep": Sweep,
}
"""By the names of their leases."""


def run(
    place: Place,
    stop: threading.Event,
    watch: Watch = unwatched,
    makers: Mapping[str, Maker] = DUTIES,
    term_s: float = leases.TERM_S,
    drain_s: float = DRAIN_S,
) -> None:
    """Do every duty that no other clerk does, until `stop` is set. Returns when the portions in progress are done; one that hangs
    loses its lease before `drain_s` is over, and can write nothing more in what is left of its process."""
    with scratch_folder(place.data, "clerk") as scratch:
        service = Service(place.database(watch), place.blobs(watch), place.service_config(), scratch, time.time)
        _run(_Office(service, stop, new_id("clerk_"), leases.Watcher(time.monotonic, term_s)), makers, drain_s)
        service.db.close()


def _run(office: _Office, makers: Mapping[str, Maker], drain_s: float) -> None:
    threads = [
        threading.Thread(target=_serve, args=(office, name, maker), name=f"duty:{name}", daemon=True)
        for name, maker in makers.items()
    ]
    beater = threading.Thread(target=_beat, args=(office,), name="beat", daemon=True)
    for thread in (*threads, beater):
        thread.start()
    office.stop.wait()
    until = time.monotonic() + GIVE_UP_SHARE * drain_s
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    for lease in list(office.held.values()):
        logger.warning("a duty is left to another clerk: it does not end", extra={"action": "duty_left", "duty": lease.name})
        _give_back(office, lease)
    beater.join(max(0.0, until - time.monotonic()))


@dataclass(slots=True)
class _Office:
    """What the threads of one clerk share."""

    service: Service
    stop: threading.Event
    owner: str
    watcher: leases.Watcher
    lock: threading.Lock = field(default_factory=threading.Lock)
    held: dict[str, Lease] = field(default_factory=dict[str, Lease])

    def holds(self, lease: Lease) -> bool:
        with self.lock:
            return self.held.get(lease.name) == lease

    def lose(self, lease: Lease) -> None:
        with self.lock:
            if self.held.get(lease.name) == lease:
                del self.held[lease.name]

    def claim(self, name: str) -> Lease | None:
        """Take the lease of a duty that nobody does, or whose clerk is dead."""
        seen = self.service.db.read(lambda tx: leases.look(tx, [name])).get(name)
        if seen is not None:
            with self.lock:
                dead = self.watcher.is_dead(seen)
            if not dead:
                return None
        lease = self.service.db.write("claim", lambda tx: leases.claim(tx, name, self.owner, seen))
        if lease is not None:
            with self.lock:
                self.held[name] = lease
                self.watcher.forget(name)
        return lease


def _serve(office: _Office, name: str, maker: Maker) -> None:
    """Do one duty whenever its lease can be had. Nothing that goes wrong in it ends the thread."""
    failures = 0
    while not office.stop.is_set():
        try:
            lease = office.claim(f"duty:{name}")
            if lease is None:
                office.stop.wait(STANDBY_S)
                continue
            try:
                _hold(office, lease, maker(replace(office.service, db=_under(lease, office.service.db))))
            finally:
                _give_back(office, lease)
            failures = 0
        except Exception as error:  # of the claim, or of making the duty
            failures += 1
            _note(name, error)
            office.stop.wait(_back_off_s(failures))


def _under(lease: Lease, db: Database) -> Database:
    return db.guarded(lambda tx: leases.check(tx, lease))


def _hold(office: _Office, lease: Lease, duty: Duty) -> None:
    """Do a duty until its lease is lost or the clerk ends."""
    try:
        _turn_by_turn(office, lease, duty)
    finally:
        if isinstance(duty, Closing):
            duty.close()


def _turn_by_turn(office: _Office, lease: Lease, duty: Duty) -> None:
    failures = 0
    while not office.stop.is_set() and office.holds(lease):
        try:
            more = duty.turn()
            failures = 0
        except StaleLease:
            office.lose(lease)
            return
        except Exception as error:
            failures += 1
            _note(duty.name, error)
            office.stop.wait(_back_off_s(failures))
            continue
        if not more:
            office.stop.wait(IDLE_S)


def _give_back(office: _Office, lease: Lease) -> None:
    if office.holds(lease):
        office.lose(lease)  # first: a beat that comes after the release would find it gone
        with contextlib.suppress(StaleLease, DatabaseDown):  # another clerk has it, or will take it for dead
            office.service.db.write("release", lambda tx: leases.release(tx, lease))


def _beat(office: _Office) -> None:
    """Show that this clerk lives, for all its leases; longer than `stop`, as portions are finished meanwhile."""
    while not office.stop.wait(BEAT_S) or office.held:
        with office.lock:
            held = list(office.held.values())
        for lease in held:
            try:
                office.service.db.write("beat", lambda tx, lease=lease: leases.beat(tx, lease))
            except StaleLease:
                office.lose(lease)
            except Exception as error:
                _note("beat", error)
        if office.stop.is_set():
            time.sleep(IDLE_S)


def _back_off_s(failures: int) -> float:
    return min(LAST_BACK_OFF_S, FIRST_BACK_OFF_S * 2 ** (failures - 1))


def _note(name: str, error: Exception) -> None:
    """Log that a duty failed, and where. The service's log leaves out what the error says: it may quote what somebody uploaded."""
    if isinstance(error, DatabaseDown | StoreDown):
        logger.warning("a duty waits: a part of the service is down", extra={"action": "duty_waits", "duty": name})
    else:
        logger.error("a duty failed", exc_info=error, extra={"action": "duty_failed", "duty": name})
