"""The inference worker: one process, one base in memory, every adapter of it on demand.

It opens a door (`serve/listening.py`), writes where it can be reached into the records with a secret of its own, and answers until
it is told to stop. Whoever reads the records reaches it; one that was killed leaves its row, which the next worker of this base on
the machine clears. Next: `serve/scheduler.py` (how it answers), `kivnun/service/answers.py` (who asks).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import shutil
import socket
import threading
import time
from pathlib import Path

from kivnun.errors import SpecError
from kivnun.jobs import answerers
from kivnun.jobs.config import ServiceConfig
from kivnun.jobs.database import Database, Transaction
from kivnun.jobs.ids import NewId, new_id
from kivnun.jobs.place import Place
from kivnun.serve.adapters import AdapterCache, AdapterFolders
from kivnun.serve.listening import Answerer, listening

LONGEST_SOCKET = 100  # bytes of a Unix socket's path, which the system limits to 107
STOP_LOOK_S = 0.05
DRAIN_S = 15.0

logger = logging.getLogger(__name__)


def serve(
    place: Place,
    base: str,
    stop: threading.Event,
    listen: str | None = None,
    memory_bytes: float | None = None,
    *,
    toy_token_s: float = 0.0,
    new_id: NewId = new_id,
) -> None:
    """Load a configured base and answer until `stop` is set. `listen` is HOST:PORT for callers on other machines (None: a socket
    of this one), `memory_bytes` what the worker may take (None: what the machine has); `toy_token_s` how long a toy base takes for
    a token. Raises SpecError for a base that is not configured."""
    config = place.service_config()
    if base not in config.bases:
        raise SpecError(f"--base {base} is not configured", hint=f"configured are {', '.join(config.bases)}")
    worker = new_id("answerer_")
    folders = AdapterFolders(place.blobs(), place.data / "adapters" / worker)
    db = place.database()
    try:
        with contextlib.closing(_answerer(config, base, folders, memory_bytes, toy_token_s)) as answerer:
            asyncio.run(_serve(place, db, answerer, worker, stop, listen))
    finally:
        folders.clear()
        db.close()


def _answerer(
    config: ServiceConfig, base: str, folders: AdapterFolders, memory_bytes: float | None, toy_token_s: float
) -> Answerer:
    entry = config.bases[base]
    if entry.trainer == "toy":
        from kivnun.serve.toy import ToyAnswerer

        return ToyAnswerer(base, AdapterCache(folders.fetched, _toy_adapter), toy_token_s)
    from kivnun.serve.resident import load_resident  # torch, for those who need it

    return load_resident(config, base, folders, memory_bytes)


def _toy_adapter(folder: Path) -> tuple[Path, int]:
    return folder, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


async def _serve(place: Place, db: Database, answerer: Answerer, worker: str, stop: threading.Event, listen: str | None) -> None:
    secret = secrets.token_urlsafe(32)
    async with listening(answerer, listen or _socket(place.data, worker), secret) as door:
        row = answerers.Answerer(worker, answerer.base, door.address, answerers.this_machine(), time.time(), secret)
        await asyncio.to_thread(_register, place.data, db, row)
        logger.info("a base is ready to answer", extra={"action": "answerer_ready", "answerer": worker, "base": answerer.base})
        try:
            await _beat(db, row, stop)
        finally:
            await asyncio.to_thread(db.write, "answerer ends", lambda tx: answerers.forget(tx, worker))
        for _ in range(int(DRAIN_S / STOP_LOOK_S)):  # what has begun may end; nobody finds the way here any more
            if not door.answering:
                return
            await asyncio.sleep(STOP_LOOK_S)


async def _beat(db: Database, row: answerers.Answerer, stop: threading.Event) -> None:
    """Show that the worker lives, and remove those that no longer do, until `stop` is set."""
    stillness = answerers.Stillness(time.monotonic)
    for beat in itertools.count(1):
        for _ in range(int(answerers.BEAT_S / STOP_LOOK_S)):
            if stop.is_set():
                return
            await asyncio.sleep(STOP_LOOK_S)
        try:
            await asyncio.to_thread(_show, db, row, beat, stillness)
        except Exception as error:  # the next beat tries again; whoever has found the way here is answered meanwhile
            logger.warning("a beat could not be written: %s", type(error).__name__, extra={"action": "answerer_beat"})


def _show(db: Database, row: answerers.Answerer, beat: int, stillness: answerers.Stillness) -> None:
    db.write("answerer beat", lambda tx: answerers.show(tx, row, beat))
    for lost, still_s in stillness.of({each.id: each.beat for each in db.read(answerers.page)}).items():
        if still_s >= answerers.SWEPT_S:
            db.write("answerer lost", lambda tx, lost=lost: answerers.forget(tx, lost))


def _socket(data: Path, worker: str) -> str:
    path = data / "sockets" / f"{worker[-12:]}.sock"
    return f"unix:{path}" if len(str(path).encode()) <= LONGEST_SOCKET else "127.0.0.1:0"


def _register(data: Path, db: Database, row: answerers.Answerer) -> None:
    rows = db.read(lambda tx: answerers.page(tx, row.base))
    gone = [each.id for each in rows if each.machine == row.machine and _is_gone(each.where)]

    def write(tx: Transaction) -> None:
        for old in gone:
            answerers.forget(tx, old)
        answerers.show(tx, row, 0)

    db.write("answerer", write)
    for old in gone:
        shutil.rmtree(data / "adapters" / old, ignore_errors=True)


def _is_gone(address: str) -> bool:
    """Return whether nobody listens at an address of this machine. A path that is not there may be one of another container."""
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
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
