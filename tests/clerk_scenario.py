"""A process that is a clerk with one batch and some webhooks to see to, and that is killed at a durable point by name.

Reads lines of JSON: `{"place": [DATA, DB_URL, CONFIG], "kill": NAME or null, "at": n}`; for each it forks a clerk that kills itself
at the n-th such point, or ends when all is done, and prints `{"status": ..., "points": [...]}`. Forked from a process without
threads, so that what was imported need not be again.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from kivnun.jobs import batches, webhooks
from kivnun.jobs.database import Database
from kivnun.jobs.place import Place, place_in
from kivnun.jobs.schema import deliveries
from kivnun.jobs.usage import Charge
from kivnun.service import batching, clerk
from kivnun.service.batching import RunBatches
from kivnun.service.delivering import DeliverWebhooks

TERM_S = 0.4
LINES_AT_ONCE = 2


class Noting:
    """Answers each question with its own words, and notes in a file that it was asked."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def complete(self, tenant: str, key_id: str, endpoint: str, body: dict[str, Any]) -> tuple[dict[str, Any], Charge]:
        with self._path.open("a") as notes:
            notes.write(body["prompt"] + "\n")
        await asyncio.sleep(0.01)
        used = Charge(tenant, "toy", "toy", key_id, (("prompt", 1, 1.0), ("completion", 1, 1.0)))
        return {"choices": [{"text": body["prompt"]}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}, used


def is_done(db: Database) -> bool:
    def look(tx: sa.Connection) -> bool:
        pending = tx.execute(sa.select(deliveries.c.id).where(deliveries.c.status == "pending")).first()
        return not batches.open_batches(tx) and not webhooks.has_untold(tx) and pending is None

    return db.read(look)


def clerk_until(place: Place, kill: str | None, at: int, points: int) -> None:
    """Be a clerk until all is done, or until the n-th point of a name."""
    for module, name, value in (
        (clerk, "BEAT_S", 0.1), (clerk, "IDLE_S", 0.01), (clerk, "STANDBY_S", 0.05),
        (batching, "AT_ONCE_A_TENANT", LINES_AT_ONCE), (batching, "WAIT_S", 0.005),
    ):  # fmt: skip
        setattr(module, name, value)
    seen: Counter[str] = Counter()
    lock = threading.Lock()

    def watch(point: str) -> None:
        with lock:
            seen[point] += 1
            os.write(points, f"{point}\n".encode())
            if point == kill and seen[point] == at:
                os.kill(os.getpid(), signal.SIGKILL)

    stop = threading.Event()
    db = place.database()

    def look() -> None:
        while not is_done(db) and not stop.wait(0.02):
            pass
        stop.set()

    threading.Thread(target=look, daemon=True).start()
    notes = place.data / "asked"
    clerk.run(
        place, stop, watch, {"batches": lambda service: RunBatches(service, Noting(notes)), "webhooks": DeliverWebhooks}, TERM_S
    )
    os._exit(0)


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        data, db_url, config = asked["place"]
        place = place_in(Path(data), db_url, config=Path(config))
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            clerk_until(place, asked["kill"], asked["at"], theirs)
        os.close(theirs)
        with os.fdopen(ours) as stream:
            points = stream.read().splitlines()
        _, status = os.waitpid(child, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), "points": points}), flush=True)


if __name__ == "__main__":
    main()
