"""Tenants and their keys. A key is shown once, when it is made; the database holds its hash, of which no key can be made.

Keys are 256 random bits, so that a fast hash is enough: there is nothing to guess. Next: `schema.py`.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import sqlalchemy as sa

from kivnun.jobs.config import Limits
from kivnun.jobs.database import Transaction, holds
from kivnun.jobs.ids import NewId
from kivnun.jobs.schema import api_keys, tenants

DEFAULT_TENANT = "default"
KEY_PREFIX = "sk-kivnun-"

Scope = Literal["read", "data", "tune", "chat", "admin"]
"""read: every GET; data: files and uploads; tune: jobs, models, deployments, webhooks; chat: answers and batches; admin: keys,
tenants, all else."""
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is kept. `hint` is its last four letters."""

    id: str
    tenant: str
    name: str
    hint: str
    scopes: list[str]
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None


@dataclass(frozen=True, slots=True)
class Tenant:
    """A row of `tenants`. `limits` are those that differ from the configured ones."""

    id: str
    created_at: float
    weight: float
    limits: dict[str, Any]


_TENANT = (tenants.c.id, tenants.c.created_at, tenants.c.weight, tenants.c.limits)
_SHOWN = [column for column in api_keys.c if column.name != "hash"]


def new_key() -> str:
    """Return a new key: 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def key_hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def add_tenant(tx: Transaction, tenant: str, now: float, weight: float = 1.0, limits: dict[str, Any] | None = None) -> bool:
    """Record a tenant; return whether it is new."""
    if tx.execute(sa.select(tenants.c.id).where(tenants.c.id == tenant)).first() is not None:
        return False
    tx.execute(sa.insert(tenants).values(id=tenant, created_at=now, weight=weight, served=0.0, limits=limits or {}))
    return True


def add_key(
    tx: Transaction,
    key: str,
    tenant: str,
    name: str,
    scopes: Sequence[str],
    now: float,
    new_id: NewId,
    expires_at: float | None = None,
) -> ApiKey:
    """Record a key of a tenant that exists. A key that is recorded already is left as it is."""
    found = find_key(tx, key)
    if found is not None:
        return found
    made = ApiKey(new_id("key_"), tenant, name, key[-4:], list(scopes), now, expires_at, None, None)
    values = {column.name: getattr(made, column.name) for column in _SHOWN}
    tx.execute(sa.insert(api_keys).values(**values, hash=key_hash(key)))
    return made


def find_key(tx: Transaction, key: str) -> ApiKey | None:
    """Return a key's record, revoked and expired ones too; None where there is none."""
    digest = key_hash(key)
    row = tx.execute(sa.select(*_SHOWN, api_keys.c.hash).where(api_keys.c.hash == digest)).mappings().one_or_none()
    if row is None or not hmac.compare_digest(row["hash"], digest):
        return None
    return ApiKey(**{column.name: row[column.name] for column in _SHOWN})


def find_key_of(tx: Transaction, key_id: str, tenant: str) -> ApiKey | None:
    """Return a tenant's key by its id; None where there is none."""
    row = tx.execute(sa.select(*_SHOWN).where(api_keys.c.id == key_id, api_keys.c.tenant == tenant)).mappings().one_or_none()
    return None if row is None else ApiKey(**row)


def keys_of(tx: Transaction, tenant: str) -> list[ApiKey]:
    """Return a tenant's keys, the newest first; revoked and expired ones too."""
    query = sa.select(*_SHOWN).where(api_keys.c.tenant == tenant)
    return [ApiKey(**row) for row in tx.execute(query.order_by(api_keys.c.created_at.desc(), api_keys.c.id.desc())).mappings()]


def revoke_key(tx: Transaction, key_id: str, tenant: str, now: float) -> ApiKey | None:
    """End a tenant's key and return it; None where there is none. One that was revoked stays as it is."""
    query = sa.update(api_keys).where(api_keys.c.id == key_id, api_keys.c.tenant == tenant, api_keys.c.revoked_at.is_(None))
    tx.execute(query.values(revoked_at=now))
    return find_key_of(tx, key_id, tenant)


def rotate_key(tx: Transaction, old: ApiKey, key: str, now: float, new_id: NewId, grace_s: float = 0) -> ApiKey:
    """Put a new key in another's place, with its name, scopes and expiry. The old one ends now, or after `grace_s` at most."""
    made = add_key(tx, key, old.tenant, old.name, old.scopes, now, new_id, old.expires_at)
    if grace_s:
        ends = now + grace_s if old.expires_at is None else min(old.expires_at, now + grace_s)
        tx.execute(sa.update(api_keys).where(api_keys.c.id == old.id, api_keys.c.tenant == old.tenant).values(expires_at=ends))
    else:
        revoke_key(tx, old.id, old.tenant, now)
    return made


def touch_key(tx: Transaction, key_id: str, now: float) -> None:
    """Note when a key was last used."""
    tx.execute(sa.update(api_keys).where(api_keys.c.id == key_id).values(last_used_at=now))


def find_tenant(tx: Transaction, tenant: str) -> Tenant | None:
    if not holds(tenant):
        return None
    row = tx.execute(sa.select(*_TENANT).where(tenants.c.id == tenant)).mappings().one_or_none()
    return None if row is None else Tenant(**row)


def all_tenants(tx: Transaction) -> list[Tenant]:
    """Return every tenant, the oldest first."""
    return [Tenant(**row) for row in tx.execute(sa.select(*_TENANT).order_by(tenants.c.created_at, tenants.c.id)).mappings()]


def change_tenant(tx: Transaction, tenant: str, weight: float | None = None, limits: dict[str, Any] | None = None) -> Tenant | None:
    """Change a tenant's weight, its own limits, or both, and return it; None where there is none."""
    values = {name: value for name, value in (("weight", weight), ("limits", limits)) if value is not None}
    if values:
        tx.execute(sa.update(tenants).where(tenants.c.id == tenant).values(**values))
    return find_tenant(tx, tenant)


def limits_of(tx: Transaction, tenant: str, configured: Limits) -> Limits:
    """Return a tenant's limits: the configured ones, with its own in their place."""
    own = tx.execute(sa.select(tenants.c.limits).where(tenants.c.id == tenant)).scalar_one()
    return configured.model_copy(update=own)
