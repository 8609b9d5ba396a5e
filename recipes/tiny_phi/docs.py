"""English from the standard library: docstrings under their signatures, comment blocks, and the language's topics.

The only finite part of the corpus, about 4 MB. Modules on the test side of `held_out("module", name)` are left out, wherever they
are named as the place of a text; so are test packages. The text differs by Python version (`corpus.json`
records which it was) and is that of a fresh interpreter: programs that replace hooks of `sys` change its docstrings.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path

from kivnun.data.scenarios.draws import Draws
from kivnun.data.splits import held_out
from recipes.tiny_phi.chat import Task, chat

SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib2to3",
    "turtledemo",
    "pydoc_data",
    "msilib",
}
COMPILED = [
    "array",
    "atexit",
    "binascii",
    "builtins",
    "cmath",
    "errno",
    "fcntl",
    "gc",
    "grp",
    "itertools",
    "marshal",
    "math",
    "mmap",
    "posix",
    "pwd",
    "readline",
    "resource",
    "select",
    "signal",
    "sys",
    "syslog",
    "termios",
    "time",
    "unicodedata",
    "zlib",
    "_thread",
    "_struct",
    "_random",
    "_heapq",
    "_bisect",
    "_collections",
    "_functools",
    "_operator",
    "_csv",
    "_json",
    "_socket",
]


def entries() -> list[tuple[str, str]]:
    """Return (top-level module, text) for every docstring and comment block of the training side, in a fixed order."""
    found: list[tuple[str, str]] = []
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        module = relative.parts[0].removesuffix(".py")
        if SKIPPED & set(relative.parts) or held_out("module", module.removeprefix("_")):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        found += [(module, text) for text in _docstrings(source, name)]
        found += [(module, text) for text in _comments(path, name)]
    for name in COMPILED:
        if not held_out("module", name.removeprefix("_")):
            found += [(name, text) for text in _compiled(name)]
    found += [("pydoc_data", text) for text in _topics()]
    return list(dict.fromkeys(found))


def module_chat(draws: Draws, documented: list[tuple[str, str]]) -> str:
    """Return a question which of a few modules a docstring is from; the modules are of the training side."""
    module, text = draws.pick(documented)
    others = draws.sample(sorted({m for m, _ in documented}), 4)
    options = draws.shuffled(list(dict.fromkeys([module, *others]))[: draws.between(2, 4)])
    lines = [line.strip() for line in text.splitlines() if line.strip()][:5]
    ask = draws.pick(
        (
            "Which module is this from?",
            "Choose the package.",
            "To which module does this belong?",
            "Pick the module.",
            "Module of this docstring?",
        )
    )
    return chat(draws, [Task(f"{ask} Options: {', '.join(options)}\n" + "\n".join(lines)[:400], module)])


def python_version() -> str:
    return ".".join(str(part) for part in sys.version_info[:3])


def _docstrings(source: str, module: str) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text and len(text) > 20:
            yield f"{_signature(node, module)}\n{text.strip()}"


def _signature(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, module: str) -> str:
    if isinstance(node, ast.Module):
        return f"module {module}"
    if isinstance(node, ast.ClassDef):
        return f"class {module}.{node.name}"
    return f"{module}.{node.name}({ast.unparse(node.args)})"


def _comments(path: Path, module: str) -> Iterator[str]:
    """Give blocks of two or more comment lines, the licence heads left out."""
    block: list[str] = []
    last = -2
    try:
        with path.open("rb") as file:
            tokens = [t for t in tokenize.tokenize(file.readline) if t.type == tokenize.COMMENT and t.line.strip().startswith("#")]
    except (tokenize.TokenError, SyntaxError):
        return
    for token in [*tokens, None]:
        if token is not None and token.start[0] == last + 1:
            block.append(token.string.lstrip("#").rstrip())
            last = token.start[0]
            continue
        text = textwrap.dedent("\n".join(block)).strip()
        if len(block) >= 2 and len(text) > 60 and "opyright" not in text and "icens" not in text:
            yield f"# {module}\n{text}"
        if token is not None:
            block, last = [token.string.lstrip("#").rstrip()], token.start[0]


def _compiled(name: str) -> Iterator[str]:
    try:
        module = importlib.import_module(name)
    except ImportError:  # not on this platform
        return
    if module.__doc__:
        yield f"module {name}\n{inspect.cleandoc(module.__doc__)}"
    for key, value in sorted(vars(module).items()):
        if key.startswith("__") or not (inspect.isbuiltin(value) or inspect.isclass(value)):
            continue
        members = [(key, value)]
        if inspect.isclass(value):
            members += [(f"{key}.{k}", v) for k, v in sorted(vars(value).items()) if inspect.ismethoddescriptor(v)]
        for path, member in members:
            text = getattr(member, "__doc__", None)
            if isinstance(text, str) and len(text) > 20:
                yield f"{name}.{path}{getattr(member, '__text_signature__', None) or ''}\n{inspect.cleandoc(text)}"


def _topics() -> Iterator[str]:
    topics = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        for block in textwrap.dedent(text).split("\n\n"):
            if len(block) > 60:
                yield f"{name}: {' '.join(block.split())}" if not block.startswith("   ") else block


assert sys.version_info >= (3, 11), "the recipe reads the standard library of Python 3.11 or later"
