"""`kivnun tune` in several processes: as the one that starts them, or as one of them. Next: `kivnun/launch.py`."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kivnun.cli.failure import TRACEBACK_VARIABLE, Failure, describe, report
from kivnun.errors import RowProblem
from kivnun.spec import MultiProcessSpec, TuneSpec


def start_together(processes: int, arguments: Sequence[str], *, as_json: bool) -> int:
    """Run the command in so many processes of this machine; return its exit status."""
    from kivnun.launch import EndedTogether, start

    try:
        start(processes, arguments)
    except EndedTogether as ended:
        problems = tuple(RowProblem(**problem) for problem in ended.told.pop("problems"))
        pages = tuple(ended.told.pop("pages"))
        failure = Failure(**ended.told, problems=problems, pages=pages)
        report(failure, ended, as_json=as_json)
        return failure.exit_status
    return 0


def tune_together(
    spec: TuneSpec,
    text: str,
    run: Path,
    going_on: AbstractContextManager[None],
    *,
    resume: bool,
    tensorboard: bool,
    show: Callable[[dict[str, Any]], None],
) -> int:
    """Take part in a run as one of the processes that torchrun started; return this one's exit status. The first is heard."""
    from kivnun.launch import is_first, leave_report, say_where

    try:
        say_where()
        with going_on:
            result = _run(spec, text, run, resume, tensorboard, heard=is_first())
        if is_first():
            show(result)
        return 0
    except BaseException as error:
        failure = describe(error)
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            traceback.print_exception(error, file=sys.stderr)
        if not leave_report(asdict(failure)):
            if is_first():
                raise
            print(f"process {os.environ['RANK']}: {failure.code}: {failure.text}", file=sys.stderr)
        return failure.exit_status


def _run(spec: TuneSpec, text: str, run: Path, resume: bool, tensorboard: bool, *, heard: bool) -> dict[str, Any]:
    import warnings

    from kivnun.cli.process import give_back_memory, set_threads
    from kivnun.cli.screen import open_screen
    from kivnun.evaluate.tensorboard import with_board

    assert isinstance(spec.compute, MultiProcessSpec)
    give_back_memory()
    cores, local = len(os.sched_getaffinity(0)), int(os.environ["LOCAL_WORLD_SIZE"])
    set_threads(spec.compute.threads or max(1, cores // local))
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # names that DeepSpeed still calls
    if not heard:
        from kivnun.pipeline import tune_together as run_spec

        return run_spec(spec, text, run, resume=resume)
    with open_screen() as screen, with_board(screen, run, tensorboard) as listener:
        from kivnun.pipeline import tune_together as run_spec

        return run_spec(spec, text, run, resume=resume, listener=listener, on_progress=screen.scoring)
