"""Processes of one run on this machine: started by torchrun's agent, told to stop together, and one answer for all of them.

Runs over several machines are started by `torchrun` on each (docs/guides/many-processes.md); this file is then only asked whether
that is so. Next: `train/processes.py` (how they find each other), `cli/tune.py` (what each of them runs).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from kivnun.errors import ProcessLostError

REPORTS = "KIVNUN_REPORTS"  # the folder in which processes leave how they ended, for the one that started them
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE_S = 60  # for the others, once one has ended


class EndedTogether(Exception):
    """How a run of several processes failed, as one of them told it: fields that its command line would show."""

    def __init__(self, told: dict[str, Any]) -> None:
        super().__init__(told["message"])
        self.told = told


def started_by_torchrun() -> bool:
    """Return whether this process is one of those that torchrun starts."""
    return all(name in os.environ for name in ENVIRONMENT)


def is_first() -> bool:
    """Return whether this process is the one that writes and is heard."""
    return int(os.environ["RANK"]) == 0


def leave_report(told: dict[str, Any]) -> bool:
    """Write how this process failed where the one that started it looks; return whether there is such a place."""
    folder = os.environ.get(REPORTS)
    if folder is None:
        return False
    with contextlib.suppress(OSError):
        Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(told), encoding="utf-8")
    return True


def start(processes: int, arguments: Sequence[str]) -> None:
    """Run `python -m kivnun ARGUMENTS` in so many processes of this machine, and wait for them.

    SIGINT and SIGTERM ask them to stop after the step in progress; a second SIGINT ends them at once. Raises EndedTogether with
    what the first process to fail said, ProcessLostError when one was killed.
    """
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are handled here
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="kivnun-") as place:
        os.environ[REPORTS] = place
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            signals_to_handle="SIGQUIT",
            **_patience(LaunchConfig),
        )
        try:
            with _passing_on_signals(Path(place)):
                elastic_launch(config, sys.executable)("-m", "kivnun", *arguments)
        except ChildFailedError as error:
            raise _ended(Path(place), error) from None
        finally:
            del os.environ[REPORTS]


def _patience(config: type) -> dict[str, Any]:
    """Return how long torch waits for processes that were asked to stop; torch before 2.12 has no such option."""
    return {"shutdown_timeout": PATIENCE_S} if any(field.name == "shutdown_timeout" for field in fields(config)) else {}


def say_where() -> None:
    """Leave this process's number where the one that started it looks, to pass signals on."""
    place = os.environ.get(REPORTS)
    if place is not None:
        Path(place, f"{os.environ['RANK']}.pid").write_text(str(os.getpid()), encoding="ascii")


@contextlib.contextmanager
def _passing_on_signals(place: Path) -> Iterator[None]:
    """Pass SIGINT and SIGTERM on to the processes as SIGTERM; let a second SIGINT interrupt this process, which ends them."""

    def pass_on(number: int, _frame: object) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for file in place.glob("*.pid"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(file.read_text(encoding="ascii")), signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(place: Path, error: Any) -> Exception:
    """Return the failure to tell: of those that processes told, one that is not about another process; else who was killed."""
    told = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(place.glob("*.json"), key=lambda file: int(file.stem))]
    causes = [its for its in told if its["code"] != ProcessLostError.code]
    if causes:
        return EndedTogether(causes[0])
    rank, failure = min(error.failures.items(), key=lambda item: item[1].timestamp)
    how = f"was ended by signal {-failure.exitcode}" if failure.exitcode < 0 else f"ended with status {failure.exitcode}"
    for number, its in error.failures.items():  # a killed process comes before those that lost it
        if its.exitcode == -signal.SIGKILL:
            rank, how = number, f"was ended by signal {int(signal.SIGKILL)}"
            break
    return ProcessLostError(f"process {rank} {how}; the others were ended", hint="go on from the last checkpoint with --resume")
