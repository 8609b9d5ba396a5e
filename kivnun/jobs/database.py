"""One door to the database: whole transactions, one after the other as far as anybody can tell, on SQLite and PostgreSQL alike.

A transaction is a function of a connection, so that it can be run again: PostgreSQL runs them side by side and refuses one whose
outcome would depend on the order (SERIALIZABLE), SQLite admits one writer at a time (BEGIN IMMEDIATE). Such a function has no
effect but on its connection. Next: `schema.py`.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoneFree

from kivnun.jobs.effects import Watch, unwatched
from kivnun.jobs.errors import DatabaseDown

T = TypeVar("T")
Transaction = sa.Connection
Work = Callable[[Transaction], T]

BUSY_S = 30.0  # how long a writer waits for another
FREE_S = 15.0  # how long a thread waits for a connection that another one uses
TRIES = 12
# A server that is cut off (its packets are dropped, and nothing says so) is given up after 14 s, whether or not it has heard
# the question. One that is there but stuck ends a statement by itself; a lock is waited for half as long.
_GIVEN_UP = {"keepalives": 1, "keepalives_idle": 5, "keepalives_interval": 3, "keepalives_count": 3, "tcp_user_timeout": 14_000}
_OPTIONS = "-c statement_timeout=60s -c lock_timeout=30s -c idle_in_transaction_session_timeout=60s"
_OUT_OF_REACH = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_IOERR", "SQLITE_FULL", "SQLITE_CANTOPEN", "SQLITE_READONLY")
_SERIALIZATION = ("40001", "40P01")  # serialization failure, deadlock: PostgreSQL asks for the transaction again
# A key that another transaction took between this one's look and its write: PostgreSQL tells it as a duplicate, even to those
# who could not see it. Run again, they see it; one that still finds a duplicate has made it by itself.
_DUPLICATE = "23505"
DUPLICATE_TRIES = 4


def sqlite_url(path: Path) -> str:
    """Return the URL of a database file."""
    return f"sqlite:///{path}"


def holds(text: str) -> bool:
    """Return whether both databases can hold a text: without NUL, and without half of a surrogate pair. No name has either."""
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


class Database:
    """A database by its URL (`sqlite:///FILE`, `postgresql+psycopg://...`; `postgresql://` is taken as the latter).

    Threads may share it. Raises DatabaseDown where it does not answer."""

    def __init__(self, url: str, watch: Watch = unwatched) -> None:
        parsed = sa.make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        self.url = parsed
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        self._watch = watch
        self._check: Work[None] | None = None
        self.engine = _sqlite_engine(parsed) if self.is_sqlite else _postgresql_engine(parsed)

    def read(self, work: Work[T]) -> T:
        """Return what `work` finds, all of it as of one moment. The database lets it write nothing."""
        return self._run(work, write=False)

    def write(self, name: str, work: Work[T]) -> T:
        """Run `work` and commit it, whole or not at all; `name` says what it does, for those who watch."""
        check = self._check

        def checked(tx: Transaction) -> T:
            if check is not None:
                check(tx)
            return work(tx)

        self._watch(f"before {name}")
        outcome = self._run(checked, write=True)
        self._watch(f"after {name}")
        return outcome

    def guarded(self, check: Work[None]) -> Database:
        """Return this database with `check` as the first statement of every write: what is done under a lease ends with it."""
        twin = copy.copy(self)
        twin._check = check
        return twin

    def close(self) -> None:
        self.engine.dispose()

    def _run(self, work: Work[T], *, write: bool) -> T:
        for attempt in range(TRIES):
            try:
                with self._connection(write) as connection, connection.begin():
                    return work(connection)
            except NoneFree as error:
                raise DatabaseDown(
                    f"no connection to the database became free in {FREE_S:.0f} s", hint="it is slow or overloaded: see its own log"
                ) from error
            except DBAPIError as error:
                if attempt + 1 < _tries(error):
                    time.sleep(random.uniform(0, 0.01 * 2 ** min(attempt, 6)))
                    continue
                if _is_down(error, write):
                    raise DatabaseDown("the database does not answer", hint="see its own log; nothing was lost") from error
                raise
        raise AssertionError("the last attempt returns or raises")

    def _connection(self, write: bool) -> sa.Connection:
        return self.engine.connect().execution_options(kivnun_write=write, postgresql_readonly=not write)


def _sqlite_engine(url: sa.URL) -> sa.Engine:
    # Threads wait for the one writer within their connections, and there may be many.
    engine = sa.create_engine(
        url, hide_parameters=True, pool_size=8, max_overflow=56, pool_timeout=FREE_S, connect_args={"timeout": BUSY_S}
    )

    @event.listens_for(engine, "connect")
    def _opened(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, not guessed by the driver
        # FULL: a commit that was answered outlives the machine's power, not only the process.
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={int(BUSY_S * 1000)}"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begun(connection: sa.Connection) -> None:
        write = connection.get_execution_options().get("kivnun_write", True)
        connection.exec_driver_sql(f"PRAGMA query_only={'OFF' if write else 'ON'}")
        # A deferred transaction that writes later than it reads could be refused half-way.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _postgresql_engine(url: sa.URL) -> sa.Engine:
    return sa.create_engine(
        url,
        isolation_level="SERIALIZABLE",
        hide_parameters=True,  # an error's text is logged, and rows hold what tenants say
        pool_size=8,
        max_overflow=8,
        pool_timeout=FREE_S,
        pool_pre_ping=True,
        connect_args={"connect_timeout": 5, **_GIVEN_UP, "options": _OPTIONS},
    )


def _tries(error: DBAPIError) -> int:
    """Return how often a transaction that ended so is run in all."""
    state = getattr(error.orig, "sqlstate", None)
    return TRIES if state in _SERIALIZATION else DUPLICATE_TRIES if state == _DUPLICATE else 1


def _is_down(error: DBAPIError, write: bool) -> bool:
    """Return whether the database could not be reached or used. SQLite calls a missing table by the same class: its name tells;
    that it may not be written to says nothing of it in a transaction that only reads."""
    name = getattr(error.orig, "sqlite_errorname", None)
    if name is not None:
        if name == "SQLITE_READONLY" and not write:
            return False
        return str(name).startswith(_OUT_OF_REACH)
    return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)
