"""Azure's deployments: names that a tenant gives to models, by which its clients call them.

Only names: nothing is started or stopped, since every model answers under its own name anyway. Next: `models.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from kivnun.jobs.database import Transaction, holds
from kivnun.jobs.schema import deployments


@dataclass(frozen=True, slots=True)
class Deployment:
    """A row of `deployments`. `model` is a base's id, a tuned model or a checkpoint; `body` its sku and properties as given."""

    tenant: str
    name: str
    created_at: float
    updated_at: float
    model: str
    body: dict[str, Any]


def find_deployment(tx: Transaction, tenant: str, name: str) -> Deployment | None:
    """Return a tenant's deployment by its name; None where there is none."""
    if not holds(name):
        return None
    query = sa.select(deployments).where(deployments.c.tenant == tenant, deployments.c.name == name)
    row = tx.execute(query).mappings().one_or_none()
    return None if row is None else Deployment(**row)


def all_of(tx: Transaction, tenant: str) -> list[Deployment]:
    """Return a tenant's deployments by name."""
    query = sa.select(deployments).where(deployments.c.tenant == tenant).order_by(deployments.c.name)
    return [Deployment(**row) for row in tx.execute(query).mappings()]


def put(tx: Transaction, tenant: str, name: str, model: str, body: dict[str, Any], now: float) -> tuple[Deployment, bool]:
    """Make a deployment or change it; return it and whether it is new."""
    found = find_deployment(tx, tenant, name)
    if found is None:
        made = Deployment(tenant, name, now, now, model, body)
        tx.execute(sa.insert(deployments).values(tenant=tenant, name=name, created_at=now, updated_at=now, model=model, body=body))
        return made, True
    query = sa.update(deployments).where(deployments.c.tenant == tenant, deployments.c.name == name)
    tx.execute(query.values(model=model, body=body, updated_at=now))
    return Deployment(tenant, name, found.created_at, now, model, body), False


def remove(tx: Transaction, tenant: str, name: str) -> bool:
    """Remove a deployment; return whether there was one."""
    query = sa.delete(deployments).where(deployments.c.tenant == tenant, deployments.c.name == name)
    return tx.execute(query).rowcount > 0


def of_model(tx: Transaction, tenant: str, model: str) -> Sequence[str]:
    """Return the names of a tenant's deployments that point at a model."""
    query = sa.select(deployments.c.name).where(deployments.c.tenant == tenant, deployments.c.model == model)
    return list(tx.execute(query.order_by(deployments.c.name)).scalars())
