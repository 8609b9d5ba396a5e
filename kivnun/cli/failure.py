"""What the command line says and returns when something goes wrong: one short message, a hint, a documented exit status.

Errors that Kivnun raises on purpose carry code, hint and status (`kivnun/errors.py`); this file adds those of the operating
system, of click's parser, of Ctrl-C, and the unexpected, which is our bug and says how to see the traceback.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import click

from kivnun.errors import DataError, KivnunError, RowProblem, StorageError, path_of
from kivnun.jobs import errors as _  # noqa: F401  # a class is of the tree once it is loaded

TRACEBACK_VARIABLE = "KIVNUN_TRACEBACK"
INTERNAL = 70  # EX_SOFTWARE of sysexits.h
STOPPED = 130  # 128 + SIGINT, as shells report it


@dataclass(frozen=True, slots=True)
class Failure:
    """One failure as it is shown. `text` is what a person reads; the other fields are what a program reads."""

    code: str
    exit_status: int
    message: str
    hint: str | None
    text: str
    problems: tuple[RowProblem, ...] = ()
    pages: tuple[str, ...] = ()

    def as_json(self) -> str:
        """Return one line of JSON; data errors list every problem, not only those shown."""
        error: dict[str, object] = {"code": self.code, "message": self.message, "hint": self.hint}
        if self.pages:
            error["pages"] = [path_of(page) for page in self.pages]
        if self.problems:
            error["problems"] = [{"path": p.path, "line": p.line, "message": p.message} for p in self.problems]
        status = "interrupted" if self.exit_status == STOPPED else "failed"
        return json.dumps({"status": status, "exit_status": self.exit_status, "error": error}, ensure_ascii=False)


def describe(error: BaseException) -> Failure:
    """Return how `error` is shown. Every exception has an answer; none is a traceback."""
    if isinstance(error, KivnunError):
        problems = error.problems if isinstance(error, DataError) else ()
        return Failure(error.code, error.exit_status, error.message, error.hint, str(error), problems, error.pages)
    if isinstance(error, click.UsageError):
        return _plain("usage", 2, error.format_message(), _usage_hint(error))
    if isinstance(error, click.ClickException):
        return _plain("usage", error.exit_code, error.format_message(), None)
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return _plain("interrupted", STOPPED, "stopped", None)
    if isinstance(error, OSError):
        return _plain(
            StorageError.code, StorageError.exit_status, _os_message(error), "check the path, its permissions and the free space"
        )
    if isinstance(error, MemoryError):
        return _plain("internal", INTERNAL, "out of memory", "lower compute.micro_batch_tokens or data.max_seq_len")
    return _plain(
        "internal",
        INTERNAL,
        f"unexpected {type(error).__name__}: {error}",
        f"{TRACEBACK_VARIABLE}=1 shows the traceback; please report it",
    )


def report(failure: Failure, error: BaseException, *, as_json: bool) -> None:
    """Write the failure: text to stderr, with `--json` also one object as the last line of stdout."""
    if os.environ.get(TRACEBACK_VARIABLE) == "1" and not isinstance(error, (click.ClickException, click.Abort)):
        traceback.print_exception(error, file=sys.stderr)
    print(f"{failure.code}: {failure.text}", file=sys.stderr)
    if as_json:
        print(failure.as_json(), flush=True)


def exit_statuses() -> Iterator[tuple[int, str, str]]:
    """Yield (status, code, meaning) of everything the command line returns, by status."""
    rows = [
        (0, "", "Done."),
        (1, "", "`kivnun doctor` found what prevents a run."),
        (2, "usage", "The command line names an unknown option, or lacks an argument."),
        (INTERNAL, "internal", f"A bug of Kivnun, or out of memory; {TRACEBACK_VARIABLE}=1 shows the traceback."),
    ]
    for kind in error_classes():
        rows.append((kind.exit_status, kind.code, (kind.__doc__ or "").split(". ")[0].strip().rstrip(".") + "."))
    yield from sorted(rows)


def error_classes() -> list[type[KivnunError]]:
    """Return every class of the error tree below `KivnunError`, by exit status."""
    found: list[type[KivnunError]] = []
    waiting = [KivnunError]
    while waiting:
        below = waiting.pop().__subclasses__()
        found.extend(below)
        waiting.extend(below)
    return sorted(found, key=lambda kind: (kind.exit_status, kind.code))


def _plain(code: str, exit_status: int, message: str, hint: str | None) -> Failure:
    return Failure(code, exit_status, message, hint, message if hint is None else f"{message}\n  hint: {hint}")


def _usage_hint(error: click.UsageError) -> str:
    """Return what to do about a command line that click refused. It names the nearest option or command itself."""
    command = error.ctx.command_path if error.ctx is not None else "kivnun"
    meant = _option_of_the_spec(error) or _choice_meant(error)
    return f"{f'did you mean {meant}? ' if meant else ''}{command} --help lists what is allowed"


def _option_of_the_spec(error: click.UsageError) -> str | None:
    """Return how to set an option of the spec that was given as a flag, as other tools take it."""
    if not isinstance(error, click.NoSuchOption) or error.possibilities or error.ctx is None:
        return None
    if not any("--set" in option.opts for option in error.ctx.command.params):
        return None
    from kivnun.spec.problems import nearest_path

    path = nearest_path((error.option_name.lstrip("-"),))
    return None if path is None else f"--set {path}=..."


def _choice_meant(error: click.UsageError) -> str | None:
    kind = error.param.type if isinstance(error, click.BadParameter) and error.param is not None else None
    if not isinstance(kind, click.Choice):
        return None
    given = error.message.partition("'")[2].partition("'")[0]  # "'x' is not one of ..."
    near = difflib.get_close_matches(given, [str(choice) for choice in cast("Sequence[object]", kind.choices)], 1)
    return near[0] if near else None


def _os_message(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    return reason if error.filename is None else f"{error.filename}: {reason}"
