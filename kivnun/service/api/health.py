"""Whether the service lives, whether it can work, and how it stands: `/health`, `/ready`, `/metrics`.

The first two take no key and tell nothing but that. Metrics take a key of the tenant `default` with the scope `read`: no label
names a tenant, but what a service does is its operator's alone, and a rule by the caller's address would let everybody in behind a
proxy on the same machine. Next: `telemetry.py`.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel
from starlette.responses import JSONResponse

from kivnun.errors import KivnunError
from kivnun.jobs.blobs import blob_name
from kivnun.jobs.tenants import DEFAULT_TENANT
from kivnun.service.auth import Reader, forbidden
from kivnun.service.context import Service, Shared

root = APIRouter()
_ANY_BLOB = blob_name("ready", "0" * 64)  # asked for, never there


class Health(BaseModel):
    """The process answers."""

    status: str = "ok"


class Readiness(BaseModel):
    """Whether each part that the service stands on answers."""

    status: str
    database: str
    store: str


@root.get("/health")
def health() -> Health:
    return Health()


@root.get("/ready", responses={503: {"model": Readiness, "description": "A part does not answer."}})
async def ready(service: Shared) -> Readiness:
    """Answer 200 where the database and the store answer, else 503."""
    answer = await service.probes.run(lambda: _probed(service))
    return answer if answer.status == "ok" else JSONResponse(answer.model_dump(), 503)  # type: ignore[return-value]


def _probed(service: Service) -> Readiness:
    parts = {
        "database": lambda: service.db.read(lambda tx: tx.execute(sa.select(1)).scalar()),
        "store": lambda: service.blobs.has(_ANY_BLOB),
    }
    found: dict[str, str] = {}
    for name, ask in parts.items():
        try:
            ask()
            found[name] = "ok"
        except (KivnunError, OSError):
            found[name] = "down"
    is_ready = all(answer == "ok" for answer in found.values())
    return Readiness(status="ok" if is_ready else "down", **found)


_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


@root.get("/metrics", response_class=Response, responses=_TEXT)
def metrics(request: Request, who: Reader) -> Response:
    """Return the service's figures in Prometheus' text format."""
    if who.tenant != DEFAULT_TENANT:
        raise forbidden(f"metrics are for keys of the tenant {DEFAULT_TENANT!r}")
    return Response(request.app.state.telemetry.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
