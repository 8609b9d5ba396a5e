"""How a create came over the wire: its body as it is, its `Idempotency-Key`, and the count of retries that stock clients send.

A handler takes `Received` in its signature, and hands `sent` to `kivnun.jobs.retries.accept` in its transaction.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends
from starlette.requests import Request

from kivnun.jobs.retries import KeyReused, Sent, body_hash
from kivnun.service.context import Shared
from kivnun.service.errors import ApiError, bad_request

T = TypeVar("T")
MAX_KEY_LETTERS = 255


@dataclass(frozen=True, slots=True)
class Arrived:
    """A create as it came."""

    body: bytes
    sent: Sent

    def tree(self) -> dict[str, Any]:
        """Return the body's JSON object. Raises ApiError for anything that is not one, or that no database could hold."""
        try:
            tree = json.loads(self.body.decode("utf-8"), object_pairs_hook=_once_each, parse_constant=_no_number)
            storable(tree)
        except UnicodeDecodeError:
            raise bad_request("the body is not UTF-8", code="invalid_json") from None
        except (ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
            raise bad_request(f"the body is no JSON that can be used: {reason[:200]}", code="invalid_json") from None
        if not isinstance(tree, dict):
            raise bad_request(f"the body must be a JSON object, got {type(tree).__name__}", code="invalid_json")
        return tree


async def received(request: Request, service: Shared) -> Arrived:
    """Return the body and the headers of a create. Raises ApiError where the body is too large or the key is no key."""
    most, body = service.config.max_body_bytes, bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise ApiError(413, f"the body is larger than {most:,} bytes", code="request_too_large")
    return Arrived(bytes(body), sent_as(request, body_hash(bytes(body))))


def sent_as(request: Request, digest: str) -> Sent:
    """Return how a create came whose body has this SHA-256, or what it says where two equal wishes differ in bytes (a form's
    boundary). Raises ApiError where the key is no key."""
    key = request.headers.get("idempotency-key") or None
    if key is not None and (len(key) > MAX_KEY_LETTERS or not (key.isascii() and key.isprintable())):
        raise bad_request(f"Idempotency-Key must be 1 to {MAX_KEY_LETTERS} printable ASCII characters", "Idempotency-Key")
    count = request.headers.get("x-stainless-retry-count", "0")
    retries = int(count) if count.isascii() and count.isdigit() and len(count) < 6 else 0
    return Sent(key, digest, retries)


Received = Annotated[Arrived, Depends(received)]


def once(create: Callable[[], T]) -> T:
    """Return what a create made or found. Raises ApiError for a key that came before with another body."""
    try:
        return create()
    except KeyReused:
        raise key_reused() from None


def key_reused() -> ApiError:
    """Return the answer for a key that came before with another body."""
    return ApiError(
        422, "this Idempotency-Key was used with another body: send a new key with it", code="idempotency_key_reused",
        param="Idempotency-Key",
    )  # fmt: skip


def storable(value: object) -> None:
    """Raise ValueError where a text within a tree holds NUL or half a surrogate pair, which no database column takes."""
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError("a text holds NUL or half a surrogate pair")
    elif isinstance(value, dict):
        for key, item in value.items():
            storable(key)
            storable(item)
    elif isinstance(value, list):
        for item in value:
            storable(item)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object names a key twice")
    return found


def _no_number(_word: str) -> Any:
    raise ValueError("NaN and Infinity are no JSON")
