"""Pages of lists: how many items one has, which is what is asked for and no more than a page holds, and what it looks like.

Stock clients follow `has_more`, so that one who asks for more than that gets it in further pages, and no error. Used by `api/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Query
from pydantic import AfterValidator

MAX_PAGE = 100
T = TypeVar("T")

PageLimit = Annotated[int, Query(ge=1), AfterValidator(lambda asked: min(asked, MAX_PAGE))]


def page_object(found: Sequence[T], more: bool, shown: Callable[[T], dict[str, Any]]) -> dict[str, Any]:
    """Return a page of a list."""
    data = [shown(item) for item in found]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "has_more": more, "first_id": first, "last_id": last}
