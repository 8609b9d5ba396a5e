"""The service's log: a JSON object a line, made of fields that are listed here and of nothing else.

A message is the constant that a programmer wrote; of its arguments, numbers and the types of exceptions are shown. Other values
come as listed fields alone. Of an exception, its type and where it was are told, not its text, which may quote a row or a query.
So neither contents nor keys can be in a log, whatever is raised. Next: `frame.py`, which writes the line of each request.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import traceback
from types import TracebackType
from typing import Any, TextIO

from kivnun.errors import KivnunError

# What a line may hold beside time, level, logger, message and error. Ids are the service's own; a route is a template.
NAMES = (
    "action", "request", "method", "route", "tenant", "key", "job", "file", "batch", "endpoint", "event", "worker", "answerer",
    "lease", "duty", "base", "address", "wanted", "used",
)  # fmt: skip
COUNTS = ("status", "ms", "step", "attempt", "epoch", "count", "bytes", "tokens", "prompt", "completion")  # as numbers alone
MAX_LETTERS = 200
FRAMES = 30


class JsonLines(logging.Formatter):
    """Writes a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": round(record.created, 3), "level": record.levelname.lower(), "logger": record.name,
            "message": _message(record),
        }  # fmt: skip
        for name in (*NAMES, *COUNTS):
            value = record.__dict__.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                line[name] = value
            elif isinstance(value, str) and name in NAMES:
                line[name] = value[:MAX_LETTERS]
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = _error(record.exc_info[1], record.exc_info[2])
        return json.dumps(line, ensure_ascii=True, allow_nan=False, default=str)


def configure(stream: TextIO | None = None, level: int = logging.INFO) -> logging.Handler:
    """Send every logger of this process to one handler, and return it. Whoever starts a process of the service calls it once."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"  # it would write addresses as they were asked for
    return handler


def _message(record: logging.LogRecord) -> str:
    """Return a message's constant part; of others' loggers, which write what they please into it, where it was written."""
    own = record.name == "kivnun" or record.name.startswith("kivnun.")
    if not own:
        return f"{record.module}:{record.lineno}"
    if not isinstance(record.args, tuple) or not record.args:
        return str(record.msg)[:MAX_LETTERS]
    try:
        return (str(record.msg) % tuple(map(_shown, record.args)))[:MAX_LETTERS]
    except (TypeError, ValueError):
        return str(record.msg)[:MAX_LETTERS]


def _shown(argument: object) -> object:
    """Return an argument of a message as far as it can be shown: a number, or the name of an exception's type."""
    if isinstance(argument, int | float):
        return argument
    if isinstance(argument, BaseException):
        return type(argument).__name__
    return argument if isinstance(argument, str) and argument in _names_of(BaseException) else "…"


def _names_of(kind: type) -> set[str]:
    return {kind.__name__}.union(*map(_names_of, kind.__subclasses__()))


def _error(error: BaseException, trace: TracebackType | None) -> dict[str, Any]:
    found: dict[str, Any] = {"type": f"{type(error).__module__}.{type(error).__qualname__}"}
    if isinstance(error, KivnunError):
        found["code"] = error.code
    frames = traceback.extract_tb(trace)[-FRAMES:]
    found["at"] = [f"{frame.filename.rpartition('site-packages/')[2][-100:]}:{frame.lineno} {frame.name}" for frame in frames]
    if error.__cause__ is not None:
        found["cause"] = f"{type(error.__cause__).__module__}.{type(error.__cause__).__qualname__}"
    return found
