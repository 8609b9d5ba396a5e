"""What was used and what it costs: tokens of training, of prompts and of answers, each tenant's own.

Answers are summed by hour, model, key and price, so that the table stays small; a job has one row, however often its end is
written. A cost is the row's tokens times the price of a million of them, in millionths of the currency, computed exactly and
rounded once, half up: a row is wrong by half a millionth at most, and a sum by that much for each of its rows. Next: `schema.py`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Literal, get_args

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from kivnun.jobs.database import Transaction
from kivnun.jobs.schema import usage

HOUR_S = 3600
DAY_S = 24 * HOUR_S

Kind = Literal["training", "prompt", "completion"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Grouping = Literal["day", "model", "kind"]


@dataclass(frozen=True, slots=True)
class Used:
    """A sum. `group` is a day's first second, a model or a kind; the whole range where nothing is grouped."""

    group: int | str | None
    kind: Kind
    tokens: int
    cost_micros: int


@dataclass(frozen=True, slots=True)
class Charge:
    """What an answer used, to be added to its tenant's usage once: tokens of each kind, and the price of a million of them."""

    tenant: str
    base: str
    model: str
    api_key: str | None
    parts: tuple[tuple[Kind, int, float], ...]


def charge(tx: Transaction, charges: Iterable[Charge], now: float) -> None:
    """Add what answers used to their tenants' usage: one row for all that are alike."""
    sums: Counter[tuple[str, Kind, str, str, float, str | None]] = Counter()
    for one in charges:
        for kind, tokens, price in one.parts:
            sums[one.tenant, kind, one.base, one.model, price, one.api_key] += tokens
    for (tenant, kind, base, model, price, api_key), tokens in sums.items():
        record(tx, tenant, kind, base, model, tokens, price, now, api_key=api_key)


def cost_micros(tokens: int, price_per_million: float) -> int:
    """Return what tokens cost, in millionths of the currency: exact, then rounded half up. A price counts as it is written."""
    return int((Decimal(tokens) * Decimal(repr(price_per_million))).quantize(Decimal(1), ROUND_HALF_UP))


def record(
    tx: Transaction,
    tenant: str,
    kind: Kind,
    base: str,
    model: str,
    tokens: int,
    price_per_million: float,
    now: float,
    *,
    api_key: str | None = None,
    job: str | None = None,
) -> bool:
    """Add to a tenant's usage. With `job`, once per job and kind: return False, and add nothing, where it is there already."""
    hour = float(now // HOUR_S * HOUR_S)
    price = repr(float(price_per_million))
    told = [job, kind] if job is not None else [tenant, str(hour), kind, base, model, api_key or "", price]
    values = {
        "id": "use_" + hashlib.sha256("\0".join(told).encode()).hexdigest()[:32], "tenant": tenant, "at": hour, "kind": kind,
        "base": base, "model": model, "job": job, "api_key": api_key, "tokens": tokens, "price": price,
        "cost_micros": cost_micros(tokens, price_per_million),
    }  # fmt: skip
    insert = (sqlite if tx.dialect.name == "sqlite" else postgresql).insert(usage).values(values)
    if job is not None:
        return tx.execute(insert.on_conflict_do_nothing(index_elements=[usage.c.id]).returning(usage.c.id)).first() is not None
    added = insert.on_conflict_do_update(
        index_elements=[usage.c.id], set_={"tokens": usage.c.tokens + insert.excluded.tokens}
    ).returning(usage.c.tokens)
    total = tx.execute(added).scalar_one()
    tx.execute(sa.update(usage).where(usage.c.id == values["id"]).values(cost_micros=cost_micros(total, price_per_million)))
    return True


def summary(tx: Transaction, tenant: str, start: float, end: float, group_by: Grouping | None = None) -> list[Used]:
    """Return a tenant's sums over the hours that begin in [start, end), in the order of their groups and kinds."""
    group = {None: sa.null(), "day": usage.c.at, "model": usage.c.model, "kind": usage.c.kind}[group_by]
    sums = (sa.func.sum(usage.c.tokens), sa.func.sum(usage.c.cost_micros))
    query = sa.select(group.label("grouped"), usage.c.kind, *sums).where(
        usage.c.tenant == tenant, usage.c.at >= start, usage.c.at < end
    )
    # Hours become days here: no arithmetic of time is spelled alike in both databases.
    columns = (usage.c.kind,) if group_by in (None, "kind") else (group, usage.c.kind)
    found: dict[tuple[int | str | None, Kind], tuple[int, int]] = {}
    for value, kind, tokens, cost in tx.execute(query.group_by(*columns)):
        key = (int(value // DAY_S * DAY_S) if group_by == "day" else value, kind)
        before = found.get(key, (0, 0))
        found[key] = (before[0] + int(tokens), before[1] + int(cost))
    ordered = sorted(found.items(), key=lambda item: (str(item[0][0]), KINDS.index(item[0][1])))
    return [Used(group, kind, tokens, cost) for (group, kind), (tokens, cost) in ordered]


def total_tokens(tx: Transaction) -> dict[Kind, int]:
    """Return the tokens of each kind, of all tenants together: for those who run the service."""
    rows = tx.execute(sa.select(usage.c.kind, sa.func.sum(usage.c.tokens)).group_by(usage.c.kind))
    return {kind: int(tokens) for kind, tokens in rows}
