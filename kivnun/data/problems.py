"""Problems of rows, gathered as they come: all are counted by reason, and only so many are kept that they cannot fill memory.

Next: `checks.py` and `loader.py`, which gather them; `errors.py` (what a problem is).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from kivnun.errors import RowProblem

KEPT = 100_000
"""Problems that are kept with their places; beyond, they are counted."""
PLACES = 20
"""Places of each reason that a sentence names."""


class Problems:
    """Problems as they are found: the first KEPT with their places, all of them by reason. Those of one row come together."""

    def __init__(self) -> None:
        self.kept: list[RowProblem] = []
        self.rows = 0
        self._counts: Counter[str] = Counter()
        self._places: dict[str, list[str]] = {}
        self._row: tuple[str, int] | None = None
        self._said: set[str] = set()  # of this row
        self._left_out = 0

    def __bool__(self) -> bool:
        return self.rows > 0

    def add(self, problem: RowProblem) -> None:
        """Take the next problem."""
        if self._row != (problem.path, problem.line):
            self._row, self._said = (problem.path, problem.line), set()
            self.rows += 1
        if len(self.kept) < KEPT:
            self.kept.append(problem)
        else:
            self._left_out += 1
        reason = _reason(problem.message)
        if reason not in self._said:
            self._said.add(reason)
            self._counts[reason] += 1
            places = self._places.setdefault(reason, [])
            if len(places) < PLACES:
                places.append(f"{problem.path}:{problem.line}")

    @property
    def left_out(self) -> str:
        """Words for the problems that are counted and not kept; nothing where all are."""
        return f" (the first {KEPT:,} problems are listed, {self._left_out:,} more are not)" if self._left_out else ""

    @property
    def reasons(self) -> dict[str, int]:
        """Reason -> number of rows, most frequent first. A reason is a problem's words without its numbers and names."""
        return dict(sorted(self._counts.items(), key=lambda item: (-item[1], item[0])))

    def sentences(self) -> Iterator[str]:
        """Yield one sentence per reason: how many rows were skipped for it, why, and where (the first PLACES)."""
        for reason, count in self.reasons.items():
            more = f" and {count - PLACES:,} more" if count > PLACES else ""
            places = ", ".join(self._places[reason])
            yield f"{count:,} {'row' if count == 1 else 'rows'} skipped: {reason} ({places}{more})"


def _reason(message: str) -> str:
    without_places = re.sub(r"\[\d+\]", "[]", message)
    return re.sub(r"(?<!UTF-)\d+", "N", re.sub(r"(?<!\w)'[^']*'", "'…'", without_places))
