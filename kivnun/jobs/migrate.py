"""The tables as they should be: made in an empty database, brought up to date in one that an earlier version wrote.

All of it is one transaction under one lock, so that any number of processes may start at once, and one that is killed in between
leaves the database as it was. There is no way back: a database of a later version is refused, and a copy is what one goes back to.
Next: `migrations/versions/` (the steps), `schema.py` (where they lead).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.script.revision import ResolutionError
from alembic.util import CommandError
from sqlalchemy.exc import InterfaceError, OperationalError

from kivnun.jobs.database import Database
from kivnun.jobs.errors import DatabaseDown, SchemaError
from kivnun.jobs.schema import metadata

MIGRATIONS = Path(__file__).parent / "migrations"
# PostgreSQL's advisory locks have numbers: this is "kivnun" in ASCII. A start waits so long for another one to finish.
LOCK = 0x6B69766E756E
WAIT = "10min"


def prepare(db: Database, migrations: Path = MIGRATIONS) -> bool:
    """Make the tables what this version needs; return whether anything was done.

    Raises SchemaError for a database of a later version, or of something else; DatabaseDown where it does not answer."""
    scripts = ScriptDirectory(str(migrations))
    with _locked(db) as connection:
        held = _revision(connection, scripts)
        outdated = held != scripts.get_current_head()
        if outdated:
            _upgrade(connection, scripts, held)
        connection.commit()
        return outdated


def differences(db: Database) -> list[Any]:
    """Return what differs between a database's tables and `schema.py`, as alembic says it; nothing where they agree."""
    with db.engine.connect() as connection:
        return compare_metadata(_context(connection), metadata)


def _locked(db: Database) -> sa.Connection:
    """Return a connection in a transaction that no other start overlaps with. Raises DatabaseDown."""
    # SQLite's transactions begin with the lock of the one writer. On PostgreSQL, SERIALIZABLE would look at the tables as they were
    # before the wait for the lock.
    engine = db.engine if db.is_sqlite else db.engine.execution_options(isolation_level="READ COMMITTED")
    try:
        connection = engine.connect()
        connection.begin()
        if not db.is_sqlite:
            connection.exec_driver_sql(f"set local lock_timeout = '{WAIT}'")
            connection.exec_driver_sql("set local statement_timeout = 0")  # a step may have many rows to change
            connection.execute(sa.text("select pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        return connection
    except (OperationalError, InterfaceError) as error:
        raise DatabaseDown("the database does not answer, or another start holds it", hint="see its own log") from error


def _context(connection: sa.Connection) -> MigrationContext:
    return MigrationContext.configure(connection, opts={"compare_type": True})


def _revision(connection: sa.Connection, scripts: ScriptDirectory) -> str | None:
    """Return the revision that the database is at; None where it is empty. Raises SchemaError where this version knows it not."""
    held = _context(connection).get_current_revision()
    if held is None:
        strange = set(sa.inspect(connection).get_table_names()) & set(metadata.tables)
        if strange:
            raise SchemaError(
                f"the database holds tables that Kivnun's migrations did not make: {', '.join(sorted(strange))}",
                hint="give --db an empty database, or one that kivnun serve made",
            )
        return None
    try:
        scripts.get_revision(held)
    except (CommandError, ResolutionError):
        raise SchemaError(
            f"the database was written by a later version of Kivnun: it is at revision {held}, this version knows "
            f"{scripts.get_current_head()}",
            hint="start the version that wrote it, or restore the copy made before the upgrade; see docs/guides/service-operate.md",
        ) from None
    return held


def _upgrade(connection: sa.Connection, scripts: ScriptDirectory, held: str | None) -> None:
    head = scripts.get_current_head()
    assert head is not None

    def steps(_held: Any, _context: MigrationContext) -> Any:
        return scripts._upgrade_revs(head, cast(str, held))  # pyright: ignore[reportPrivateUsage]  # alembic's own `upgrade` calls it so

    context = MigrationContext.configure(connection, opts={"fn": steps, "script": scripts})
    with Operations.context(context):
        context.run_migrations()
