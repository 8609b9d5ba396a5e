"""`kivnun serve`: the whole hosted service on one machine. Next: `kivnun/service/supervisor.py`, `kivnun/service/run.py`."""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kivnun.cli.listening import listen, require_tls, url_of
from kivnun.cli.place_options import DB_VARIABLE, STORE_VARIABLE, place_of, place_options

if TYPE_CHECKING:
    from kivnun.jobs.database import Database, Transaction
    from kivnun.jobs.place import Place
    from kivnun.service.room import Room
    from kivnun.service.supervisor import Part, Supervisor

KEY_VARIABLE = "KIVNUN_ADMIN_KEY"
MIN_KEY_LETTERS = 16
START_S = 120.0  # a machine that is busy may take long to load everything
LAST_S = 5.0  # of a drain: for inference workers, which others need until they have ended
LOOK_S = 1.0  # how often it is asked which bases are wanted


@click.command(short_help="Run the hosted fine-tuning service.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="The port; 0 takes a free one.")
@place_options
@click.option("--workers", type=click.IntRange(0), default=1, show_default=True, help="Jobs that are trained at the same time.")
@click.option(
    "--drain-s", type=click.FloatRange(1, 600), default=28.0, show_default=True, help="Seconds that SIGTERM leaves the parts."
)
@click.option("--tls-cert", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="The certificate, in PEM.")
@click.option("--tls-key", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="The certificate's key, in PEM.")
@click.option("--behind-proxy", is_flag=True, help="TLS ends in a proxy before this, and nobody else reaches the address.")
@click.option("--json", "as_json", is_flag=True, help="Print {status, url, admin_key, data} as one JSON object once it serves.")
def serve(
    host: str, port: int, data: Path, db_url: str | None, store_url: str | None, config: Path | None, workers: int, drain_s: float,
    tls_cert: Path | None, tls_key: Path | None, behind_proxy: bool, as_json: bool,
) -> None:  # fmt: skip
    """Serve fine-tuning to OpenAI's client: files, jobs, tuned models and their answers, until it is stopped.

    The first start prints an admin key, once; KIVNUN_ADMIN_KEY sets one instead. Everything is kept in the data folder: a service
    that is killed goes on where it was. SIGTERM and Ctrl-C finish what is being answered and hand jobs over; a second one ends at
    once. Needs the extra `service`.
    """
    place = place_of(data, db_url, store_url, config)
    tls = require_tls(host, tls_cert, tls_key, behind_proxy=behind_proxy)
    chosen = _chosen_key()
    from kivnun.cli.screen import print_json, stdout
    from kivnun.service.logs import configure
    from kivnun.service.room import Room
    from kivnun.service.run import begin, held
    from kivnun.service.supervisor import shares

    offered = place.service_config()
    room = Room(offered, workers > 0, time.monotonic)
    residents = [base for base, entry in offered.bases.items() if entry.resident]
    given = room.allowances() if len(residents) > 1 else {}  # one has the whole machine, unless others are loaded beside it
    configure()
    logging.getLogger("alembic").setLevel(logging.WARNING)
    place.keep_private()
    with held(place.data), listen(host, port) as listener:
        db = place.database()
        key = begin(place, db, chosen)
        url = url_of(host, listener.getsockname()[1], tls)
        if not as_json and key is not None:
            stdout().print(f"admin key, shown this once: {key}")
        certificate = ["--tls-cert", str(tls_cert), "--tls-key", str(tls_key)] if tls else []
        is_ready, says_ready = os.pipe()
        inherited = ["--fd", str(listener.fileno()), "--ready-fd", str(says_ready)]
        drain = ["--drain-s", str(max(drain_s / 2, drain_s - LAST_S))]
        parts = [
            _part("api", ["api", *certificate, *inherited, *drain], place, (listener.fileno(), says_ready)),
            _part("clerk", ["clerk", *drain], place),
            *(
                _part(f"tune {number}", ["tune", *drain], place, cores=cores)
                for number, cores in enumerate(shares(sorted(os.sched_getaffinity(0)), workers), 1)
            ),
            *(_answering(base, place, given.get(base)) for base in residents),
        ]
        supervisor = _supervisor(place, db, parts, room, drain_s)
        stop, at_once = _signals()
        supervisor.start()
        if _answers(supervisor, is_ready, stop):
            if as_json:
                print_json({"status": "serving", "url": url, "admin_key": key, "data": str(place.data)})
            else:
                stdout().print(f"serving at {url}/v1, pages at {url}/; Ctrl-C stops")
            supervisor.keep(stop)
        supervisor.drain(at_once)
        db.close()


def _chosen_key() -> str | None:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if key and (len(key) < MIN_KEY_LETTERS or not key.isascii() or not key.isprintable() or " " in key):
        raise click.UsageError(f"{KEY_VARIABLE} must hold {MIN_KEY_LETTERS} letters or more of ASCII, without spaces")
    return key or None


def _part(name: str, words: Sequence[str], place: Place, passed: tuple[int, ...] = (), cores: frozenset[int] = frozenset()) -> Part:
    """Return a part of this service. Its addresses may hold passwords, and go by the environment: all can see command lines."""
    from kivnun.service.supervisor import Part

    config = [] if place.config is None else ["--config", str(place.config)]
    return Part(name, ["worker", *words, "--data", str(place.data), *config], name.startswith("answer "), passed, cores)


def _answering(base: str, place: Place, num_bytes: float | None) -> Part:
    """Return the inference worker of a base, which may take so much memory; None: what the machine has."""
    given = [] if not num_bytes else ["--memory-gib", f"{num_bytes / 2**30:.3f}"]
    return _part(f"answer {base}", ["answer", "--base", base, *given], place)


def _supervisor(place: Place, db: Database, parts: Sequence[Part], room: Room, drain_s: float) -> Supervisor:
    """Return what keeps the parts, and an inference worker for every other base that is asked for, as far as there is room."""
    from kivnun.service.supervisor import Supervisor

    # Parts compute side by side: a thread that waits for its job's others leaves its core to another job's, unless asked otherwise.
    environment = {"OMP_WAIT_POLICY": "passive"} | {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    environment |= {DB_VARIABLE: place.db_url, STORE_VARIABLE: place.store_url}
    return Supervisor(parts, _wanted(place, db, room), time.monotonic, environment, drain_s)


def _wanted(place: Place, db: Database, room: Room) -> Callable[[], Sequence[Part]]:
    from kivnun.jobs import wanted
    from kivnun.service.supervisor import Looking

    def look() -> Sequence[Part]:
        asks, recorded = db.read(lambda tx: (wanted.asks(tx), wanted.refusals(tx)))
        bases, refused = room.look(asks)
        changes = room.to_tell(recorded, refused)

        def tell(tx: Transaction) -> None:
            for base, why in changes.items():
                wanted.refuse(tx, base, why)

        if changes:
            db.write("bases refused", tell)
        return [_answering(base, place, room.num_bytes) for base in bases]

    return Looking(look, LOOK_S)


def _signals() -> tuple[threading.Event, threading.Event]:
    """Return what the first and the second SIGTERM or SIGINT set."""
    stop, at_once = threading.Event(), threading.Event()

    def heard(_number: int, _frame: object) -> None:
        (at_once if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, heard)
    return stop, at_once


def _answers(supervisor: Supervisor, ready: int, stop: threading.Event) -> bool:
    """Wait until the API says that it answers; return False where it is stopped before. Raises ServiceError."""
    from kivnun.errors import ServiceError

    until = time.monotonic() + START_S
    while not stop.is_set():
        if select.select([ready], [], [], 0.05)[0]:
            return True
        status = supervisor.ended("api")
        if status is not None or time.monotonic() > until:
            supervisor.kill()
            what = "did not answer in time" if status is None else f"ended with status {status}"
            raise ServiceError(f"the API {what}", hint="the log above says why")
    return False
