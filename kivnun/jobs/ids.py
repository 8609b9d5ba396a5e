"""Names that the service gives: long enough that nobody guesses one, and made of letters and digits alone."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable

ALPHABET = string.ascii_letters + string.digits

NewId = Callable[[str], str]
"""Gives a new id that begins with what it is handed (`ftjob-`)."""


def new_id(prefix: str) -> str:
    """Return `prefix` and 24 random letters and digits (142 bits)."""
    return prefix + "".join(secrets.choice(ALPHABET) for _ in range(24))
