"""Fixtures that several tests of the API share: a toy service of a module's own, its address, a clock. A module may have others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from kivnun.jobs.place import Place
    from kivnun.service.context import Service
    from kivnun.worker.trainer import Trainers
    from service_parts import Clock


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    from service_parts import place, service_at

    made = service_at(place(tmp_path_factory.mktemp("service")))
    yield made
    made.db.close()


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    """Return the address of the module's service, without /v1."""
    from service_parts import api

    with api(service) as address:
        yield address


@pytest.fixture
def base_url(service: Service) -> Iterator[str]:
    """Return an address of a service, with /v1, for one test."""
    from service_parts import api

    with api(service) as address:
        yield f"{address}/v1"


@pytest.fixture
def clock() -> Clock:
    from service_parts import Clock

    return Clock()


@pytest.fixture
def quick(tmp_path: Path) -> Place:
    """A place on SQLite for toy jobs, for what is about processes and not about SQL."""
    from toy_jobs import toy_place

    return toy_place(tmp_path / "place")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, trainers: Trainers) -> dict[str, str]:
    """Return the adapter of SLOW, trained without a stop."""
    from toy_jobs import SLOW, adapter_of_quiet_run, queue_job, toy_place

    place = toy_place(tmp_path_factory.mktemp("undisturbed"))
    return adapter_of_quiet_run(place, queue_job(place, spec=SLOW.model_copy(update={"step_ms": 0.0})), trainers)
