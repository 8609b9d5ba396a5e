"""The description of the API at `/openapi.json`: what FastAPI knows of the routes, and what it cannot know of this service.

Every operation behind a key names the scope it needs and the errors it may answer with; their body is one schema. Azure's dialect
has the same operations below `/openai`, so they are told once. Next: `app.py`.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from kivnun.service.auth import Needs

DESCRIPTION = (
    "A fine-tuning service that OpenAI's clients talk to unchanged. The operations below /v1 are OpenAI's dialect; Azure's has the "
    "same ones below /openai/v1, and below /openai with ?api-version=. Paths and fields that begin with x_ are this service's own."
)
ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The part of the request that is wrong."},
                "code": {"type": "string", "description": "Stable: scripts may depend on it."},
                "innererror": {"type": "object", "description": "In Azure's dialect."},
            },
        }
    },
}
ERRORS = {
    "400": "The request is wrong: `param` says where.",
    "401": "The key is missing, wrong, expired or revoked.",
    "403": "The key lacks the scope.",
    "404": "There is no such object, or it is another tenant's.",
    "408": "The body stopped coming.",
    "413": "The body is too long.",
    "415": "The body is in a coding or of a type that is not taken.",
    "429": "A limit is reached: `retry-after-ms` says for how long.",
    "500": "The service failed.",
    "503": "A part of the service is down for now.",
}
SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "OpenAI's clients send a key so."},
    "api-key": {"type": "apiKey", "in": "header", "name": "api-key", "description": "Azure's clients send a key so."},
}


def describe(app: FastAPI, routers: dict[str, list[APIRouter]]) -> None:
    """Give `app` its description. `routers` are those that were included, by the prefix under which they are described."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, routers)
        return app.openapi_schema

    app.openapi = document


def needs_of(route: APIRoute) -> Needs | None:
    """Return what a route asks of a key; None where it takes no key."""
    return next((found.call for found in route.dependant.dependencies if isinstance(found.call, Needs)), None)


def _document(app: FastAPI, routers: dict[str, list[APIRouter]]) -> dict[str, Any]:
    made = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
    components = made.setdefault("components", {})
    components.setdefault("schemas", {})["Error"] = ERROR
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own shape of a 422, which this service never answers
        components["schemas"].pop(unused, None)
    components["securitySchemes"] = SECURITY
    for prefix, included in routers.items():
        for route in (route for router in included for route in router.routes):
            if isinstance(route, APIRoute) and route.include_in_schema:
                for method in route.methods or ():
                    _complete(made["paths"][prefix + route.path_format][method.lower()], needs_of(route))
    return made


def _complete(operation: dict[str, Any], needs: Needs | None) -> None:
    """Add to an operation its errors and what it asks of a key."""
    answers = operation["responses"]
    if "HTTPValidationError" in str(answers.get("422")):
        del answers["422"]
    told = ERRORS if needs is not None else {status: ERRORS[status] for status in ("400", "408", "413", "415", "500", "503")}
    for status, description in told.items():
        answers.setdefault(
            status,
            {"description": description, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}},
        )
    operation["responses"] = dict(sorted(answers.items()))
    if needs is not None:
        operation["security"] = [{"bearer": []}, {"api-key": []}]
        operation["x-scope"] = needs.scope
