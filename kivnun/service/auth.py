"""Who asks: a key in `Authorization: Bearer` or `api-key`, checked on every request against the database.

A handler names the scope that it needs in its signature (`who: Data`), and gets the caller, whose tenant goes into every query.
Next: `kivnun/jobs/tenants.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from kivnun.jobs.tenants import ApiKey, Scope, find_key
from kivnun.service.context import Shared
from kivnun.service.errors import ApiError

MAX_KEY_LETTERS = 512


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose key a request came with."""

    tenant: str
    key: ApiKey


def caller_with(scope: Scope) -> Callable[..., Caller]:
    """Return the dependency that lets callers through whose key has `scope` (or `admin`)."""

    def checked(connection: HTTPConnection, service: Shared) -> Caller:
        given = _given(connection)
        if not given or len(given) > MAX_KEY_LETTERS:
            raise _unknown("the API key is missing: send Authorization: Bearer KEY, or api-key: KEY")
        found = service.db.read(lambda tx: find_key(tx, given))
        now = service.clock()
        if found is None or found.revoked_at is not None or (found.expires_at is not None and found.expires_at <= now):
            raise _unknown("the API key is wrong, expired or revoked")
        if scope not in found.scopes and "admin" not in found.scopes:
            raise ApiError(
                403, f"this key lacks the scope {scope!r}; it has {', '.join(found.scopes)}", code="insufficient_permissions"
            )
        return Caller(found.tenant, found)

    return checked


def _given(connection: HTTPConnection) -> str:
    scheme, _, key = connection.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else connection.headers.get("api-key", "").strip()


def _unknown(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


Reader = Annotated[Caller, Depends(caller_with("read"))]
DataOwner = Annotated[Caller, Depends(caller_with("data"))]
Tuner = Annotated[Caller, Depends(caller_with("tune"))]
Chatter = Annotated[Caller, Depends(caller_with("chat"))]
Admin = Annotated[Caller, Depends(caller_with("admin"))]
