"""`kivnun worker`: one process of a service, on this machine or another. `kivnun serve` starts its parts by the same commands.

Next: `kivnun/service/supervisor.py`.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from kivnun.cli.listening import listen, require_tls
from kivnun.cli.place_options import place_of, place_options


def _drain_option(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option("--drain-s", type=click.FloatRange(0.5), default=25.0, show_default=True, help=f"Seconds that {what}.")


@click.group(short_help="Run one process of a service, here or on another machine.")
def worker() -> None:
    """Run one process of a service that others are part of, until it is stopped.

    Every process is told the same database and store. `kivnun serve` runs them all on one machine; these commands add more,
    elsewhere: docs/guides/service-operate.md.
    """


@worker.command(short_help="Train jobs.")
@place_options
@_drain_option("SIGTERM leaves the step in progress, and what does not answer")
def tune(data: Path, db_url: str | None, store_url: str | None, config: Path | None, drain_s: float) -> None:
    """Take jobs from the queue and train them, one at a time.

    SIGTERM hands the job over: what is trained of it is kept, and another worker goes on to the same bits.
    """
    place = place_of(data, db_url, store_url, config)
    stop = _told_to_stop()
    from kivnun.service.logs import configure
    from kivnun.worker.tune_jobs import work

    configure()
    place.keep_private()
    work(place, stop, drain_s=drain_s)
    _end()


@worker.command(short_help="Answer for one base and everything tuned from it.")
@place_options
@click.option("--base", required=True, help="The base's id in the configuration.")
@click.option("--listen", "listen_at", metavar="HOST:PORT", help="Where APIs of other machines reach it; else only this one's.")
@click.option(
    "--memory-gib",
    type=click.FloatRange(0, min_open=True),
    metavar="GIB",
    help="What the worker may take, which bounds what it answers at once; by default what the machine has.",
)
def answer(
    data: Path, db_url: str | None, store_url: str | None, config: Path | None, base: str, listen_at: str | None,
    memory_gib: float | None,
) -> None:  # fmt: skip
    """Keep one base in memory and answer chats and completions of it and of the models tuned from it.

    What APIs on other machines send to --listen is not encrypted: it belongs in a network of the service's own.
    """
    place = place_of(data, db_url, store_url, config)
    known = place.service_config().bases
    if base not in known:
        raise click.UsageError(f"--base {base!r} is not configured; there are {', '.join(sorted(known))}")
    stop = _told_to_stop()
    from kivnun.cli.process import keep_freed_memory

    keep_freed_memory()
    from kivnun.service.logs import configure
    from kivnun.worker.answer import serve

    configure()
    place.keep_private()
    serve(place, base, stop, listen_at, None if memory_gib is None else memory_gib * 2**30)


@worker.command(short_help="Judge files, deliver webhooks, run batches.")
@place_options
@_drain_option("SIGTERM leaves what is in progress")
def clerk(data: Path, db_url: str | None, store_url: str | None, config: Path | None, drain_s: float) -> None:
    """Do what nobody waits for: judge files, check new jobs, deliver webhooks, run batches, sweep up. Loads no model."""
    place = place_of(data, db_url, store_url, config)
    stop = _told_to_stop()
    from kivnun.service.clerk import run
    from kivnun.service.logs import configure

    configure()
    place.keep_private()
    run(place, stop, drain_s=drain_s)
    _end()


@worker.command(short_help="Answer the API's requests.")
@place_options
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="The port; 0 takes a free one.")
@click.option("--tls-cert", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="The certificate, in PEM.")
@click.option("--tls-key", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="The certificate's key, in PEM.")
@click.option("--behind-proxy", is_flag=True, help="TLS ends in a proxy before this, and nobody else reaches the address.")
@click.option(
    "--drain-s", type=click.FloatRange(0.5), default=20.0, show_default=True, help="Seconds that answers may take at SIGTERM."
)
@click.option("--fd", type=click.IntRange(0), hidden=True, help="A socket that listens already.")
@click.option("--ready-fd", type=click.IntRange(0), hidden=True, help="Where a byte is written once requests are answered.")
def api(
    data: Path, db_url: str | None, store_url: str | None, config: Path | None, host: str, port: int, tls_cert: Path | None,
    tls_key: Path | None, behind_proxy: bool, drain_s: float, fd: int | None, ready_fd: int | None,
) -> None:  # fmt: skip
    """Answer the API's requests: as many of these as there are machines, behind one balancer. Loads no model."""
    place = place_of(data, db_url, store_url, config)
    tls = require_tls(host, tls_cert, tls_key, behind_proxy=behind_proxy or fd is not None)
    listener = socket.socket(fileno=fd) if fd is not None else listen(host, port)
    from kivnun.service.logs import configure
    from kivnun.service.run import serve_api

    configure()
    place.keep_private()
    serve_api(place, listener, drain_s, tls, ready_fd)
    _end()


def _end() -> NoReturn:
    """End the process: nobody waits for a thread of it that still hangs in a call."""
    logging.shutdown()
    os._exit(0)


def _told_to_stop() -> threading.Event:
    """Return an event that SIGTERM or Ctrl-C sets; the second one ends the process at once."""
    stop = threading.Event()

    def heard(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, heard)
    return stop
