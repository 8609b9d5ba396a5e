"""What the API answers when it does not do what was asked: one exception, two shapes of body.

OpenAI's clients retry 408, 409, 429 and 5xx by themselves; an answer that no retry will change says `x-should-retry: false`.
Next: `app.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kivnun.service.dialect import Dialect

RETRY_AFTER_MS = 1000


class ApiError(Exception):
    """An answer other than 2xx. `param` names the part of the request that is wrong, `code` is stable."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        type: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.type = status, message, code, param, type
        self.extra = dict(extra or {})  # x_... fields beside the four
        self.headers = {**_retrying(status), **(headers or {})}

    def body(self, dialect: Dialect) -> dict[str, Any]:
        """Return the body: OpenAI's four fields; Azure's `code` and `message` are among them, and it adds `innererror`."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code, **self.extra}
        return {"error": {**error, "innererror": {"code": self.code}} if dialect == "azure" else error}


def _retrying(status: int) -> dict[str, str]:
    if status == 409:
        return {"x-should-retry": "false"}
    return {"retry-after-ms": str(RETRY_AFTER_MS)} if status in (429, 503) else {}


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code=code, param=param)


def not_found(kind: str, given: str, param: str | None = None) -> ApiError:
    """Return the answer for an id that there is not, or that is another tenant's: one cannot tell which."""
    return ApiError(404, f"there is no {kind} {given[:200]!r}", code="not_found", param=param)
