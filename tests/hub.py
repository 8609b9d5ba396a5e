"""A stand-in of the Hugging Face hub on this machine: a real HTTP server that answers what huggingface_hub asks for.

It holds repositories of files at one commit, keeps large files apart under their SHA-256 as the hub does (the address of a file
leads on to another one, which knows ranges), and can be told to cut a transfer, to stop in the middle of one, to send other bytes
than it said, or to answer with a status. It remembers every request.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
LARGE = 4096  # bytes from which a file is kept apart


@dataclass(frozen=True, slots=True)
class Request:
    """One request, with the range that it asked for."""

    method: str
    path: str
    range: str | None


@dataclass
class Repository:
    """Files by name at one commit, and the branches that lead to it. `refusal` is (status, X-Error-Code) for everything."""

    files: dict[str, bytes]
    commit: str = COMMIT
    branches: tuple[str, ...] = ("main",)
    refusal: tuple[int, str] | None = None

    def entry(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
        if is_large(content):
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
        return entry


@dataclass
class Hub:
    """The server. `cuts` are byte counts after which transfers of a file break off, one for each request; `stall_at` holds one
    transfer up until `released`; `sends` are bytes sent in place of a file's own; `status` answers every request."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    stall_at: dict[str, int] = field(default_factory=dict)
    sends: dict[str, bytes] = field(default_factory=dict)
    status: int | None = None
    stalled: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def put(self, name: str, folder: Path, more: Mapping[str, bytes] = {}, **named: Any) -> Repository:
        """Hold the files of a folder as a repository of this name."""
        files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        self.repositories[name] = Repository({**files, **more}, **named)
        return self.repositories[name]

    def got(self, name: str) -> list[str | None]:
        """Return the ranges of the requests for a file's content, in order."""
        return [it.range for it in self.requests if it.method == "GET" and it.path.endswith(f"/{name}") and "/resolve/" in it.path]

    def fetched(self) -> set[str]:
        """Return the names of the files whose content was asked for."""
        return {it.path.rpartition("/")[2] for it in self.requests if it.method == "GET" and re.search("/resolve/|/cdn/", it.path)}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def is_large(content: bytes) -> bool:
    return len(content) >= LARGE


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the hub's own list of requests is the log."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range")))
        if self.hub.status is not None:
            return self._send(self.hub.status)
        if cdn := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            return self._content(self.hub.repositories[cdn[1]].files[cdn[2]], cdn[2])
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or resolve
        repository = self.hub.repositories.get(found[1]) if found else None
        if found is None or repository is None:
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        if repository.refusal is not None:
            return self._send(repository.refusal[0], {"X-Error-Code": repository.refusal[1]})
        revision = resolve[2] if resolve else found[3] or "main"
        if revision not in (repository.commit, *repository.branches):
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        if api:
            return self._api(repository, found[1], found[2])
        assert resolve is not None
        return self._file(repository, found[1], resolve[3])

    def _api(self, repository: Repository, name: str, what: str | None) -> None:
        entries = [repository.entry(file) for file in sorted(repository.files)]
        if what == "tree":
            wanted = "recursive=True" in self.path or "recursive=true" in self.path
            return self._json([entry for entry in entries if wanted or "/" not in entry["path"]])
        siblings = [{"rfilename": file} for file in sorted(repository.files)]
        return self._json(
            {"id": name, "sha": repository.commit, "private": False, "tags": [], "downloads": 0, "siblings": siblings}
        )

    def _file(self, repository: Repository, name: str, file: str) -> None:
        content = repository.files.get(file)
        if content is None:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.commit})
        heads = {"X-Repo-Commit": repository.commit}
        if is_large(content):
            heads |= {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
            return self._send(302, {**heads, "Location": f"{self.hub.address}/cdn/{name}/{file}".replace("127.0.0.1", "localhost")})
        return self._content(content, file, {**heads, "ETag": f'"{git_hash(content)}"'})

    def _content(self, content: bytes, file: str, heads: Mapping[str, str] = {}) -> None:
        content = self.hub.sends.get(file, content)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        status = 206 if asked else 200
        more = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if asked else {}
        self._send(status, {**heads, **more, "Accept-Ranges": "bytes"}, content[start:], file)

    def _json(self, value: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(self, status: int, heads: Mapping[str, str] = {}, body: bytes = b"", file: str = "") -> None:
        self.send_response(status)
        for name, value in {**heads, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD" or not body:
            return
        cuts = self.hub.cuts.get(file)
        if file in self.hub.stall_at:
            at = self.hub.stall_at.pop(file)
            self.wfile.write(body[:at])
            self.wfile.flush()
            self.hub.stalled.set()
            self.hub.released.wait(30)
            self.close_connection = True
        elif cuts:
            self.wfile.write(body[: cuts.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(body)
