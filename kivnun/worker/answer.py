"""The inference worker: one process, one base in memory, every adapter of it on demand.

It opens a door (`serve/listening.py`), writes where it can be reached into the records with a secret of its own, and answers until
it is told to stop. Whoever reads the records reaches it; one that was killed leaves its row, which the next worker of this base on
the machine clears. Next: `serve/scheduler.py` (how it answers), `kivnun/service/answers.py` (who asks).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shutil
import socket
import threading
import time
from pathlib import Path

import sqlalchemy as sa

from kivnun.errors import SpecError
from kivnun.jobs.config import ServiceConfig
from kivnun.jobs.database import Database, Transaction
from kivnun.jobs.ids import NewId, new_id
from kivnun.jobs.place import Place
from kivnun.jobs.schema import answerers
from kivnun.serve.adapters import AdapterCache, AdapterFolders
from kivnun.serve.listening import Answerer, listening

LONGEST_SOCKET = 100  # bytes of a Unix socket's path, which the system limits to 107
STOP_LOOK_S = 0.05
DRAIN_S = 15.0

logger = logging.getLogger(__name__)


def serve(
    place: Place, base: str, stop: threading.Event, listen: str | None = None, *, toy_token_s: float = 0.0, new_id: NewId = new_id
) -> None:
    """Load a configured base and answer until `stop` is set. `listen` is HOST:PORT for callers on other machines (None: a socket
    of this one); `toy_token_s` how long a toy base takes for a token. Raises SpecError for a base that is not configured."""
    config = place.service_config()
    if base not in config.bases:
        raise SpecError(f"--base {base} is not configured", hint=f"configured are {', '.join(config.bases)}")
    worker = new_id("answerer_")
    folders = AdapterFolders(place.blobs(), place.data / "adapters" / worker)
    db = place.database()
    try:
        with contextlib.closing(_answerer(config, base, folders, toy_token_s)) as answerer:
            asyncio.run(_serve(place, db, answerer, worker, stop, listen))
    finally:
        folders.clear()
        db.close()


def _answerer(config: ServiceConfig, base: str, folders: AdapterFolders, toy_token_s: float) -> Answerer:
    entry = config.bases[base]
    if entry.trainer == "toy":
        from kivnun.serve.toy import ToyAnswerer

        return ToyAnswerer(base, AdapterCache(folders.fetch, _toy_adapter), toy_token_s)
    from kivnun.serve.resident import load_resident  # torch, for those who need it

    return load_resident(config, base, folders)


def _toy_adapter(folder: Path) -> tuple[Path, int]:
    return folder, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


async def _serve(place: Place, db: Database, answerer: Answerer, worker: str, stop: threading.Event, listen: str | None) -> None:
    secret = secrets.token_urlsafe(32)
    async with listening(answerer, listen or _socket(place.data, worker), secret) as door:
        await asyncio.to_thread(_register, place.data, db, worker, answerer.base, door.address, secret)
        logger.info("a base is ready to answer", extra={"action": "answerer_ready", "answerer": worker, "base": answerer.base})
        try:
            while not stop.is_set():
                await asyncio.sleep(STOP_LOOK_S)
        finally:
            await asyncio.to_thread(db.write, "answerer ends", lambda tx: _forget(tx, worker))
        for _ in range(int(DRAIN_S / STOP_LOOK_S)):  # what has begun may end; nobody finds the way here any more
            if not door.answering:
                return
            await asyncio.sleep(STOP_LOOK_S)


def _socket(data: Path, worker: str) -> str:
    path = data / "sockets" / f"{worker[-12:]}.sock"
    return f"unix:{path}" if len(str(path).encode()) <= LONGEST_SOCKET else "127.0.0.1:0"


def _register(data: Path, db: Database, worker: str, base: str, address: str, secret: str) -> None:
    gone = [row.id for row in db.read(lambda tx: _of(tx, base)) if _is_gone(row.address)]

    def write(tx: Transaction) -> None:
        for old in gone:
            _forget(tx, old)
        tx.execute(sa.insert(answerers).values(id=worker, base=base, address=address, secret=secret, created_at=time.time()))

    db.write("answerer", write)
    for old in gone:
        shutil.rmtree(data / "adapters" / old, ignore_errors=True)


def _of(tx: Transaction, base: str) -> list[sa.Row]:
    return list(tx.execute(sa.select(answerers).where(answerers.c.base == base)))


def _forget(tx: Transaction, worker: str) -> None:
    tx.execute(sa.delete(answerers).where(answerers.c.id == worker))


def _is_gone(address: str) -> bool:
    """Return whether an address of this machine leads nowhere. Of others' nothing can be told from here."""
    family, where = socket.AF_INET, ("", 0)
    if address.startswith("unix:"):
        family, where = socket.AF_UNIX, address.removeprefix("unix:")
    elif address.startswith("127.0.0.1:"):
        where = ("127.0.0.1", int(address.rpartition(":")[2]))
    else:
        return False
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        tried.settimeout(2.0)
        try:
            tried.connect(where)
        except (ConnectionRefusedError, FileNotFoundError):
            return True
        except OSError:
            return False
    return False
