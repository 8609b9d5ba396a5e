"""Two answers on a terminal: side by side where it is wide enough, one after the other elsewhere.

Right-to-left text is put to the right of its column, and every line of a column is isolated (Unicode's FSI and PDI), so that a
terminal that reorders text keeps each line within its column; one that does not shows no difference. Next: `chat.py`.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import zip_longest

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.text import Text

WIDE = 100  # columns from which two answers stand side by side
GAP = " │ "
FIRST_STRONG, END = "\u2068", "\u2069"

Show = Callable[[str, str], None]
"""Hears (whose answer, the text that it goes on with)."""


@contextmanager
def shown(names: Sequence[str], console: Console) -> Generator[Show]:
    """Show the answers of these speakers as they grow; what stays on the screen is the whole of them."""
    if len(names) == 2 and console.is_terminal and console.width >= WIDE:
        yield from _side_by_side(names, console)
    else:
        yield from _in_turn(names)


def _in_turn(names: Sequence[str]) -> Generator[Show]:
    speaker = ""

    def show(name: str, text: str) -> None:
        nonlocal speaker
        if len(names) > 1 and name != speaker:
            _write(f"{'' if not speaker else chr(10)}{name}: ")
        speaker = name
        _write(text)

    yield show
    _write("\n")


def _side_by_side(names: Sequence[str], console: Console) -> Generator[Show]:
    texts = dict.fromkeys(names, "")
    with Live(console=console, transient=True, auto_refresh=False) as live:

        def show(name: str, text: str) -> None:
            texts[name] += text
            live.update(_joined(texts, console), refresh=True)

        yield show
    console.print(_joined(texts, console), soft_wrap=True)


def _joined(texts: dict[str, str], console: Console) -> Text:
    return Text("\n".join(columns(texts, console.width)), no_wrap=True, end="")


def columns(texts: dict[str, str], width: int) -> list[str]:
    """Return the lines of two texts beside each other under their names, in `width` cells."""
    each = (width - len(GAP)) // 2
    sides = [[name, *_wrapped(text, each)] for name, text in texts.items()]
    return [GAP.join(_padded(line, each) for line in pair).rstrip() for pair in zip_longest(*sides, fillvalue="")]


def _wrapped(text: str, width: int) -> list[str]:
    console = Console(width=width, legacy_windows=False)
    return [line.plain.rstrip() for line in Text(text).wrap(console, width)]


def _padded(line: str, width: int) -> str:
    space = " " * (width - cell_len(line))
    whole = f"{FIRST_STRONG}{line}{END}" if line else ""
    return space + whole if _is_rtl(line) else whole + space


def _is_rtl(line: str) -> bool:
    """Return whether a line reads from right to left: its first letter with a direction says so."""
    strong = (unicodedata.bidirectional(character) for character in line)
    return next((kind in ("R", "AL") for kind in strong if kind in ("L", "R", "AL")), False)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
