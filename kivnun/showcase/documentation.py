"""Running text that no run trains: docstrings of the standard library's held-out modules, to see what is forgotten.

Modules are split by `data/splits.py`, and the built-in base saw those of the other side alone. Next: `scores.py`.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from kivnun.data.splits import held_out

LENGTHS = range(120, 900)  # characters: longer ones are tables and examples, shorter ones say little


def docstrings(count: int) -> list[str]:
    """Return up to `count` docstrings of held-out modules, the modules in turn, the same for the same Python."""
    modules = [list(_texts(path)) for path in _files()]
    texts: list[str] = []
    for turn in range(max(map(len, modules), default=0)):
        texts += [own[turn] for own in modules if turn < len(own)]
    return texts[:count]


def _files() -> Iterator[Path]:
    library = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names):
        for path in (library / f"{name}.py", library / name / "__init__.py"):
            if held_out("module", name) and path.is_file():
                yield path


def _texts(path: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        if text is not None and len(text) in LENGTHS:
            yield text
