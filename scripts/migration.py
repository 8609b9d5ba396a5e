"""Writes the next revision of the service's tables: what `kivnun/jobs/schema.py` has and the revisions so far do not make.

    python scripts/migration.py "jobs have a priority"     the next one; read it before it is committed
    python scripts/migration.py --first                    the first one again, as long as no version was released with it

A revision is written from SQLite's tables; what differs on PostgreSQL is found by `tests/unit/test_migrations.py`, on both.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from alembic.autogenerate import produce_migrations, render_python_code
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from kivnun.jobs.database import Database, sqlite_url
from kivnun.jobs.migrate import MIGRATIONS, prepare
from kivnun.jobs.schema import metadata


def write(message: str, *, first: bool) -> Path | None:
    """Write a revision; return its file, or None where there is nothing to do."""
    if first:
        for path in (MIGRATIONS / "versions").glob("[0-9]*.py"):
            path.unlink()
    with tempfile.TemporaryDirectory() as folder:
        db = Database(sqlite_url(Path(folder) / "so-far.sqlite"))
        if not first:
            prepare(db)
        with db.engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True, "target_metadata": metadata})
            ops = produce_migrations(context, metadata).upgrade_ops
        db.close()
    if ops is None or ops.is_empty():
        return None
    scripts = ScriptDirectory(str(MIGRATIONS))
    number = f"{int(scripts.get_current_head() or 0) + 1:04}"
    lines = render_python_code(ops, migration_context=context).splitlines()
    upgrades = "\n".join(line for line in lines if not line.lstrip().startswith("# ###"))
    made = scripts.generate_revision(number, message, upgrades=upgrades.lstrip())
    assert made is not None
    path = Path(made.path)
    ruff = Path(sys.executable).parent / "ruff"
    for words in (["check", "--fix", "--quiet"], ["format", "--quiet"]):
        subprocess.run([ruff, *words, path], check=True)
    return path


if __name__ == "__main__":
    first = sys.argv[1:] == ["--first"]
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(write("first tables" if first else sys.argv[1], first=first) or "nothing to do: the revisions make what schema.py has")
