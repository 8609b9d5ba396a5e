"""The routes that the application has, read from its modules: the tests about all of them cannot forget one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from fastapi.routing import APIRoute

from kivnun.service.app import routes
from kivnun.service.auth import Needs
from kivnun.service.openapi import needs_of

QUERY = {"api-version": "2024-10-21"}  # no harm in OpenAI's dialect


@dataclass(frozen=True)
class Route:
    """One method of one route. `path` is its template under /v1, or whole."""

    method: str
    path: str
    needs: Needs | None
    params: tuple[str, ...]
    answered_by: Callable[..., Any]
    query: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    def at(self, values: Mapping[str, str]) -> str:
        """Return the path with its parameters' values, as clients send them."""
        return re.sub(r"\{(\w+)(:\w+)?\}", lambda found: quote(values[found[1]], safe=":"), self.path)


def all_routes() -> Iterator[Route]:
    """Yield every method of every route under /v1 and at the root."""
    for found in routes():
        for prefix, router in (("/v1", found.router), ("", found.root)):
            for route in () if router is None else router.routes:
                for method in sorted(getattr(route, "methods", None) or ()):
                    assert isinstance(route, APIRoute), "the others are pages, which `pages.py` adds"
                    params = tuple(re.findall(r"\{(\w+)(?::\w+)?\}", route.path))
                    query = tuple(param.name for param in route.dependant.query_params)
                    yield Route(method, prefix + route.path, needs_of(route), params, route.endpoint, query)


def distinct(found: Iterable[Route]) -> list[Route]:
    """Return one route for each function that answers: what is asked of a key is written there."""
    return list({route.answered_by: route for route in found}.values())


def fillers(route: Route) -> dict[str, Any]:
    """Return values for a route's parameters that name nothing."""
    return dict.fromkeys(route.params, "nothing")
