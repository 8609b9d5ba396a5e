"""Jobs done by as many processes as there are cores, in an order that does not matter. Next: `jobs.py`."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

from kivnun.matrix.jobs import Job, do, result_path

OnDone = Callable[[str], None]


def do_all(folder: Path, jobs: Sequence[Job], on_done: OnDone, processes: int | None = None) -> None:
    """Do the jobs that are not done yet; `on_done` hears the name of each, those done before first.

    An error of one job ends all: what is done stays, and is not done again.
    """
    left = []
    for job in jobs:
        if result_path(folder, job).is_file():
            on_done(job.name)
        else:
            left.append(job)
    if not left:
        return
    count = min(processes or len(os.sched_getaffinity(0)), len(left))
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_one_thread) as pool:
        waiting = {pool.submit(do, folder, job): job for job in left}
        try:
            while waiting:
                finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                    on_done(waiting.pop(future).name)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
