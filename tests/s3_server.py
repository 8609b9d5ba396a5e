"""A real server that speaks S3's protocol, and a way to it that can be made to hang."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

BUCKET = "kivnun-blobs"
SERVER = """
import sys
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""


@contextmanager
def s3_server() -> Iterator[int]:
    """Run a server with one empty bucket; give its port."""
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        assert httpx.put(f"http://127.0.0.1:{port}/{BUCKET}").status_code == 200
        yield port
    finally:
        process.terminate()
        process.communicate()


def s3_url_of(port: int, prefix: str = "a/prefix") -> str:
    return f"s3://{BUCKET}/{prefix}?endpoint=http://127.0.0.1:{port}&region=us-east-1&access_key_id=test&secret_access_key=test"


class Valve:
    """A port in front of another. While `hangs` is set, whoever connects is let in and hears nothing, as whoever is connected."""

    def __init__(self, port: int) -> None:
        self.hangs, self.swallowed = threading.Event(), threading.Event()
        self._to = port
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = self._door.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._door.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                inner, _ = self._door.accept()
                outer = socket.create_connection(("127.0.0.1", self._to))
                for source, target in ((inner, outer), (outer, inner)):
                    threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                if self.hangs.is_set():
                    self.swallowed.set()
                    threading.Event().wait()  # for good: half a request is none
                target.sendall(piece)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.close()
