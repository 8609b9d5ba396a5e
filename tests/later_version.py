"""A version of the service after this one, as far as its tables go: for tests of upgrades."""

from __future__ import annotations

import shutil
from pathlib import Path

from kivnun.jobs.migrate import MIGRATIONS

LATER = '''"""A later version has a note on each job, and fills it."""

import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = "{head}"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("note", sa.Text(), nullable=True))
    op.execute("update jobs set note = 'from before' where status = 'queued'")
    {more}
'''


def later_version(folder: Path, more: str = "") -> Path:
    """Return the migrations of a version after this one."""
    shutil.copytree(MIGRATIONS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    head = max(path.stem.split("_")[0] for path in (folder / "versions").glob("[0-9]*.py"))
    (folder / "versions" / "9999_later.py").write_text(LATER.format(head=head, more=more), encoding="utf-8")
    return folder
