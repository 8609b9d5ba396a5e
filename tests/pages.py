"""A page of the documentation as a session: the files it names, the commands of its `sh` blocks, and what `text` blocks show.

A file is saved where the text says `name` before a block. A comment `# exit status N` says how a command ends; without one it ends
with 0.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"`([\w./-]+\.(?:jsonl|json|yaml|csv|py))`[^`]*\Z")
STATUS = re.compile(r"\s+# exit status (\d+)$")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: its language, its text, and the file that the sentence before it names."""

    language: str
    text: str
    name: str | None


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        before = text[: match.start()].rstrip().rpartition("\n\n")[2]
        name = NAMED.search(before)
        yield Block(match[1], match[2], name[1] if name else None)


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def commands(page: Path) -> Iterator[tuple[list[str], int]]:
    """Yield each command of the page's `sh` blocks that a test can run, with the exit status it should have."""
    for block in blocks(page):
        if block.language == "sh":
            for line in block.text.splitlines():
                status = STATUS.search(line)
                words = shlex.split(line, comments=True)
                if words[:1] in (["kivnun"], ["python"]):
                    yield words, int(status[1]) if status else 0


def is_tree(block: Block) -> bool:
    return block.text.startswith("kivnun/\n")


def save_files(page: Path, folder: Path) -> None:
    for block in blocks(page):
        if block.name is not None and block.language in ("json", "yaml", "text", "csv", "python"):
            (folder / block.name).write_text(block.text, encoding="utf-8")
