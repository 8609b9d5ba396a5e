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
from kivnun.jobs.database import Transaction
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


def limits_of(tx: Transaction, tenant: str, configured: Limits) -> Limits:
    """Return a tenant's limits: the configured ones, with its own in their place."""
    own = tx.execute(sa.select(tenants.c.limits).where(tenants.c.id == tenant)).scalar_one()
    return configured.model_copy(update=own)
