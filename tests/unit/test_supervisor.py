"""The processes of a service: one that dies is started again, all end with the one that keeps them, none outlives it."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kivnun.jobs.wanted import Wishes
from kivnun.service.supervisor import Looking, Part, Supervisor, shares

# Appends its process id to a file and ends at SIGTERM; `stubborn` does not, `slow` takes its time, `brief` ends by itself.
PROGRAM = """
import os, signal, sys, time
name, folder = sys.argv[1:]
def end(*_):
    if name == "slow":
        open(f"{folder}/told", "a").write("once\\n")
        time.sleep(0.5)
    open(f"{folder}/ended", "a").write(name + "\\n")
    os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if name == "stubborn" else end)
open(f"{folder}/{name}", "a").write(f"{os.getpid()}\\n")
time.sleep(0 if name == "brief" else 60)
"""


@pytest.fixture
def stop() -> threading.Event:
    return threading.Event()


def supervisor(folder: Path, *names: str, wanted: Callable[[], Sequence[Part]] = list, drain_s: float = 20.0) -> Supervisor:
    parts = [part(name, folder) for name in names]
    return Supervisor(parts, wanted, time.monotonic, os.environ, drain_s, (sys.executable, "-c", PROGRAM))


def part(name: str, folder: Path) -> Part:
    return Part(name, [name, str(folder)], ends_last=name == "last")


def starts(folder: Path, name: str, at_least: int = 1) -> list[int]:
    """Wait for so many starts of a part; return the process ids."""
    until = time.monotonic() + 30
    while True:
        path = folder / name
        found = [int(line) for line in path.read_text().splitlines()] if path.exists() else []
        if len(found) >= at_least:
            return found
        assert time.monotonic() < until, f"{name} was started {len(found)} times"
        time.sleep(0.02)


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_part_that_is_killed_is_started_again_and_later_each_time(tmp_path: Path, stop: threading.Event) -> None:
    kept = supervisor(tmp_path, "one", "brief")
    kept.start()
    killer = in_thread(lambda: (os.kill(starts(tmp_path, "one")[0], signal.SIGKILL), starts(tmp_path, "one", 2), stop.set()))
    kept.keep(stop)
    killer.join()
    kept.drain(threading.Event())
    assert len(starts(tmp_path, "one")) == 2
    assert len(starts(tmp_path, "brief")) <= 3, "it ends at once, and is not started as fast as it ends"


def test_a_drain_asks_the_parts_that_others_need_after_the_others(tmp_path: Path) -> None:
    kept = supervisor(tmp_path, "last", "one", "two")
    kept.start()
    processes = [starts(tmp_path, name)[0] for name in ("last", "one", "two")]
    kept.drain(threading.Event())
    ended = (tmp_path / "ended").read_text().split()
    assert sorted(ended[:2]) == ["one", "two"]
    assert ended[2:] == ["last"]
    assert not any(map(lives, processes))


def test_a_part_that_does_not_end_is_killed_at_the_deadline_or_at_the_second_signal(tmp_path: Path) -> None:
    slow = supervisor(tmp_path, "stubborn", drain_s=0.3)
    slow.start()
    starts(tmp_path, "stubborn")
    slow.drain(threading.Event())
    patient = supervisor(tmp_path, "stubborn", drain_s=1000.0)
    patient.start()
    starts(tmp_path, "stubborn", 2)
    at_once = threading.Event()
    at_once.set()
    patient.drain(at_once)
    assert not any(map(lives, starts(tmp_path, "stubborn", 2)))


def test_what_is_wanted_is_started_and_let_go_when_it_no_longer_is(tmp_path: Path, stop: threading.Event) -> None:
    wanted = [part("extra", tmp_path)]
    kept = supervisor(tmp_path, "one", wanted=lambda: wanted)
    kept.start()

    def follow() -> None:
        process = starts(tmp_path, "extra")[0]
        wanted.clear()
        while lives(process):
            time.sleep(0.02)
        stop.set()

    follower = in_thread(follow)
    kept.keep(stop)
    follower.join()
    assert (tmp_path / "ended").read_text().split() == ["extra"]
    kept.drain(threading.Event())


def test_a_part_that_takes_anothers_place_starts_when_that_has_gone_which_is_asked_once(
    tmp_path: Path, stop: threading.Event
) -> None:
    wanted = [part("slow", tmp_path)]
    kept = supervisor(tmp_path, "one", wanted=lambda: wanted)
    kept.start()

    def follow() -> None:
        process = starts(tmp_path, "slow")[0]
        wanted[:] = [part("next", tmp_path)]
        starts(tmp_path, "next")
        assert not lives(process), "both would be in memory"
        stop.set()

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(follow)
        following.add_done_callback(lambda _: stop.set())
        kept.keep(stop)
        following.result()
    assert (tmp_path / "told").read_text().split() == ["once"], "what it answers may end: a second signal would cut it off"
    kept.drain(threading.Event())


def test_a_part_that_is_let_go_and_does_not_heed_is_killed_after_the_drain(tmp_path: Path, stop: threading.Event) -> None:
    wanted = [part("stubborn", tmp_path)]
    kept = supervisor(tmp_path, "one", wanted=lambda: wanted, drain_s=0.2)
    kept.start()

    def follow() -> None:
        process = starts(tmp_path, "stubborn")[0]
        wanted.clear()
        until = time.monotonic() + 20
        while lives(process) and time.monotonic() < until:
            time.sleep(0.02)
        stop.set()

    follower = in_thread(follow)
    kept.keep(stop)
    follower.join()
    assert not any(map(lives, starts(tmp_path, "stubborn")))
    kept.drain(threading.Event())


def test_parts_are_kept_while_nobody_says_what_is_wanted(tmp_path: Path, stop: threading.Event) -> None:
    hangs, looks = threading.Event(), itertools.count()

    def look() -> list[Part]:
        match next(looks):
            case 0:
                return [part("extra", tmp_path)]
            case 1:
                raise RuntimeError("refused")
            case _:
                hangs.set()
                threading.Event().wait()
                return []

    kept = supervisor(tmp_path, "one", wanted=Looking(look, every_s=0.01))
    kept.start()

    def kill() -> None:
        assert hangs.wait(10)
        for name in ("one", "extra"):
            os.kill(starts(tmp_path, name)[0], signal.SIGKILL)
            starts(tmp_path, name, 2)
        stop.set()

    killer = in_thread(kill)
    kept.keep(stop)
    killer.join()
    kept.drain(threading.Event())


def test_no_part_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, sys, threading, time\n"
        "from pathlib import Path\n"
        "from test_supervisor import supervisor\n"
        "kept = supervisor(Path(sys.argv[1]), 'stubborn', 'last')\n"
        "kept.start()\n"
        "kept.keep(threading.Event())\n"
    )
    where = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    keeper = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env={**os.environ, "PYTHONPATH": where})
    processes = [starts(tmp_path, name)[0] for name in ("stubborn", "last")]
    keeper.kill()
    keeper.wait()
    until = time.monotonic() + 10
    while any(map(lives, processes)):
        assert time.monotonic() < until, "a part lives on"
        time.sleep(0.02)


def test_a_base_is_wanted_while_its_count_rises() -> None:
    now = [0.0]
    wishes = Wishes(lambda: now[0], idle_s=10.0)
    assert wishes.look({"old": 7}) == {}, "whoever asked before the start asks again"
    assert wishes.look({"old": 7, "new": 1}) == {"new": 0.0}
    now[0] = 9.0
    assert wishes.look({"old": 8, "new": 1}) == {"old": 0.0, "new": 9.0}
    now[0] = 10.0
    assert wishes.look({"old": 8, "new": 1}) == {"old": 1.0}
    now[0] = 25.0
    assert wishes.look({"old": 8, "new": 1}) == {}


@pytest.mark.parametrize("cores", [1, 2, 3, 8, 96])
@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_workers_have_as_many_cores_each_and_share_none_while_there_are_enough(cores: int, workers: int) -> None:
    given = shares(range(cores), workers)
    assert len(given) == workers
    assert {len(share) for share in given} == ({0} if workers == 1 else {max(1, cores // workers)})
    assert len(frozenset().union(*given)) == sum(map(len, given)) or workers > cores


def test_a_part_and_what_it_starts_keep_to_its_cores(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    made = Supervisor(
        [Part("pinned", ["pinned", str(tmp_path)], cores=frozenset({core}))], lambda: [], time.monotonic, os.environ, 20.0,
        (sys.executable, "-c", PROGRAM),
    )  # fmt: skip
    made.start()
    (pid,) = starts(tmp_path, "pinned")
    assert os.sched_getaffinity(pid) == {core}
    made.kill()
