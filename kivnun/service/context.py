"""What all handlers share, made once in `kivnun serve`'s API process and passed in: no globals. Next: `app.py`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from kivnun.jobs.blobs import BlobStore
from kivnun.jobs.config import ServiceConfig
from kivnun.jobs.database import Database
from kivnun.jobs.ids import NewId, new_id
from kivnun.service.aside import Aside
from kivnun.service.limits import RateLimits


@dataclass(frozen=True)
class Service:
    """The database, the blobs, the configuration, and where the time comes from (seconds since 1970)."""

    db: Database
    blobs: BlobStore
    config: ServiceConfig
    scratch: Path  # a folder of this process alone, for what is being received
    clock: Callable[[], float]
    new_id: NewId = field(default=new_id)
    limits: RateLimits = field(default_factory=lambda: RateLimits(time.monotonic))
    completions: Aside = field(default_factory=lambda: Aside(4))  # uploads that are put together
    dry_runs: Aside = field(default_factory=lambda: Aside(2))
    probes: Aside = field(default_factory=lambda: Aside(2))  # whether the database and the store answer


def service_of(connection: HTTPConnection) -> Service:
    return connection.app.state.service


Shared = Annotated[Service, Depends(service_of)]
