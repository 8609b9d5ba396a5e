"""Keeps the processes of one machine's service: starts them, starts those again that ended, and ends them all together.

Each part is a process of its own, so that none takes another with it. Where this process is killed, however suddenly, the kernel
kills its parts; whatever they were doing stands in the database and is gone on with. One thread starts them all, and lives as long
as the process: a part's death is bound to the thread that started it. Next: `run.py` (the API's own process), `../cli/worker.py`
(what each part runs).
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

POLL_S = 0.1
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
STEADY_S = 60.0  # a part that lived so long is started again at once
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Part:
    """A process that is kept. `ends_last`: others need it to finish what they are at. `cores`: those that it may use, with what it
    starts (none: all)."""

    name: str
    words: Sequence[str]
    ends_last: bool = False
    passed: tuple[int, ...] = ()  # descriptors it gets
    cores: frozenset[int] = frozenset()


class Looking:
    """The parts that were wanted at the last look. Looks are made in a thread of their own: one that hangs or fails leaves what was
    found before, and the supervisor free."""

    def __init__(self, look: Callable[[], Sequence[Part]], every_s: float) -> None:
        self._look, self._every_s = look, every_s
        self._found: Sequence[Part] = ()
        self._try()
        threading.Thread(target=self._go_on, name="kivnun-looking", daemon=True).start()

    def __call__(self) -> Sequence[Part]:
        return self._found

    def _go_on(self) -> None:
        while True:
            time.sleep(self._every_s)
            self._try()

    def _try(self) -> None:
        try:
            self._found = self._look()
        except Exception as error:
            logger.warning("it cannot be asked what is wanted: %s", type(error).__name__, extra={"action": "wanted"})


@dataclass(slots=True)
class _Kept:
    part: Part
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    wait_s: float = 0.0
    due_at: float = 0.0
    told_at: float | None = None  # when it was asked to end, because it is no longer wanted


@dataclass
class Supervisor:
    """Keeps `parts`, and beside them whatever `wanted` names at the moment. `clock` gives seconds and never goes back."""

    parts: Sequence[Part]
    wanted: Callable[[], Sequence[Part]]
    clock: Callable[[], float]
    environment: Mapping[str, str]
    drain_s: float
    program: Sequence[str] = (sys.executable, "-m", "kivnun")
    _kept: dict[str, _Kept] = field(default_factory=dict[str, _Kept])

    def start(self) -> None:
        """Start every part."""
        for part in self.parts:
            self._kept[part.name] = _Kept(part)
        self._start_due()

    def ended(self, name: str) -> int | None:
        """Return the exit status of a part that has ended for now; None while it runs."""
        process = self._kept[name].process
        return None if process is None else process.poll()

    def keep(self, stop: threading.Event) -> None:
        """Keep the parts until `stop` is set."""
        while not stop.wait(POLL_S):
            self._adopt(self.wanted())
            self._start_due()

    def drain(self, at_once: threading.Event) -> None:
        """End every part: ask them, those that others need after the others, and kill what has not ended in `drain_s`.

        `at_once` cuts that short."""
        deadline = self.clock() + self.drain_s
        for last in (False, True):
            ending = [kept for kept in self._kept.values() if kept.part.ends_last == last and _lives(kept)]
            for kept in ending:
                _tell(kept, signal.SIGTERM)
            while any(_lives(kept) for kept in ending) and self.clock() < deadline and not at_once.wait(POLL_S / 2):
                pass
        self.kill()

    def kill(self) -> None:
        """End every part at once."""
        left = [kept for kept in self._kept.values() if _lives(kept)]
        for kept in left:
            logger.warning("a part is killed: it has not ended in time", extra={"action": "part_killed", "worker": kept.part.name})
            _tell(kept, signal.SIGKILL)
        for kept in left:
            assert kept.process is not None
            kept.process.wait()

    def _adopt(self, wanted: Sequence[Part]) -> None:
        """Let those parts go that are no longer wanted, and take in those that are, once the others have gone: they may need their
        memory."""
        names = {part.name for part in (*self.parts, *wanted)}
        for name in [name for name in self._kept if name not in names]:
            if _lives(self._kept[name]):
                self._let_go(self._kept[name])
            else:
                del self._kept[name]
        if self._kept.keys() <= names:
            for part in wanted:
                self._kept.setdefault(part.name, _Kept(part))

    def _let_go(self, kept: _Kept) -> None:
        """Ask a part to end, once: a second time would end it at once. One that does not heed is killed."""
        if kept.told_at is None:
            kept.told_at = self.clock()
            _tell(kept, signal.SIGTERM)
        elif self.clock() - kept.told_at > self.drain_s:
            _tell(kept, signal.SIGKILL)

    def _start_due(self) -> None:
        for kept in self._kept.values():
            if _lives(kept):
                continue
            now = self.clock()
            if kept.process is not None:
                self._note_end(kept, now)
            if now >= kept.due_at:
                kept.process, kept.started_at, kept.told_at = self._spawn(kept.part), now, None

    def _note_end(self, kept: _Kept, now: float) -> None:
        """Say that a part has ended, and when it is started again: later each time, unless it had lived long."""
        assert kept.process is not None
        steady = now - kept.started_at >= STEADY_S
        kept.wait_s = FIRST_WAIT_S if steady or not kept.wait_s else min(2 * kept.wait_s, LONGEST_WAIT_S)
        kept.due_at = now + kept.wait_s
        told = {
            "action": "part_ended",
            "worker": kept.part.name,
            "status": kept.process.returncode,
            "ms": round(1000 * kept.wait_s),
        }
        logger.error("a part has ended, and is started again after `ms`", extra=told)
        kept.process = None

    def _spawn(self, part: Part) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*self.program, *part.words],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,  # stdout is for what the command itself prints
            env=self.environment,
            pass_fds=part.passed,
            start_new_session=True,  # Ctrl-C in a terminal is for this process alone, which then asks the parts in their order
            preexec_fn=_bound_to(os.getpid(), part.cores),
        )


def shares(cores: Sequence[int], workers: int) -> list[frozenset[int]]:
    """Return the cores of each of so many workers that compute at the same time (one has all of them, said by none).

    As many for each, since bits depend on how many there are; and each core one worker's, while there are enough, since threads
    of a job that wait for one another stand still where another job's run."""
    each = max(1, len(cores) // max(1, workers))
    places = range(each if workers > 1 else 0)
    return [frozenset(cores[(at * each + place) % len(cores)] for place in places) for at in range(workers)]


def _bound_to(parent: int, cores: frozenset[int]) -> Callable[[], None]:
    """Return what a child does first, so that it does not outlive its parent and keeps to its cores."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def bind() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died in between
            os._exit(1)
        if cores:
            os.sched_setaffinity(0, cores)

    return bind


def _lives(kept: _Kept) -> bool:
    return kept.process is not None and kept.process.poll() is None


def _tell(kept: _Kept, number: signal.Signals) -> None:
    assert kept.process is not None
    kept.process.send_signal(number)
