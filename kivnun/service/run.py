"""A service's start on its folder, and the API's own process. Loads no model, and nothing that could.

Next: `app.py` (what the API answers), `supervisor.py` (who starts this and the other parts).
"""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
import uvicorn
from starlette.types import ASGIApp

from kivnun.errors import StorageError
from kivnun.jobs.database import Database, sqlite_url
from kivnun.jobs.ids import new_id
from kivnun.jobs.leases import release_all
from kivnun.jobs.migrate import prepare
from kivnun.jobs.place import Place
from kivnun.jobs.schema import answerers, api_keys
from kivnun.jobs.tenants import DEFAULT_TENANT, SCOPES, add_key, add_tenant, new_key
from kivnun.service.app import make_app
from kivnun.service.context import Service
from kivnun.service.scratch import scratch_folder
from kivnun.service.settled import SettledClock
from kivnun.service.timely import TimelyProtocol

# Longer than clients keep an idle connection, so that they are the ones who close it, and never send into a closed one.
KEEP_ALIVE_S = 75
BACKLOG = 1024
MOST_DESCRIPTORS = 16_384


@dataclass(frozen=True, slots=True)
class Tls:
    """The files of a certificate, with those that signed it, and of its key."""

    certificate: Path
    key: Path


@contextmanager
def held(data: Path) -> Iterator[None]:
    """Hold a data folder, which is made where it is not there. Raises StorageError where another service holds it."""
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (data / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                f"another service runs on {data}",
                hint="stop it, or give this one another --data; see kivnun worker for more workers",
            ) from None
        yield


def begin(place: Place, db: Database, admin_key: str | None) -> str | None:
    """Make a held folder ready for its processes. Return an admin key that was made for an empty service, to be shown once.

    `admin_key` is one that the operator chose; it is recorded at every start, and then none is made."""
    prepare(db)
    shutil.rmtree(place.data / "scratch", ignore_errors=True)
    if place.db_url == sqlite_url(place.data / "kivnun.sqlite"):
        db.write("start", _nobody_lives)
    return db.write("admin key", lambda tx: _admin_key(tx, admin_key, time.time()))


def serve_api(place: Place, listener: socket.socket, drain_s: float, tls: Tls | None = None, ready: int | None = None) -> None:
    """Answer on a socket until SIGTERM; what is being answered then is finished, for `drain_s` at most.

    `ready` is a descriptor to which a byte is written once requests are answered."""
    with scratch_folder(place.data, "api") as scratch:
        _serve(make_app(service_of(place, scratch)), listener, drain_s, tls, ready)


def _serve(app: ASGIApp, listener: socket.socket, drain_s: float, tls: Tls | None, ready: int | None) -> None:
    waiting = [] if ready is None else [ready]

    async def is_ready() -> None:
        if waiting:
            os.write(waiting.pop(), b"\n")

    config = uvicorn.Config(
        app,
        http=TimelyProtocol,
        limit_concurrency=_most_connections(),
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        callback_notify=is_ready,  # called as soon as the server runs, and now and then
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, int(drain_s)),
        ssl_certfile=tls.certificate if tls else None,
        ssl_keyfile=tls.key if tls else None,
    )
    uvicorn.Server(config).run(sockets=[listener])


def _most_connections() -> int:
    """Return how many clients may be connected: half of the descriptors that this process may have."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most // 2


def service_of(place: Place, scratch: Path) -> Service:
    """Return what handlers of one process share."""
    return Service(place.database(), place.blobs(), place.service_config(), scratch, SettledClock(time.time))


def _nobody_lives(tx: sa.Connection) -> None:
    """Take every lease and address from processes of the last start: the folder was held by nobody, so they are gone."""
    release_all(tx)
    tx.execute(sa.delete(answerers))


def _admin_key(tx: sa.Connection, chosen: str | None, now: float) -> str | None:
    add_tenant(tx, DEFAULT_TENANT, now)
    if chosen is not None:
        add_key(tx, chosen, DEFAULT_TENANT, "KIVNUN_ADMIN_KEY", SCOPES, now, new_id)
        return None
    if tx.execute(sa.select(api_keys.c.id).limit(1)).first() is not None:
        return None
    made = new_key()
    add_key(tx, made, DEFAULT_TENANT, "admin", SCOPES, now, new_id)
    return made
