"""The error tree: every failure a user can cause or meet has a class, a stable code and an exit status.

A message answers four questions: what was wrong, what was received, what is allowed, what to do next (the hint). Each class
also derives from the standard library's error that it refines, so that callers who know nothing of Kivnun catch it too.
Next: `kivnun/events.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class KivnunError(Exception):
    """Base of all errors Kivnun raises on purpose.

    `code` is stable (the CLI prints it, the service maps it), `exit_status` is what the CLI returns, `hint` says what to do.
    `pages` names the pages of docs/mistakes, without `.md`, that tell more: their names do not change.
    """

    code = "error"
    exit_status = 1

    def __init__(self, message: str, *, hint: str | None = None, pages: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.pages = pages

    def __str__(self) -> str:
        return "\n".join([self.message, *closing_lines(self.hint, self.pages)])


def closing_lines(hint: str | None, pages: Sequence[str]) -> list[str]:
    """Return the lines that end a message: what to do, and where more is said."""
    lines = [] if hint is None else [f"  hint: {hint}"]
    return [*lines, *(f"  more: {path_of(page)}" for page in pages)]


def path_of(page: str) -> str:
    """Return where the repository holds a page about a mistake."""
    return f"docs/mistakes/{page}.md"


class SpecError(KivnunError, ValueError):
    """The spec cannot be read, names an unknown key, or holds a value that is not allowed."""

    code = "spec_invalid"
    exit_status = 2


@dataclass(frozen=True, slots=True)
class RowProblem:
    """One thing wrong with one row of a data file. `line` counts from 1; 0 means the file as a whole. `page` is the page of
    docs/mistakes about it, if there is one."""

    path: str
    line: int
    message: str
    page: str | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}" if self.line else f"{self.path}: {self.message}"


class DataError(KivnunError, ValueError):
    """Rows that cannot be used. Holds all problems found; the text shows the first 20. Never holds a row's content."""

    code = "data_invalid"
    exit_status = 3
    shown = 20

    def __init__(
        self, message: str, problems: tuple[RowProblem, ...] = (), *, hint: str | None = None, pages: tuple[str, ...] = ()
    ) -> None:
        found = [problem.page for problem in problems if problem.page is not None]
        super().__init__(message, hint=hint, pages=tuple(dict.fromkeys((*pages, *found))))
        self.problems = problems

    def __str__(self) -> str:
        lines = [self.message, *(f"  {problem}" for problem in self.problems[: self.shown])]
        if len(self.problems) > self.shown:
            lines.append(f"  ... and {len(self.problems) - self.shown} more")
        return "\n".join([*lines, *closing_lines(self.hint, self.pages)])


class BaseModelError(KivnunError, ValueError):
    """The base cannot be found, read, or used with what the spec asks of it (targets, template, architecture)."""

    code = "base_unusable"
    exit_status = 4


class RunFolderError(KivnunError, FileExistsError):
    """The run folder is there already, holds something else, or does not match what is asked of it."""

    code = "run_folder"
    exit_status = 5


class StorageError(KivnunError, OSError):
    """The disk is full, read-only or failing. What was committed before is intact."""

    code = "storage"
    exit_status = 6

    # OSError defines its own __str__ over (errno, strerror); ours is the message with its hint.
    __str__ = KivnunError.__str__


class NonFiniteLossError(KivnunError, ArithmeticError):
    """A loss or gradient was NaN or infinite. Raised before the update, so that the weights are the last good ones."""

    code = "non_finite_loss"
    exit_status = 7


class IntegrityError(KivnunError, ValueError):
    """A file's content is not what its manifest says, or a result does not reproduce."""

    code = "integrity"
    exit_status = 8


class ProcessLostError(KivnunError, ConnectionError):
    """A process of a run in many was killed or lost; the others were ended. The last checkpoint stands."""

    code = "process_lost"
    exit_status = 9

    __str__ = KivnunError.__str__


class WontFitError(KivnunError, MemoryError):
    """The run does not fit in the memory there is. The hint names what would make it fit."""

    code = "does_not_fit"
    exit_status = 10


class ServiceError(KivnunError, RuntimeError):
    """A running service cannot be reached, or it refused what was asked."""

    code = "service"
    exit_status = 15


class InterruptedRun(KivnunError, InterruptedError):
    """The user asked to stop; the step in progress was finished and saved."""

    code = "interrupted"
    exit_status = 130

    __str__ = KivnunError.__str__
