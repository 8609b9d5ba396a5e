"""The description of the API at `/openapi.json`: what FastAPI knows of the routes, and what it cannot know of this service.

Every operation behind a key names the scope it needs and the errors it may answer with; their body is one schema. Azure's dialect
has the same operations below `/openai`, so they are told once. Next: `app.py`.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from kivnun.jobs.files import PURPOSES
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
WITH_BODY = ("408", "413", "415")
IDEMPOTENT = ("/v1/fine_tuning/jobs", "/v1/batches")  # POSTs that a client may repeat under one Idempotency-Key
REUSED = "The Idempotency-Key came with another body before."
_IDEMPOTENCY = {
    "name": "Idempotency-Key", "in": "header", "required": False, "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}  # fmt: skip
_API_VERSION = {
    "name": "api-version", "in": "query", "required": True, "description": "Any that Azure has or had; all mean the same.",
    "schema": {"type": "string", "pattern": r"^(\d{4}-\d{2}-\d{2}(-preview)?|preview|latest|v1)$"}, "example": "2024-10-21",
}  # fmt: skip


def _form(field: str, **others: Any) -> dict[str, Any]:
    properties = {field: {"type": "string", "format": "binary"}, **others}
    schema = {"type": "object", "required": list(properties), "properties": properties}
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def _object(**properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "required": list(properties), "properties": properties, "additionalProperties": True}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


_MESSAGES = {
    "type": "array", "minItems": 1, "items": {
        "type": "object", "required": ["role"],
        "properties": {"role": {"enum": ["system", "developer", "user", "assistant", "tool"]}, "content": {}},
    },
}  # fmt: skip
# Bodies that handlers read themselves: forms that are streamed, and JSON that the answering code judges.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/files": _form("file", purpose={"type": "string", "enum": list(PURPOSES)}),
    "/v1/uploads/{upload_id}/parts": _form("data"),
    "/v1/chat/completions": _object(model={"type": "string"}, messages=_MESSAGES),
    "/v1/completions": _object(model={"type": "string"}, prompt={"type": "string"}),
    "/v1/deployments/{name}/chat/completions": _object(messages=_MESSAGES),
    "/v1/deployments/{name}/completions": _object(prompt={"type": "string"}),
}  # fmt: skip
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
                    path = prefix + route.path_format
                    _complete(made["paths"][path][method.lower()], path, method, route)
    return made


def _complete(operation: dict[str, Any], path: str, method: str, route: APIRoute) -> None:
    """Add to an operation what FastAPI cannot know: its errors, its key, and what the frame or the handler itself reads."""
    needs = needs_of(route)
    operation["operationId"] = f"{operation['tags'][0]}_{route.name}"
    parameters = operation.setdefault("parameters", [])
    if path.startswith(("/openai/", "/subscriptions/")):
        parameters.append(_API_VERSION)
    told = dict(ERRORS)
    if method == "POST":
        if path in BODIES:
            operation.setdefault("requestBody", BODIES[path])
        if path in IDEMPOTENT:
            parameters.append(_IDEMPOTENCY)
            told["422"] = REUSED
    dropped = set() if method in ("POST", "PUT") else set(WITH_BODY)
    if needs is None:
        dropped |= {"401", "403", "404", "429"}
    else:
        operation["security"] = [{"bearer": []}, {"api-key": []}]
        operation["x-scope"] = needs.scope
    answers = operation["responses"]
    if "HTTPValidationError" in str(answers.get("422")):
        del answers["422"]
    for status, description in told.items():
        if status not in dropped:
            schema = {"schema": {"$ref": "#/components/schemas/Error"}}
            answers.setdefault(status, {"description": description, "content": {"application/json": schema}})
    operation["responses"] = dict(sorted(answers.items()))
