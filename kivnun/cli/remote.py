"""The service's API as `kivnun keys` and `kivnun jobs` call it: over HTTP, with the standard library alone.

Next: `jobs.py`, `keys.py`.
"""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import click

from kivnun.errors import ServiceError

KEY_VARIABLE, URL_VARIABLE = "KIVNUN_API_KEY", "KIVNUN_URL"
DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 60.0
MAX_ANSWER_BYTES = 64 << 20
PAGE = 100

_URL = click.option(
    "--url",
    default=DEFAULT_URL,
    show_default=True,
    envvar=URL_VARIABLE,
    show_envvar=True,
    help="Where the service is, without /v1.",
)


def remote_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --url to a command. The key is in the environment alone: a command line can be seen by everybody on the machine."""
    return _URL(command)


@dataclass(frozen=True, slots=True)
class Remote:
    """A service and the key it is called with."""

    url: str
    key: str

    def get(self, path: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        return self._call("GET", path + (f"?{urllib.parse.urlencode(query)}" if query else ""))

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self._call("POST", path, body)

    def delete(self, path: str) -> dict[str, Any]:
        return self._call("DELETE", path)

    def pages(self, path: str, limit: int | None) -> Iterator[dict[str, Any]]:
        """Yield the objects of a list, page after page, `limit` of them at most."""
        left, after = limit, None
        while left is None or left > 0:
            page = self.get(path, {"limit": str(min(PAGE, left or PAGE)), **({"after": after} if after else {})})
            yield from page["data"]
            if not page.get("has_more") or not page["data"]:
                return
            after = page["data"][-1]["id"]
            left = None if left is None else left - len(page["data"])

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        content = None if body is None else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json", "user-agent": "kivnun"}
        request = urllib.request.Request(f"{self.url}/v1{path}", content, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return json.loads(answer.read(MAX_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            raise _refused(error) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ServiceError(
                f"{self.url} does not answer: {reason}", hint=f"is kivnun serve running there? --url or {URL_VARIABLE}"
            ) from None


def remote(url: str) -> Remote:
    """Return the service at `url`. Raises click.UsageError where there is no key in the environment."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        raise click.UsageError(
            f"{KEY_VARIABLE} is not set: it holds the key that kivnun serve printed, or one that keys create made"
        )
    if not url.startswith(("http://", "https://")):
        raise click.UsageError(f"--url {url} must begin with http:// or https://")
    return Remote(url.rstrip("/").removesuffix("/v1"), key)


def part(name: str) -> str:
    """Return an id as a part of a path."""
    return urllib.parse.quote(name, safe="")


def _refused(error: urllib.error.HTTPError) -> ServiceError:
    """Return what the service answered as an error of this command."""
    with error:
        try:
            told = json.loads(error.read(1 << 20))["error"]
            message, code = str(told["message"]), str(told["code"])
        except (ValueError, KeyError, TypeError, OSError):
            message, code = error.reason, "no body that could be read"
    return ServiceError(f"the service answered {error.code}: {message}", hint=f"its code for this is {code}")
