"""The processes that work on one run: who this one is, and the few things they tell each other outside of training.

A run in one process and a run in many go through the same code: each asks its `Processes`. The first process alone writes; whatever
decides what is done next is decided together. Next: `deepspeed_engine.py` (what they share), `pipeline.py` (who asks).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from kivnun.errors import KivnunError, ProcessLostError, SpecError

Value = TypeVar("Value")

# How long a process waits for the others: longer than the longest step and the slowest disk, and not for ever.
TIMEOUT = timedelta(minutes=30)


class Processes(Protocol):
    """The processes of a run, as one of them sees them. Every call but `rank` and `count` is made by all, in the same order."""

    rank: int
    count: int

    def total(self, value: float) -> float:
        """Return the sum over processes, in float64, the same to the bit in each."""
        ...

    def any(self, flag: bool) -> bool:
        """Return whether any process says so."""
        ...

    def from_first(self, make: Callable[[], Value]) -> Value:
        """Return what the first process makes; where it fails, each raises what it raised."""
        ...

    def all_of(self, value: Value) -> list[Value]:
        """Return every process's value, in the order of ranks."""
        ...


class OneProcess:
    """A run that this process works on alone."""

    rank, count = 0, 1

    def total(self, value: float) -> float:
        return value

    def any(self, flag: bool) -> bool:
        return flag

    def from_first(self, make: Callable[[], Value]) -> Value:
        return make()

    def all_of(self, value: Value) -> list[Value]:
        return [value]


class ProcessGroup:
    """The processes that torchrun started, over gloo (CPU) or NCCL (GPUs)."""

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        # Words between processes go over gloo in any case: they are on the CPU.
        self._words: Any = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=TIMEOUT)

    def total(self, value: float) -> float:
        values = [torch.zeros(1, dtype=torch.float64) for _ in range(self.count)]
        with lost_processes():
            dist.all_gather(values, torch.tensor([value], dtype=torch.float64), group=self._words)
        return float(sum(float(its) for its in values))

    def any(self, flag: bool) -> bool:
        return self.total(float(flag)) > 0

    def from_first(self, make: Callable[[], Value]) -> Value:
        told: list[Any] = [None]
        if self.rank == 0:
            try:
                told = [(make(), None)]
            except KivnunError as error:
                told = [(None, error)]
        with lost_processes():
            dist.broadcast_object_list(told, src=0, group=self._words)
        made, error = told[0]
        if error is not None:
            raise error
        return made

    def all_of(self, value: Value) -> list[Value]:
        values: list[Any] = [None] * self.count
        with lost_processes():
            dist.all_gather_object(values, value, group=self._words)
        return values


@contextmanager
def joined(device: str, count: int) -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started, for as long as the context lasts; yield them.

    Raises SpecError where there are not `count` of them."""
    found = int(os.environ["WORLD_SIZE"])
    if found != count:
        raise SpecError(
            f"compute.processes is {count}, but torchrun started {found}",
            hint="make --nnodes times --nproc-per-node equal to compute.processes",
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with lost_processes():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield ProcessGroup()
    finally:
        dist.destroy_process_group()


@contextmanager
def lost_processes() -> Iterator[None]:
    """Turn what the communication library says of a lost peer into an error of ours; let failures of this process pass."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(name in text.lower() for name in ("gloo", "nccl")):
            raise
        raise ProcessLostError(
            f"another process of the run is gone: {(text.strip().splitlines() or [type(error).__name__])[0]}",
            hint="go on from the last checkpoint with --resume",
        ) from error


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Let the first SIGINT or SIGTERM ask for a stop after the step in progress; a second SIGINT ends at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def ask(number: int, _frame: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tokens_apart(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Return the places of `lengths`, dealt to `count` processes so that each gets about as many tokens; each keeps their order.

    The longest goes first, each to whoever has least so far (Graham 1969): no process gets more than 4/3 of the best split's most.
    """
    loads, hands = [0] * count, [[] for _ in range(count)]
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        least = min(range(count), key=lambda process: (loads[process], process))
        loads[least] += lengths[place]
        hands[least].append(place)
    return [sorted(hand) for hand in hands]
