"""Keys of the API: made, listed, rotated, revoked. A key itself is in one answer, the one to its making.

Making and revoking take `admin`, so that a key that leaked can make no others that outlive it, nor one that may do more. Any key
may put a new one in its own place. Next: `kivnun/jobs/tenants.py`, `auth.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from kivnun.jobs.database import Transaction
from kivnun.jobs.tenants import (
    ApiKey,
    Scope,
    add_key,
    find_key_of,
    find_tenant,
    keys_of,
    new_key,
    revoke_key,
    rotate_key,
)
from kivnun.service.auth import Admin, Anyone, Caller, Reader, forbidden, is_good
from kivnun.service.context import Shared
from kivnun.service.errors import ApiError, bad_request, not_found

router = APIRouter()

MOST = 1000  # good ones of one tenant
TEN_YEARS_S = 315_360_000
WEEK_S = 604_800
KeyId = Annotated[str, Path(max_length=64)]


class KeyAsked(BaseModel):
    """What is wanted of a new key. Without `expires_in_s` it does not expire."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")
    scopes: list[Scope] = Field(min_length=1, max_length=8, json_schema_extra={"uniqueItems": True})
    expires_in_s: Annotated[StrictInt, Field(ge=1, le=TEN_YEARS_S)] | None = None
    tenant: str | None = Field(default=None, max_length=64, description="Another's: for the operator alone.")


class Rotation(BaseModel):
    """How long the old key goes on being good, so that whoever uses it can change over."""

    model_config = ConfigDict(extra="forbid")

    grace_s: Annotated[StrictInt, Field(ge=0, le=WEEK_S)] = 0


class KeyObject(BaseModel):
    """A key without the key."""

    object: Literal["api_key"] = "api_key"
    id: str
    tenant: str
    name: str
    hint: str = Field(description="The last four letters.")
    scopes: list[str]
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None = Field(description="To the minute.")


class NewKey(KeyObject):
    """A key with the key: it is shown this once."""

    key: str


class KeyList(BaseModel):
    """A tenant's keys."""

    object: Literal["list"] = "list"
    data: list[KeyObject]


@router.get("/x_keys", response_model=KeyList)
def list_keys(service: Shared, who: Reader) -> dict[str, Any]:
    """Return the tenant's keys, the newest first; expired and revoked ones too."""
    return {"data": [key_object(key) for key in service.db.read(lambda tx: keys_of(tx, who.tenant))]}


@router.post("/x_keys", response_model=NewKey)
def create_key(asked: KeyAsked, service: Shared, who: Admin) -> dict[str, Any]:
    """Make a key for the caller's tenant, or, asked by the operator, for another."""
    tenant = asked.tenant or who.tenant
    if tenant != who.tenant and not who.is_operator:
        raise forbidden("only the operator's key may make keys for another tenant")
    if len(set(asked.scopes)) < len(asked.scopes):
        raise bad_request("scopes names one scope twice", "scopes")
    key, now = new_key(), service.clock()
    expires_at = None if asked.expires_in_s is None else now + asked.expires_in_s

    def add(tx: Transaction) -> ApiKey:
        if find_tenant(tx, tenant) is None:
            raise not_found("tenant", tenant, "tenant")
        if sum(is_good(held, now) for held in keys_of(tx, tenant)) >= MOST:
            raise ApiError(400, f"there are {MOST} good keys already: revoke some first", code="quota_exceeded")
        return add_key(tx, key, tenant, asked.name, asked.scopes, now, service.new_id, expires_at)

    return {**key_object(service.db.write("key made", add)), "key": key}


@router.delete("/x_keys/{key_id}", response_model=KeyObject)
def delete_key(key_id: KeyId, service: Shared, who: Admin) -> dict[str, Any]:
    """Revoke a key: no request that comes after this answer is let through by it."""
    revoked = service.db.write("key revoked", lambda tx: revoke_key(tx, key_id, who.tenant, service.clock()))
    if revoked is None:
        raise not_found("key", key_id)
    return key_object(revoked)


@router.post("/x_keys/{key_id}/rotate", response_model=NewKey)
def rotate(key_id: KeyId, service: Shared, who: Anyone, asked: Rotation | None = None) -> dict[str, Any]:
    """Put a new key in a good one's place, with the same scopes and expiry. Without `admin`, a key may do so with itself."""
    key, now = new_key(), service.clock()
    grace_s = 0 if asked is None else asked.grace_s

    def turn(tx: Transaction) -> ApiKey:
        old = find_key_of(tx, key_id, who.tenant)
        if old is None or not _may_rotate(who, old):
            raise not_found("key", key_id)
        if not is_good(old, now):
            raise ApiError(400, "the key is expired or revoked: make a new one", code="key_ended", param="key_id")
        return rotate_key(tx, old, key, now, service.new_id, grace_s)

    return {**key_object(service.db.write("key rotated", turn)), "key": key}


def key_object(key: ApiKey) -> dict[str, Any]:
    """Return a key on the wire."""
    times = {name: getattr(key, name) for name in ("expires_at", "revoked_at", "last_used_at")}
    return {
        "object": "api_key", "id": key.id, "tenant": key.tenant, "name": key.name, "hint": key.hint, "scopes": key.scopes,
        "created_at": int(key.created_at), **{name: None if at is None else int(at) for name, at in times.items()},
    }  # fmt: skip


def _may_rotate(who: Caller, old: ApiKey) -> bool:
    return old.id == who.key.id or "admin" in who.key.scopes
