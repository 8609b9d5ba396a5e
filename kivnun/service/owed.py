"""Tokens of answers that were given while the database was away: kept in memory, and written down as soon as it is back.

A process that dies before that loses them; whatever else is lost is logged. Used by `answering.py`.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from dataclasses import dataclass

from kivnun.jobs import usage
from kivnun.jobs.database import Transaction
from kivnun.jobs.errors import DatabaseDown
from kivnun.jobs.usage import HOUR_S, Charge, Kind
from kivnun.service.context import Service

MAX_KEPT = 10_000  # sums, however many answers each is of
RETRY_S = 5.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Sum:
    """Whose tokens are one sum: they become one row of `usage`."""

    hour: int
    tenant: str
    base: str
    model: str
    api_key: str | None
    kind: Kind
    price: float

    def of(self, tokens: int) -> Charge:
        return Charge(self.tenant, self.base, self.model, self.api_key, ((self.kind, tokens, self.price),))


class Owed:
    """Writes charges down, at once or later. Threads may share it."""

    def __init__(self, service: Service, max_kept: int = MAX_KEPT, retry_s: float = RETRY_S) -> None:
        self._service, self._max_kept, self._retry_s = service, max_kept, retry_s
        self._lock = threading.Lock()
        self._kept: Counter[_Sum] = Counter()
        self._retry: threading.Timer | None = None

    def pay(self, used: Charge) -> None:
        """Write down what an answer used, and what was kept before with it; keep both where the database is away."""
        due, hour = self._taken(), int(self._service.clock()) // HOUR_S * HOUR_S
        for kind, tokens, price in used.parts:
            due[_Sum(hour, used.tenant, used.base, used.model, used.api_key, kind, price)] += tokens
        self._write(due)

    def _taken(self) -> Counter[_Sum]:
        with self._lock:
            taken, self._kept = self._kept, Counter()
        return taken

    def _write(self, due: Counter[_Sum]) -> None:
        is_whole = False

        def work(tx: Transaction) -> None:
            nonlocal is_whole
            is_whole = False
            for one, tokens in due.items():
                usage.charge(tx, [one.of(tokens)], one.hour)
            is_whole = True

        try:
            self._service.db.write("answer used", work)
        except DatabaseDown as error:
            # Nobody knows whether a commit was made whose answer was lost on the way: rather nothing is paid than twice.
            if is_whole and not self._service.db.is_sqlite and not _was_answered(error):
                _tell_lost(due, error)
            else:
                self._keep(due, error)
        except Exception as error:
            _tell_lost(due, error)
            raise

    def _keep(self, due: Counter[_Sum], error: Exception) -> None:
        lost: Counter[_Sum] = Counter()
        with self._lock:
            for one, tokens in due.items():
                has_room = one in self._kept or len(self._kept) < self._max_kept
                (self._kept if has_room else lost)[one] += tokens
            if self._retry is None:
                self._retry = threading.Timer(self._retry_s, self._again)
                self._retry.daemon = True
                self._retry.start()
        told = {"action": "usage_waits", "count": len(due)}
        logger.warning("answers' tokens wait for the database", exc_info=error, extra=told)
        _tell_lost(lost, error)

    def _again(self) -> None:
        with self._lock:
            self._retry = None
        due = self._taken()
        if due:
            self._write(due)


def _was_answered(error: DatabaseDown) -> bool:
    """Return whether the database itself said that it did not commit: its errors have a state, a connection that broke has none."""
    return getattr(getattr(error.__cause__, "orig", None), "sqlstate", None) is not None


def _tell_lost(lost: Counter[_Sum], error: Exception) -> None:
    for one, tokens in lost.items():
        told = {"action": "usage_lost", "tenant": one.tenant, one.kind: tokens}
        logger.error("an answer's tokens could not be written down", exc_info=error, extra=told)
