"""The API against its own description, by schemathesis: what is asked at random is answered as it says, and nothing breaks.

Requests are generated from `/openapi.json`, good ones and wrong ones, from a fixed seed: a few for each operation here, many more,
on PostgreSQL, among the slow tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from kivnun.service.app import make_app
from kivnun.service.context import Service
from service_parts import KEY, place, service_at
from service_routes import all_routes

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance, negative_data_rejection,
]  # fmt: skip


def _ask_everything(service: Service, examples: int) -> None:
    """Ask every operation, and fail with all that was wrong."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(service))
    seeded = settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    wrong, asked = [], 0
    for operation in (result.ok() for result in schema.get_all_operations()):
        asked += 1
        for mode in GenerationMode:

            @seeded
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                case.call_and_validate(checks=CHECKS, headers={"Authorization": f"Bearer {KEY}"})

            try:
                ask()
            except Unsatisfiable:
                assert mode is GenerationMode.NEGATIVE, "good requests can always be made"
            except FailureGroup as group:
                wrong.extend(f"{operation.label}: {failure}" for failure in group.exceptions)
    assert asked > 50
    assert not wrong, "\n".join(wrong)


def test_the_api_answers_as_it_is_described(tmp_path: Path) -> None:
    _ask_everything(service_at(place(tmp_path)), 2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_api_on_postgresql_answers_as_it_is_described_at_length(tmp_path: Path, postgres: str) -> None:
    from postgres import empty_database

    with empty_database(postgres) as url:
        service = service_at(place(tmp_path, url))
        _ask_everything(service, 25)
        service.db.close()


def test_every_route_is_described_with_its_scope_its_errors_and_a_name_of_its_own(tmp_path: Path) -> None:
    document = make_app(service_at(place(tmp_path))).openapi()
    described = {
        (method.upper(), path): operation
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
    hidden = {"POST /v1/fine_tuning/jobs/{job_id}/events"}  # an alias
    for route in all_routes():
        if route.answered_by.__module__.endswith("unsupported") or str(route) in hidden:
            continue
        operation = described.pop((route.method, route.path.replace(":path}", "}")))
        assert operation.get("x-scope") == (None if route.needs is None else route.needs.scope)
        assert {"400", "500", "503"} <= set(operation["responses"])
        for status, answer in operation["responses"].items():
            if status >= "400" and (status, route.path) != ("503", "/ready"):
                assert answer.get("content", {}).get("application/json", {"schema": 1})["schema"], f"{route} {status}"
        assert route.needs is None or {"401", "403", "429"} <= set(operation["responses"])
        assert route.method not in ("POST", "PUT") or "413" in operation["responses"]
    assert not described, "a route is described that there is not"
    names = [operation["operationId"] for operations in document["paths"].values() for operation in operations.values()]
    assert len(names) == len(set(names))
    assert set(document["components"]["securitySchemes"]) == {"bearer", "api-key"}
