"""Running text of one domain: the docstrings of the installed NumPy, each under its signature, split by module.

Nothing of it is in the built-in base's pretraining, which read the standard library alone. Texts are cut between paragraphs into
rows of about LONGEST characters; of a long docstring the first ROWS_PER_TEXT are taken, so that no module crowds out the others.
Nothing is imported: the sources are read where they are installed. Next: `../classification/recipe.py`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from kivnun.data.scenarios.scenario import Example, Row
from kivnun.data.splits import wanted
from kivnun.errors import DataError
from kivnun.randomness import permutation

LIBRARY = "numpy"
SKIPPED = {"tests", "_pyinstaller", "distutils", "f2py", "polynomial"}
"""Beside tests and build tools: `polynomial` holds six modules whose texts differ in a name, so a split by module would leak."""
SHORTEST, LONGEST = 200, 600
ROWS_PER_TEXT = 4
Definition = ast.Module | ast.ClassDef | ast.FunctionDef


def examples(split: str, count: int, seed: int) -> list[Example]:
    """Return up to `count` texts of one side, drawn by the seed; a text that both sides have belongs to the test side."""
    texts = _texts()
    held_out = {text for module, text in texts if wanted("module", module, "test")}
    own = [(m, t) for m, t in texts if wanted("module", m, split) and (split == "test" or t not in held_out)]
    order: list[int] = permutation(len(own), seed, "scenario.domain", split)[:count].tolist()
    return [Example({"text": own[place][1]}, (("module", own[place][0]),)) for place in order]


def convert(record: Row) -> Row:
    """Return the row of a record {"text": ...}. Raises DataError."""
    if not isinstance(record.get("text"), str) or not record["text"]:
        raise DataError("a record of running text holds a string under the key 'text'")
    return {"text": record["text"]}


@cache
def _texts() -> list[tuple[str, str]]:
    """Return (module, text) in the order of the files, no text twice."""
    found: dict[str, str] = {}
    root = _root()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root.parent)
        if SKIPPED & set(relative.parts):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        for text in _docstrings(ast.parse(path.read_text(encoding="utf-8")), module):
            for part in _parts(text)[:ROWS_PER_TEXT]:
                found.setdefault(part, module)
    return [(module, text) for text, module in found.items()]


def _root() -> Path:
    spec = find_spec(LIBRARY)
    if spec is None or spec.origin is None:
        raise DataError(f"{LIBRARY} is not installed: its documentation is this scenario's text", hint=f"pip install {LIBRARY}")
    return Path(spec.origin).parent


def _docstrings(tree: ast.Module, module: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, Definition):
            text = ast.get_docstring(node)
            if text:
                yield f"{_signature(node, module)}\n{text.strip()}"


def _signature(node: Definition, module: str) -> str:
    if isinstance(node, ast.Module):
        return f"module {module}"
    if isinstance(node, ast.ClassDef):
        return f"class {module}.{node.name}"
    return f"{module}.{node.name}({ast.unparse(node.args)})"


def _parts(text: str) -> list[str]:
    """Return the text in parts of whole paragraphs of about LONGEST characters; parts under SHORTEST are left out."""
    parts = [""]
    for paragraph in text.split("\n\n"):
        if parts[-1] and len(parts[-1]) + len(paragraph) > LONGEST:
            parts.append("")
        parts[-1] = f"{parts[-1]}\n\n{paragraph}" if parts[-1] else paragraph
    return [part for part in parts if SHORTEST <= len(part) <= 2 * LONGEST]
