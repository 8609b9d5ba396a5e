"""How many items a page of a list has: what is asked for, and no more than a page holds.

Stock clients follow `has_more`, so that one who asks for more than that gets it in further pages, and no error. Used by `api/`.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Query
from pydantic import AfterValidator

MAX_PAGE = 100

PageLimit = Annotated[int, Query(ge=1), AfterValidator(lambda asked: min(asked, MAX_PAGE))]
