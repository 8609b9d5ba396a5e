"""The application: the routes of `api/` under each dialect's prefix, and every failure in the shape its clients read.

A module of `api/` has a `router`, whose relative paths both dialects share, a `root`, whose paths are whole, or both. Next: `api/`
(the routes), `pages.py` (the web pages), `frame.py` (what every request goes through), `auth.py`, `context.py`.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kivnun import __version__
from kivnun.errors import KivnunError
from kivnun.jobs.errors import DatabaseDown, StoreDown
from kivnun.service import api, openapi
from kivnun.service.context import Service
from kivnun.service.dialect import PREFIXES, dialect_of
from kivnun.service.errors import ApiError
from kivnun.service.frame import Frame
from kivnun.service.pages import add_pages
from kivnun.service.telemetry import Telemetry

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Routes:
    """What a module of `api/` offers."""

    name: str
    router: APIRouter | None
    root: APIRouter | None


def routes() -> Iterator[Routes]:
    """Yield the routes of every module of `api/`, by its name."""
    for found in sorted(pkgutil.iter_modules(api.__path__), key=lambda module: module.name):
        module = importlib.import_module(f"{api.__name__}.{found.name}")
        yield Routes(found.name, getattr(module, "router", None), getattr(module, "root", None))


def make_app(service: Service) -> FastAPI:
    """Return the application. It keeps nothing between requests that is not in the database, but for the minute's limits."""
    app = FastAPI(title="Kivnun", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    telemetry = Telemetry(service.db, service.clock)
    app.state.service, app.state.telemetry = service, telemetry
    described: dict[str, list[APIRouter]] = {"/v1": [], "": []}
    for found in routes():
        if found.router is not None:
            for prefix in PREFIXES:
                app.include_router(found.router, prefix=prefix, include_in_schema=prefix == "/v1", tags=[found.name])
            described["/v1"].append(found.router)
        if found.root is not None:
            app.include_router(found.root, tags=[found.name])
            described[""].append(found.root)
    add_pages(app)
    app.add_middleware(Frame, service=service, telemetry=telemetry)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _by_framework)
    app.add_exception_handler(KivnunError, _failed)
    openapi.describe(app, described)
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(dialect_of(request)), error.status, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return await _refused(request, ApiError(400, "the body is no JSON", code="invalid_json"))
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    code = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}.get(first["type"], "invalid_value")
    return await _refused(request, ApiError(400, f"{where or 'the body'}: {first['msg']}", code=code, param=where or None))


async def _by_framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    code = {404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "request_too_large"}.get(status, "invalid_request")
    message = str(error.detail)
    if status in (404, 405):
        message = f"there is nothing at {request.method} {request.url.path[:200]}"
    return await _refused(request, ApiError(status, message, code=code, headers=error.headers))


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, KivnunError)
    if not isinstance(error, DatabaseDown | StoreDown):
        raise error  # the frame writes it down and answers 500
    logger.error("a part of the service is down", exc_info=error, extra={"action": "down", "request": request.state.id})
    return await _refused(request, ApiError(503, error.message, code=error.code, type="server_error"))
