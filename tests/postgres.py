"""A real PostgreSQL for tests: one server per test process, an empty database per test."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa


def binaries() -> Path:
    """Return the folder of the server's programs; skip the test where there is none, fail it in CI."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    if found:
        return found[-1].parent
    if on_path:
        return Path(on_path).parent
    reason = "PostgreSQL is not installed: make setup-system brings it"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def server() -> Iterator[str]:
    """Start a server that listens on a socket of its own folder; give the URL of its first database."""
    programs = binaries()
    folder = Path(tempfile.mkdtemp(prefix="kivnun-pg-", dir="/tmp"))  # short: a socket's path has 107 bytes at most
    # The server refuses root; `nobody` owns its folder then.
    as_other = ["setpriv", "--reuid=nobody", "--clear-groups"] if os.geteuid() == 0 else []
    if as_other:
        os.chown(folder, pwd.getpwnam("nobody").pw_uid, -1)
    data = folder / "data"
    try:
        _quietly(
            [*as_other, programs / "initdb", "-D", data, "-A", "trust", "-U", "kivnun", "--no-sync", "-E", "UTF8", "--locale=C"]
        )
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off -c max_connections=200"
        _quietly([*as_other, programs / "pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", options, "start"])
        try:
            yield f"postgresql+psycopg://kivnun@/postgres?host={folder}"
        finally:
            _quietly([*as_other, programs / "pg_ctl", "-D", data, "-m", "immediate", "stop"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def empty_database(server_url: str) -> AbstractContextManager[str]:
    """Make a database and give its URL; drop it at the end."""
    return copied_database(server_url, "template1")


@contextmanager
def copied_database(server_url: str, template: str) -> Iterator[str]:
    """Make a copy of a database that nobody is connected to, and give its URL; drop it at the end."""
    name = f"test_{uuid.uuid4().hex}"
    engine = sa.create_engine(server_url, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"create database {name} template {template}")
        yield sa.make_url(server_url).set(database=name).render_as_string(hide_password=False)
        with engine.connect() as connection:
            connection.exec_driver_sql(f"drop database {name} with (force)")
    finally:
        engine.dispose()


def _quietly(words: list[object]) -> None:
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/tmp")
