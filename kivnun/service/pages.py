"""The web pages: the files of `kivnun/web`, each under an address of its own, with headers that let them do what they need alone.

They are read when the application is made. No path of a request ever reaches the disk, and whatever is not one of them is the API's
to answer. Next: `kivnun/web/js/main.js`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}  # fmt: skip
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=()",
    # Kept, but asked for again each time: a page never mixes the files of two versions, and an unchanged one costs no bytes.
    "cache-control": "no-cache",
}


def add_pages(app: FastAPI) -> None:
    """Give the application a route for each file of the pages; `/` is the first one. Only GET and HEAD are answered."""
    for path, content in _pages(files("kivnun.web"), ""):
        endpoint = _Page(content, TYPES["." + path.rpartition(".")[2]])
        for address in ("/", "/index.html") if path == "index.html" else (f"/{path}",):
            app.add_route(address, endpoint.answer, methods=["GET"], include_in_schema=False)


def _pages(folder: Traversable, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Yield the path and the content of each file of the pages, those in folders too."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _pages(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(tuple(TYPES)):
            yield prefix + entry.name, entry.read_bytes()


class _Page:
    """One file, with a tag by which a browser learns that it has it already."""

    def __init__(self, content: bytes, media_type: str) -> None:
        self._content, self._media_type = content, media_type
        self._tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'

    async def answer(self, request: Request) -> Response:
        headers = {**HEADERS, "etag": self._tag}
        if self._tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self._content, media_type=self._media_type, headers=headers)
