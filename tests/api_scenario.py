"""A process that keeps an API on one address: whenever it is killed, another one is started, as the supervisor does.

Prints the port; then reads lines that hold a number. Each kills the API and starts one that kills itself at that point of its
durable effects (0: at none), and prints as JSON which points were passed since the line before. An API is forked from a process
without threads, so that what was imported need not be again; the socket outlives them all, so that a client waits for the next.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path

from kivnun.jobs.place import Place, place_in
from kivnun.service import run
from kivnun.service.app import routes
from kivnun.service.context import Service
from kivnun.service.run import serve_api


def be_api(place: Place, listener: socket.socket, kill_at: int, points: int) -> None:
    """Answer until killed."""
    lock, count = threading.Lock(), 0

    def watch(point: str) -> None:
        nonlocal count
        if point.endswith(" key used"):  # it comes with time, not with a write
            return
        with lock:
            count += 1
            os.write(points, f"{point}\n".encode())
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    service_of = run.service_of

    def watched(place: Place, scratch: Path) -> Service:
        return replace(service_of(place, scratch), db=place.database(watch), blobs=place.blobs(watch))

    run.service_of = watched
    serve_api(place, listener, drain_s=1.0)


class Kept:
    """The API that runs now."""

    def __init__(self, place: Place, listener: socket.socket) -> None:
        self._place, self._listener = place, listener
        self._points = -1

    def start(self, kill_at: int) -> None:
        self._points, theirs = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            be_api(self._place, self._listener, kill_at, theirs)
            os._exit(0)
        os.close(theirs)
        self.descriptor = os.pidfd_open(self._child)

    def kill(self) -> list[str]:
        """End it, if it has not ended; return the points it passed."""
        os.kill(self._child, signal.SIGKILL)
        _, status = os.waitpid(self._child, 0)
        os.close(self.descriptor)
        assert status == signal.SIGKILL, status
        with os.fdopen(self._points) as stream:
            return stream.read().splitlines()


def main() -> None:
    place = place_in(Path(sys.argv[1]), sys.argv[2], config=Path(sys.argv[3]))
    list(routes())  # imported before the first fork
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        print(listener.getsockname()[1], flush=True)
        kept = Kept(place, listener)
        kept.start(0)
        passed: list[str] = []
        while True:
            ready, _, _ = select.select([sys.stdin, kept.descriptor], [], [])
            passed += kept.kill()
            if sys.stdin in ready:
                line = sys.stdin.readline()
                if not line:
                    return
                print(json.dumps(passed), flush=True)
                passed = []
                kept.start(int(line))
            else:
                kept.start(0)


if __name__ == "__main__":
    main()
