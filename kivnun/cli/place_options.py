"""The options that say where a service is, the same for every command that is part of one. Next: `serve.py`, `worker.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kivnun.jobs.place import Place

DB_VARIABLE, STORE_VARIABLE = "KIVNUN_DB", "KIVNUN_STORE"
_OPTIONS = (
    click.option("--data", type=click.Path(path_type=Path, file_okay=False), default=Path("kivnun-data"), show_default=True,
                 help="The folder of this machine's part of the service; without --db and --store all of it is there."),
    click.option("--db", "db_url", metavar="URL", envvar=DB_VARIABLE, show_envvar=True,
                 help="postgresql://USER:PASSWORD@HOST/NAME; by default a SQLite file in the data folder."),
    click.option("--store", "store_url", metavar="URL", envvar=STORE_VARIABLE, show_envvar=True,
                 help="s3://BUCKET/PREFIX or file:///FOLDER for files and adapters; by default in the data folder."),
    click.option("--config", type=click.Path(path_type=Path, dir_okay=False),
                 help="A YAML file with bases, prices and limits; docs/guides/service-operate.md."),
)  # fmt: skip


def place_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --data, --db, --store and --config to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def place_of(data: Path, db_url: str | None, store_url: str | None, config: Path | None) -> Place:
    """Return the place that the options say. Raises click.UsageError for a database of another kind."""
    try:
        from kivnun.jobs.place import place_in
    except ModuleNotFoundError as error:
        raise click.UsageError(f"{error.name} is not installed: pip install 'kivnun[service]'") from None
    kind = (db_url or "sqlite:").partition(":")[0].partition("+")[0]
    if kind not in ("sqlite", "postgresql", "postgres"):
        raise click.UsageError(f"--db {kind}:... is neither sqlite nor postgresql")
    return place_in(data, db_url, store_url, config.absolute() if config else None)
