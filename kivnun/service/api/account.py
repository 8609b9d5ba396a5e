"""What a tenant knows of itself: who it is, what is left of its limits, what it used and what that costs.

Next: `keys.py`, `catalogue.py`, `kivnun/jobs/usage.py`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel

from kivnun.jobs import usage
from kivnun.jobs.database import Transaction
from kivnun.jobs.holdings import holdings_of
from kivnun.jobs.tenants import find_tenant
from kivnun.service.api.keys import KeyObject, key_object
from kivnun.service.auth import Anyone, Caller, Reader, forbidden
from kivnun.service.context import Shared
from kivnun.service.errors import bad_request, not_found

router = APIRouter()

MOST_DAYS = 366
DEFAULT_DAYS = 30
Second = Annotated[int | None, Query(ge=0, le=32_503_680_000)]  # until the year 3000


class Me(BaseModel):
    """The caller's tenant: its limits, and what of them is left at this moment."""

    object: Literal["x_me"] = "x_me"
    tenant: str
    organization: str
    operator: bool
    key: KeyObject
    limits: dict[str, int | None]
    left: dict[str, int]


class UsageRow(BaseModel):
    """A sum. Costs are exact: `cost` is `cost_micros` as a decimal number."""

    group: str | None
    kind: usage.Kind
    tokens: int
    cost_micros: int
    cost: str


class UsageReport(BaseModel):
    """Sums over the hours that begin between `start` and `end`, and over all of them."""

    object: Literal["list"] = "list"
    tenant: str
    currency: str
    start: int
    end: int
    group_by: usage.Grouping | None
    data: list[UsageRow]
    total: UsageTotal


class UsageTotal(BaseModel):
    """All rows together."""

    tokens: int
    cost_micros: int
    cost: str


@router.get("/x_me", response_model=Me)
def me(service: Shared, who: Anyone) -> dict[str, Any]:
    """Return whose key this is, the limits, and what is left."""
    has = service.db.read(lambda tx: holdings_of(tx, who.tenant))
    rates, limits = service.limits.left(who), who.limits
    left = {
        "requests_per_minute": rates["requests"], "tokens_per_minute": rates["tokens"],
        "active_jobs": limits.active_jobs - has.active_jobs, "waiting_jobs": limits.waiting_jobs - has.waiting_jobs,
        "files": limits.files - has.files, "storage_bytes": limits.storage_bytes - has.storage_bytes,
    }  # fmt: skip
    return {
        "tenant": who.tenant, "organization": service.config.organization, "operator": who.is_operator,
        "key": key_object(who.key), "limits": limits.model_dump(),
        "left": {name: max(0, number) for name, number in left.items()},
    }  # fmt: skip


@router.get("/x_usage", response_model=UsageReport)
def read_usage(
    service: Shared, who: Reader, start: Second = None, end: Second = None, group_by: usage.Grouping | None = None,
    tenant: Annotated[str | None, Query(max_length=64)] = None,
) -> dict[str, Any]:  # fmt: skip
    """Return tokens and costs, the last 30 days' where no range is given. The operator may name another tenant."""
    end_at = int(service.clock()) + 1 if end is None else end
    start_at = max(0, end_at - DEFAULT_DAYS * usage.DAY_S) if start is None else start
    if not 0 <= end_at - start_at <= MOST_DAYS * usage.DAY_S:
        raise bad_request(f"start and end must span 0 to {MOST_DAYS} days, got {start_at} and {end_at}", "start")
    asked = _tenant_asked(tenant, who)

    def look(tx: Transaction) -> list[usage.Used]:
        if find_tenant(tx, asked) is None:
            raise not_found("tenant", asked, "tenant")
        return usage.summary(tx, asked, start_at // usage.HOUR_S * usage.HOUR_S, end_at, group_by)

    found = service.db.read(look)
    tokens, micros = (sum(getattr(used, name) for used in found) for name in ("tokens", "cost_micros"))
    return {
        "tenant": asked, "currency": service.config.currency, "start": start_at, "end": end_at, "group_by": group_by,
        "data": [_row(used) for used in found],
        "total": {"tokens": tokens, "cost_micros": micros, "cost": money(micros)},
    }  # fmt: skip


def money(micros: int) -> str:
    """Return millionths as a decimal number: `12.340000`."""
    return f"{micros // 1_000_000}.{micros % 1_000_000:06d}"


def _tenant_asked(tenant: str | None, who: Caller) -> str:
    if tenant is None or tenant == who.tenant:
        return who.tenant
    if not who.is_operator:
        raise forbidden("only the operator's key may ask for another tenant's usage")
    return tenant


def _row(used: usage.Used) -> dict[str, Any]:
    is_day = isinstance(used.group, int)
    group = datetime.fromtimestamp(used.group, UTC).date().isoformat() if is_day else used.group  # type: ignore[arg-type]
    return {
        "group": group, "kind": used.kind, "tokens": used.tokens, "cost_micros": used.cost_micros, "cost": money(used.cost_micros)
    }  # fmt: skip
