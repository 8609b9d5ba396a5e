"""What is over is erased: files and uploads whose time has come, and the bytes that no row names any more.

A blob is put before the row that names it is written, so an unnamed blob may be one that is about to be named. It is garbage when
it was last put an hour ago, was unnamed when it was seen before, and still is when all names are read after that; putting it again
makes it young. The hour is told by the wall clock, the wait between two looks by a clock that no one can turn: neither a slow
writer nor a clock that jumps loses anything. A wall clock that has jumped ends nothing before it has settled (`settled.py`).
Next: `jobs/blobs.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from itertools import groupby

import sqlalchemy as sa

from kivnun.errors import IntegrityError
from kivnun.jobs import files, uploads
from kivnun.jobs.database import Transaction
from kivnun.jobs.schema import files as files_table
from kivnun.jobs.schema import jobs, models, snapshots, upload_parts
from kivnun.jobs.schema import uploads as uploads_table
from kivnun.jobs.snapshots import read_manifest
from kivnun.jobs.states import TERMINAL
from kivnun.service.context import Service
from kivnun.service.settled import SettledClock, since_boot

logger = logging.getLogger(__name__)

YOUNG_S = 3600.0  # within it, a blob that is put gets its row
SETTLE_S = 600.0  # between the first look at an unnamed blob and the last
EVERY_S = 300.0  # between two looks at all blobs
AT_ONCE = 100


class Sweep:
    """The duty that erases. `clock` gives seconds and never goes back."""

    name = "sweep"

    def __init__(
        self,
        service: Service,
        clock: Callable[[], float] = since_boot,
        young_s: float = YOUNG_S,
        settle_s: float = SETTLE_S,
        every_s: float = EVERY_S,
    ) -> None:
        self._service = service
        self._clock = clock
        self._settled = SettledClock(service.clock, clock, settle_s)
        self._young_s, self._settle_s, self._every_s = young_s, settle_s, every_s
        self._next_look = clock()
        self._unnamed_since: dict[str, float] = {}
        self._manifests: dict[str, frozenset[str]] = {}  # blobs never change: each is read once

    def turn(self) -> bool:
        """End what is over; from time to time erase what nobody names. Returns whether more may be over already."""
        over = self._settled.over()
        more = self._end_files(over) or self._end_uploads(over)
        if not more and over > -math.inf and self._clock() >= self._next_look:
            self._erase_unnamed(over - self._young_s)
            self._next_look = self._clock() + self._every_s
        return more

    def _end_files(self, over: float) -> bool:
        """Delete files whose time is over and that nothing in progress needs."""

        def work(tx: Transaction) -> int:
            expired = files.expired(tx, over, AT_ONCE)
            for file in expired:
                files.delete(tx, file.id, file.tenant, over)
            return len(expired)

        if not self._service.db.read(lambda tx: files.expired(tx, over, 1)):
            return False
        return self._service.db.write("expire files", work) == AT_ONCE

    def _end_uploads(self, over: float) -> bool:
        def work(tx: Transaction) -> int:
            expired = uploads.expired(tx, over, AT_ONCE)
            for upload in expired:
                uploads.end(tx, upload, "expired")
            return len(expired)

        if not self._service.db.read(lambda tx: uploads.expired(tx, over, 1)):
            return False
        return self._service.db.write("expire uploads", work) == AT_ONCE

    def _erase_unnamed(self, before: float) -> None:
        store = self._service.blobs
        looked = self._clock()
        unnamed: dict[str, float] = {}
        seen_manifests: set[str] = set()
        for tenant, listed in groupby(store.names(), key=lambda item: item[0].partition("/")[0]):
            old = [name for name, put_at in listed if put_at < before]
            try:
                named = self._named(tenant, seen_manifests) if old else set[str]()
            except IntegrityError as error:  # what it named is not known: all of this tenant's blobs stay, and only those
                told = {"action": "manifest_lost", "tenant": tenant}
                logger.error("nothing of a tenant is erased: a manifest cannot be read", exc_info=error, extra=told)
                continue
            for name in old:
                if name in named:
                    continue
                since = self._unnamed_since.get(name, looked)
                if looked - since < self._settle_s or not store.erase(name, before):
                    unnamed[name] = since
        self._unnamed_since = unnamed
        self._manifests = {name: held for name, held in self._manifests.items() if name in seen_manifests}
        store.clear_leftovers(before)

    def _named(self, tenant: str, seen_manifests: set[str]) -> set[str]:
        """Return the tenant's blobs that rows name, directly or through a manifest."""
        direct, manifests = self._service.db.read(lambda tx: (set(_blobs_of(tx, tenant)), set(_manifests_of(tx, tenant))))
        seen_manifests |= manifests
        for name in manifests:
            if name not in self._manifests:
                self._manifests[name] = frozenset(entry.blob for entry in read_manifest(self._service.blobs, name))
        return direct | manifests | {blob for name in manifests for blob in self._manifests[name]}


def _blobs_of(tx: Transaction, tenant: str) -> Iterable[str]:
    kept = sa.and_(files_table.c.tenant == tenant, files_table.c.deleted_at.is_(None))
    part = sa.select(upload_parts.c.blob).join(uploads_table, uploads_table.c.id == upload_parts.c.upload)
    yield from tx.execute(sa.select(files_table.c.blob).where(kept)).scalars()
    yield from tx.execute(sa.select(files_table.c.report).where(kept, files_table.c.report.is_not(None))).scalars()
    yield from tx.execute(part.where(uploads_table.c.tenant == tenant)).scalars()


def _manifests_of(tx: Transaction, tenant: str) -> Iterable[str]:
    """Yield the manifests of snapshots and models. A deleted model's stays while a job that continues it has not ended."""
    continued = sa.select(jobs.c.model).where(jobs.c.tenant == tenant, jobs.c.status.not_in(TERMINAL))
    snapshot = sa.select(snapshots.c.manifest).join(jobs, jobs.c.id == snapshots.c.job).where(jobs.c.tenant == tenant)
    model = sa.select(models.c.manifest).where(models.c.tenant == tenant)
    yield from tx.execute(snapshot).scalars()
    yield from tx.execute(model.where(sa.or_(models.c.deleted_at.is_(None), models.c.id.in_(continued)))).scalars()
