"""Writes docs/reference/errors.md from the error tree in `kivnun/errors.py`.

Run by `make docs`; `tests/unit/test_cli_reference.py` fails when the page is out of date.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from kivnun.cli.failure import error_classes
from kivnun.errors import KivnunError

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "errors.md"
HEAD = """# Errors

Written by `scripts/reference_errors.py` from `kivnun/errors.py`; do not edit.

Every error raised on purpose is a `KivnunError` with a `message`, a `hint` and a stable `code`; each class is also the standard
library's error that it refines, so that code that knows nothing of Kivnun catches it too. `kivnun` prints the code and the message
to stderr and returns the exit status; with `--json` the last line of stdout is
`{"status": "failed", "exit_status": ..., "error": {"code", "message", "hint"}}`, and for data also `problems`, each with `path`,
`line` and `message`. The commonest have pages that tell more ([mistakes](../mistakes/README.md)): the last line of the message
names them (`more:`), and so do `pages` of the class and `error.pages` of the JSON.
"""


def page() -> str:
    """Return the page's text."""
    return "\n".join([HEAD, *(_section(kind) for kind in error_classes())])


def _section(kind: type[KivnunError]) -> str:
    refines = next(parent.__name__ for parent in kind.__mro__[1:] if parent.__module__ == "builtins")
    return (
        f"## `{kind.code}`\n\n`{kind.__name__}`, refines `{refines}`; exit status {kind.exit_status}.\n\n{inspect.getdoc(kind)}\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
