"""Which of the two dialects a request speaks: told by its path alone. Next: `errors.py`, `app.py`."""

from __future__ import annotations

from typing import Literal

from starlette.requests import HTTPConnection

Dialect = Literal["openai", "azure"]

PREFIXES: dict[str, Dialect] = {"/v1": "openai", "/openai/v1": "azure", "/openai": "azure"}


def dialect_of(connection: HTTPConnection) -> Dialect:
    """Return the dialect of a request's path; Azure's control plane is under `/subscriptions`."""
    return "azure" if connection.scope["path"].startswith(("/openai", "/subscriptions")) else "openai"
