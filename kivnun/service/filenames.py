"""Names of files as their owners give them: kept for people to read, never a path, and safe in a header.

Next: `api/files.py`.
"""

from __future__ import annotations

import re
import unicodedata
from urllib.parse import quote

MAX_LETTERS = 255
UNNAMED = "upload"
_MAX_ENDING = 16


def kept_name(given: str) -> str:
    """Return the last part of a name as it is kept: without characters that control, hide or turn text around, 255 letters at most.

    Right-to-left letters stay; only marks that override the order in which others are shown go."""
    last = re.split(r"[/\\]", given)[-1]
    name = "".join("_" if _is_unsafe(letter) else letter for letter in last).strip(" ")
    if len(name) > MAX_LETTERS:
        stem, dot, ending = name.rpartition(".")
        ending = dot + ending if stem and len(ending) <= _MAX_ENDING else ""
        name = name[: MAX_LETTERS - len(ending)] + ending
    return name if name.strip("._ ") else UNNAMED


def content_disposition(name: str) -> str:
    """Return the header that offers a file under its name (RFC 6266): in ASCII for old clients, and whole for all others."""
    plain = "".join(letter if " " <= letter <= "~" and letter not in '"\\%' else "_" for letter in name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"


def _is_unsafe(letter: str) -> bool:
    return (
        unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")
        or letter in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    )
