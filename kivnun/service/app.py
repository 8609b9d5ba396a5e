"""The application: the router of every module of `api/` under each dialect's prefix, and every failure in the shape its clients read.

Next: `api/` (the routes), `auth.py`, `context.py`.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import secrets
from collections.abc import Awaitable, Callable
from typing import cast

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kivnun.errors import KivnunError
from kivnun.jobs.errors import DatabaseDown, StoreDown
from kivnun.service import api
from kivnun.service.context import Service
from kivnun.service.dialect import PREFIXES, dialect_of
from kivnun.service.errors import ApiError

logger = logging.getLogger(__name__)


def make_app(service: Service) -> FastAPI:
    """Return the application. It keeps nothing between requests that is not in the database."""
    app = FastAPI(title="Kivnun", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    for module in sorted(pkgutil.iter_modules(api.__path__), key=lambda found: found.name):
        router = cast(APIRouter, importlib.import_module(f"{api.__name__}.{module.name}").router)
        for prefix, dialect in PREFIXES.items():
            app.include_router(router, prefix=prefix, include_in_schema=prefix == "/v1", tags=[dialect])
    app.middleware("http")(_named)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _routed_nowhere)
    app.add_exception_handler(KivnunError, _failed)
    app.add_exception_handler(Exception, _broken)
    return app


async def _named(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
    """Give every answer a name that its client can quote."""
    request.state.id = f"req_{secrets.token_hex(16)}"
    response = await answer(request)
    response.headers["x-request-id"] = request.state.id
    response.headers["openai-version"] = "2020-10-01"
    return response


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(dialect_of(request)), error.status, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    missing = first["type"] == "missing"
    code = (
        "missing_required_parameter" if missing else "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
    )
    return await _refused(request, ApiError(400, f"{where or 'the body'}: {first['msg']}", code=code, param=where or None))


async def _routed_nowhere(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    message = (
        f"there is nothing at {request.method} {request.url.path[:200]}" if error.status_code in (404, 405) else str(error.detail)
    )
    return await _refused(request, ApiError(error.status_code, message, code=code))


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, KivnunError)
    if isinstance(error, DatabaseDown | StoreDown):
        return await _refused(request, ApiError(503, error.message, code=error.code, type="server_error"))
    return await _broken(request, error)


async def _broken(request: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error, extra={"action": "request_failed", "request": request.state.id})
    body = ApiError(500, "the request failed; the server's log says why", code="internal_error", type="server_error")
    return await _refused(request, body)
