"""Who asks: a key in `Authorization: Bearer` or `api-key`, checked on every request against the database.

A handler names the scope that it needs in its signature (`who: DataOwner`), and gets the caller, whose tenant goes into every
query. Every request that comes with a good key counts in its tenant's minute. Next: `kivnun/jobs/tenants.py`, `limits.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from kivnun.jobs.config import Limits
from kivnun.jobs.database import Transaction
from kivnun.jobs.errors import DatabaseDown
from kivnun.jobs.tenants import DEFAULT_TENANT, ApiKey, Scope, find_key, limits_of, touch_key
from kivnun.service.context import Service, Shared
from kivnun.service.errors import ApiError

MAX_KEY_LETTERS = 512
MISSING = "the API key is missing: send Authorization: Bearer KEY, or api-key: KEY"
WRONG = "the API key is wrong, expired or revoked"
TOUCH_S = 60.0  # a key's last use is known to the minute: not every request is a write


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose key a request came with, and what its tenant may have."""

    tenant: str
    key: ApiKey
    limits: Limits

    @property
    def is_operator(self) -> bool:
        """Whether the caller runs the service, and not only a tenant's part of it."""
        return self.tenant == DEFAULT_TENANT and "admin" in self.key.scopes


@dataclass(frozen=True, slots=True)
class Needs:
    """The dependency that lets callers through whose key has `scope` (or `admin`); any good key where it is None."""

    scope: Scope | None
    operator: bool = False

    def __call__(self, connection: HTTPConnection, service: Shared) -> Caller:
        given = _given(connection)
        if not given or len(given) > MAX_KEY_LETTERS:
            raise _unknown(MISSING)

        def look(tx: Transaction) -> Caller | None:
            found = find_key(tx, given)
            return None if found is None else Caller(found.tenant, found, limits_of(tx, found.tenant, service.config.limits))

        caller, now = service.db.read(look), service.clock()
        if caller is None or not is_good(caller.key, now):
            raise _unknown(WRONG)
        connection.scope["state"]["caller"] = caller
        service.limits.take_request(caller)
        if caller.key.last_used_at is None or now - caller.key.last_used_at >= TOUCH_S:
            service.db.write("key used", lambda tx: touch_key(tx, caller.key.id, now))
        self._check(caller)
        return caller

    def _check(self, caller: Caller) -> None:
        scopes = caller.key.scopes
        if self.operator and not caller.is_operator:
            raise forbidden(f"only an admin key of the tenant {DEFAULT_TENANT!r} may do this")
        if self.scope is not None and self.scope not in scopes and "admin" not in scopes:
            raise forbidden(f"this key lacks the scope {self.scope!r}; it has {', '.join(scopes) or 'none'}")


def refused_key(connection: HTTPConnection, service: Service) -> ApiError | None:
    """Return why a connection's key opens nothing, before anything else is known of the request; None where it may."""
    given = _given(connection)
    if not given or len(given) > MAX_KEY_LETTERS:
        return _unknown(MISSING)
    try:
        found = service.db.read(lambda tx: find_key(tx, given))
    except DatabaseDown:
        return None  # which is told where the request itself asks
    return None if found is not None and is_good(found, service.clock()) else _unknown(WRONG)


def is_good(key: ApiKey, now: float) -> bool:
    """Return whether a key opens anything at a moment."""
    return key.revoked_at is None and (key.expires_at is None or key.expires_at > now)


def forbidden(message: str) -> ApiError:
    return ApiError(403, message, code="insufficient_permissions")


def _given(connection: HTTPConnection) -> str:
    scheme, _, key = connection.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else connection.headers.get("api-key", "").strip()


def _unknown(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


Anyone = Annotated[Caller, Depends(Needs(None))]
Reader = Annotated[Caller, Depends(Needs("read"))]
DataOwner = Annotated[Caller, Depends(Needs("data"))]
Tuner = Annotated[Caller, Depends(Needs("tune"))]
Chatter = Annotated[Caller, Depends(Needs("chat"))]
Admin = Annotated[Caller, Depends(Needs("admin"))]
Operator = Annotated[Caller, Depends(Needs("admin", operator=True))]
