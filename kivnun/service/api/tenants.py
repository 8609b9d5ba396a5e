"""Tenants, for those who run the service: listed, made, their limits and their share of the queue changed.

All of it takes an admin key of the tenant `default`. A tenant is never removed: its money is on record. Next:
`kivnun/jobs/tenants.py`, `keys.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from kivnun.jobs.config import Limits
from kivnun.jobs.database import Transaction
from kivnun.jobs.tenants import Tenant, add_tenant, all_tenants, change_tenant, find_tenant
from kivnun.service.auth import Operator
from kivnun.service.context import Shared
from kivnun.service.errors import ApiError, bad_request, not_found

router = APIRouter()

PATTERN = r"^[a-z0-9][a-z0-9-]{0,31}$"
Weight = Annotated[float, Field(ge=0.01, le=1000, allow_inf_nan=False)]
OwnLimits = dict[str, StrictInt]


class TenantAsked(BaseModel):
    """A new tenant. `limits` are those that shall differ from the configured ones."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(pattern=PATTERN)
    weight: Weight = Field(default=1.0, description="Of its share of the queue.")
    limits: OwnLimits = Field(default_factory=dict[str, int])


class TenantChange(BaseModel):
    """What shall be different. `limits` replaces all own limits: an empty one puts the configured ones back."""

    model_config = ConfigDict(extra="forbid")

    weight: Weight | None = None
    limits: OwnLimits | None = None


class TenantObject(BaseModel):
    """A tenant. `limits` are those that hold, `own_limits` those of them that are its own."""

    object: Literal["x_tenant"] = "x_tenant"
    id: str
    created_at: int
    weight: float
    limits: dict[str, int | None]
    own_limits: dict[str, int]


class TenantList(BaseModel):
    """All tenants."""

    object: Literal["list"] = "list"
    data: list[TenantObject]


@router.get("/x_tenants", response_model=TenantList)
def list_tenants(service: Shared, who: Operator) -> dict[str, Any]:
    """Return every tenant, the oldest first."""
    return {"data": [_told(tenant, service.config.limits) for tenant in service.db.read(all_tenants)]}


@router.post("/x_tenants", response_model=TenantObject, responses={409: {"description": "There is such a tenant already."}})
def create_tenant(asked: TenantAsked, service: Shared, who: Operator) -> dict[str, Any]:
    """Make a tenant. Its first key is made by POST /x_keys with `tenant`."""
    _check(asked.limits)

    def add(tx: Transaction) -> Tenant:
        if not add_tenant(tx, asked.id, service.clock(), asked.weight, asked.limits):
            raise ApiError(409, f"there is a tenant {asked.id!r} already", code="conflict", param="id")
        return _found(tx, asked.id)

    return _told(service.db.write("tenant made", add), service.config.limits)


@router.get("/x_tenants/{tenant}", response_model=TenantObject)
def get_tenant(tenant: Annotated[str, Path(max_length=64)], service: Shared, who: Operator) -> dict[str, Any]:
    return _told(service.db.read(lambda tx: _found(tx, tenant)), service.config.limits)


@router.post("/x_tenants/{tenant}", response_model=TenantObject)
def update_tenant(
    tenant: Annotated[str, Path(max_length=64)], asked: TenantChange, service: Shared, who: Operator
) -> dict[str, Any]:
    """Change a tenant's weight, its limits, or both. They hold from its next request."""
    _check(asked.limits or {})

    def change(tx: Transaction) -> Tenant:
        _found(tx, tenant)
        change_tenant(tx, tenant, asked.weight, asked.limits)
        return _found(tx, tenant)

    return _told(service.db.write("tenant changed", change), service.config.limits)


def _found(tx: Transaction, tenant: str) -> Tenant:
    found = find_tenant(tx, tenant)
    if found is None:
        raise not_found("tenant", tenant)
    return found


def _check(own: OwnLimits) -> None:
    try:
        Limits.model_validate(own)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        name = ".".join(map(str, first["loc"]))[:64]
        known = ", ".join(Limits.model_fields)
        raise bad_request(f"limits.{name}: {first['msg']}; there are {known}", f"limits.{name}") from None
    too_large = next((name for name, value in own.items() if value >= 1 << 53), None)
    if too_large is not None:
        raise bad_request(f"limits.{too_large} must be below 2^53", f"limits.{too_large}")


def _told(tenant: Tenant, configured: Limits) -> dict[str, Any]:
    return {
        "id": tenant.id, "created_at": int(tenant.created_at), "weight": tenant.weight,
        "limits": configured.model_copy(update=tenant.limits).model_dump(), "own_limits": tenant.limits,
    }  # fmt: skip
