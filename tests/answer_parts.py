"""Inference workers for tests: in a thread of this process or as a process that can be killed, and tuned models for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from kivnun.artifacts import hash_folder
from kivnun.jobs import models, tuning
from kivnun.jobs.database import Transaction
from kivnun.jobs.ids import new_id
from kivnun.jobs.place import Place
from kivnun.jobs.schema import answerers
from kivnun.worker.answer import serve
from service_parts import place


def place_with(folder: Path, config: str) -> Place:
    """Return a place with tables, two tenants and a configuration in YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "service.yaml").write_text(config, encoding="utf-8")
    return place(folder, config=folder / "service.yaml")


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def registered(place: Place, base: str) -> list[str]:
    """Return the ids of a base's workers."""
    db = place.database()
    found = db.read(lambda tx: list(tx.execute(sa.select(answerers.c.id).where(answerers.c.base == base)).scalars()))
    db.close()
    return found


@contextmanager
def worker(place: Place, base: str, token_s: float = 0.0) -> Iterator[threading.Thread]:
    """Run a worker in a thread of this process."""
    stop, before = threading.Event(), registered(place, base)
    thread = threading.Thread(target=lambda: serve(place, base, stop, toy_token_s=token_s), daemon=True)
    thread.start()
    until(lambda: bool(set(registered(place, base)) - set(before)) or not thread.is_alive(), 60)
    assert thread.is_alive(), "the worker did not start"
    try:
        yield thread
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def worker_process(place: Place, base: str, token_s: float = 0.0) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker as a process of its own."""
    code = (
        "import sys, threading; from pathlib import Path; from kivnun.jobs.place import Place;"
        "from kivnun.worker.answer import serve;"
        "serve(Place(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])), sys.argv[5], threading.Event(), "
        "toy_token_s=float(sys.argv[6]))"
    )
    before = registered(place, base)
    words = [str(place.data), place.db_url, place.store_url, str(place.config), base, str(token_s)]
    with subprocess.Popen([sys.executable, "-c", code, *words], env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        try:
            until(lambda: bool(set(registered(place, base)) - set(before)) or process.poll() is not None, 60)
            assert process.poll() is None, "the worker did not start"
            yield process
        finally:
            process.kill()


def add_model(place: Place, base: str, name: str, folder: Path, tenant: str = "default", content_hash: str | None = None) -> str:
    """Record an adapter's folder as a tuned model; return its hash, which the record says (or `content_hash` instead)."""
    blobs, db = place.blobs(), place.database()
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [
        {"path": str(path.relative_to(folder)), "blob": blobs.put(tenant, path), "bytes": path.stat().st_size, "sha256": ""}
        for path in paths
    ]
    manifest = blobs.put_bytes(tenant, json.dumps({"files": files}).encode())
    found = hash_folder(folder)

    job = f"ftjob-{name}"

    def write(tx: Transaction) -> None:
        tuning.create(tx, tuning.Job(job, tenant, 1.0, base, base, "file-1", {}, 1, status="succeeded"), new_id)
        models.add(tx, models.Model(name, tenant, 2.0, job, base, 1, manifest, content_hash or found))

    db.write("model", write)
    db.close()
    return found
