"""A service for tests: its records in a folder, its API in a thread of this process, real HTTP between."""

from __future__ import annotations

import functools
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa
import uvicorn

from kivnun.jobs.config import ServiceConfig
from kivnun.jobs.database import Database, sqlite_url
from kivnun.jobs.ids import new_id
from kivnun.jobs.place import Place, place_in
from kivnun.jobs.schema import metadata
from kivnun.jobs.tenants import SCOPES, add_key, add_tenant, find_tenant
from kivnun.service.app import make_app
from kivnun.service.context import Service
from kivnun.service.timely import TimelyProtocol

KEY = "sk-kivnun-test-key-of-the-default-tenant"
OTHER_KEY = "sk-kivnun-test-key-of-another-tenant"
TOY = ServiceConfig.model_validate(
    {"bases": {"toy": {"trainer": "toy"}, "toy-2": {"trainer": "toy"}}, "limits": {"requests_per_minute": 100_000}}
)


@dataclass
class Clock:
    """Stands still until a test turns it."""

    now: float = field(default_factory=time.time)

    def __call__(self) -> float:
        return self.now


def place(folder: Path, db_url: str | None = None, config: Path | None = None) -> Place:
    """Return a place in a folder, with its tables and two tenants: `default` (KEY, every scope) and `other` (OTHER_KEY)."""
    made = place_in(folder, db_url, config=config)
    file = folder / "kivnun.sqlite"
    if db_url is None and not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(filled_sqlite())
    else:
        db = made.database()
        fill(db)
        db.close()
    return made


@functools.cache
def filled_sqlite() -> bytes:
    """Return the file of a database as `fill` leaves it: copying it is faster than making its tables."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "filled.sqlite"
        db = Database(sqlite_url(file))
        fill(db)
        db.close()
        return file.read_bytes()


def fill(db: Database) -> None:
    """Make the tables and two tenants, where they are not there."""
    if not sa.inspect(db.engine).has_table("tenants"):
        db.write("schema", metadata.create_all)
    if db.read(lambda tx: find_tenant(tx, "other")) is not None:
        return
    for tenant, key, scopes in (("default", KEY, SCOPES), ("other", OTHER_KEY, ("read", "data", "tune", "chat"))):
        db.write("tenant", lambda tx, tenant=tenant: add_tenant(tx, tenant, time.time()))
        db.write("key", lambda tx, t=tenant, k=key, s=scopes: add_key(tx, k, t, "test", s, time.time(), new_id))


def service_at(made: Place, config: ServiceConfig = TOY) -> Service:
    """Return what the API's handlers share."""
    scratch = made.data / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    return Service(made.database(), made.blobs(), config, scratch, time.time)


@contextmanager
def api(service: Service) -> Iterator[str]:
    """Serve the API on a free port; give its address (without /v1)."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(make_app(service), http=TimelyProtocol, log_level="warning", lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the API did not start"
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
