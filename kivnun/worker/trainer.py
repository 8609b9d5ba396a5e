"""Trainers: child processes that train one job each, forked from a process that has the libraries loaded already.

    worker ── origin (imports torch once, computes nothing) ── trainer of job A
                                                            └─ trainer of job B

The origin has one thread and forks, so a trainer starts in milliseconds with the numbers of a process of its own. Whoever is killed
takes those below along (PR_SET_PDEATHSIG): no trainer outlives its worker. Of its worker's secrets it gets none but the hub's token
(`environment_of_trainers`). A trainer writes only into its work folder; how it ended is its exit status, which no disk has to have
room for, and why a run failed is in `outcome.json` there. Next: `tune_jobs.py` (who starts them), `real.py`, `toy.py` (what they
run).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from kivnun.artifacts import atomic_write, storage_errors
from kivnun.errors import InterruptedRun, KivnunError, StorageError

Kind = Literal["toy", "pipeline"]
OUTCOME, LOG = "outcome.json", "trainer.log"
_PR_SET_PDEATHSIG = 1
# glibc reads these when a process begins: freed memory is reused (cli/process.py says why and by how much).
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
# What a trainer may know of its worker's environment: what Python, the libraries that compute and the hub's client read. All else
# stays behind, whatever its name: the addresses and passwords of the database and the store, keys, tokens.
_KEPT = frozenset(
    {
        "ALL_PROXY", "CC", "CONDA_PREFIX", "CURL_CA_BUNDLE", "HOME", "HTTPS_PROXY", "HTTP_PROXY", "HUGGING_FACE_HUB_TOKEN",
        "KIVNUN_TRACEBACK", "LANG", "LANGUAGE", "LOGNAME", "NO_PROXY", "NVIDIA_TF32_OVERRIDE", "NVIDIA_VISIBLE_DEVICES", "PATH",
        "REQUESTS_CA_BUNDLE", "TEMP", "TMP", "TMPDIR", "TZ", "USER", "VIRTUAL_ENV",
    }
)  # fmt: skip
_KEPT_BEGINNINGS = (
    "ATEN_", "CUBLAS_", "CUDA_", "CUDNN_", "DNNL_", "DS_ACCELERATOR", "GOMP_", "HF_", "KMP_", "LC_", "LD_", "MALLOC_", "MKL_",
    "NCCL_", "OMP_", "ONEDNN_", "OPENBLAS_", "PYTHON", "PYTORCH_", "SSL_CERT_", "TOKENIZERS_", "TORCH", "TRITON_", "XDG_",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trainer ended. `crashed`: it was killed, or ended by an error that is a fault of the program. `lost`: it was never
    started, or ended together with the process that it came from, which says nothing of its job."""

    status: Literal["succeeded", "interrupted", "failed", "crashed", "lost"]
    code: str = ""
    message: str = ""


@dataclass
class Trainer:
    """A trainer as its worker sees it."""

    folder: Path
    _signal: Callable[[int], None]
    ended: threading.Event = field(default_factory=threading.Event)
    status: int | None = None  # once it has ended: its exit status, less than 0 for the signal that ended it; None: nobody knows

    def end(self, status: int | None) -> None:
        """Let those who wait for its end know it, and with which status."""
        self.status = status
        self.ended.set()

    def ask_to_stop(self) -> None:
        """Have the step in progress finished and saved. A trainer that is still loading ends at once."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once, and wait until it is gone."""
        self._signal(signal.SIGKILL)
        self.ended.wait(10)

    def where_it_ended(self) -> str:
        """Return where in the program a trainer was that ended by an error, without what the error says: that may be a tenant's."""
        try:
            lines = (self.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return "nowhere"
        places = [line.strip() for line in lines if line.startswith('  File "')]
        kinds = [line.partition(":")[0] for line in lines if line[:1].isalpha() and "Traceback" not in line]
        return f"{kinds[-1]} at {places[-1]}" if places and kinds else "nowhere: it was killed"

    @property
    def was_killed(self) -> bool:
        return self.status is not None and self.status < 0

    def outcome(self) -> Outcome:
        """Return how it ended, once it has."""
        if self.status is None:
            return Outcome("lost")
        if self.status == 0:
            return Outcome("succeeded")
        if self.status == InterruptedRun.exit_status:
            return Outcome("interrupted")
        if self.status == StorageError.exit_status:
            return Outcome("failed", StorageError.code, "the disk of its work folder cannot be written to")
        if self.status > 0:
            with contextlib.suppress(OSError, ValueError):
                return Outcome("failed", **json.loads((self.folder / OUTCOME).read_bytes()))
        return Outcome("crashed")


def environment_of_trainers(of_worker: Mapping[str, str]) -> dict[str, str]:
    """Return the part of a worker's environment that its trainers get; names of proxies are taken in either case."""
    return {name: value for name, value in of_worker.items() if name.upper() in _KEPT or name.startswith(_KEPT_BEGINNINGS)}


class Trainers:
    """Starts trainers. The thread that makes this must live as long as they are to: Linux ties their lives to that thread."""

    def __init__(self, *, loads_torch: bool) -> None:
        self._loads_torch = loads_torch
        self._write = threading.Lock()
        self._living: dict[int, Trainer] = {}
        self._count = 0
        self._open()

    def _open(self) -> None:
        ours, its = socket.socketpair()
        environment = environment_of_trainers(os.environ)
        if self._loads_torch and "LD_PRELOAD" not in environment:
            environment = {**_ALLOCATOR, **environment}
        words = ["-m", "kivnun.worker.trainer", str(its.fileno()), str(os.getpid()), "torch" if self._loads_torch else "light"]
        try:
            # A session of its own: an interrupt typed at a terminal is the worker's to heed.
            self._origin = subprocess.Popen(
                [sys.executable, *words], pass_fds=[its.fileno()], env=environment, start_new_session=True, stdin=subprocess.DEVNULL
            )
        except BaseException:
            ours.close()
            raise
        finally:
            its.close()
        self._channel = ours
        self._listener = threading.Thread(target=self._listen, args=(ours,), name="kivnun-trainers", daemon=True)
        self._listener.start()

    def start(self, kind: Kind, folder: Path) -> Trainer:
        """Start a trainer in a work folder that holds its spec and data."""
        (folder / OUTCOME).unlink(missing_ok=True)
        with self._write:
            self._count += 1
            number = self._count
            trainer = Trainer(folder, lambda which: self._send({"signal": which, "number": number}))
            self._living[number] = trainer
        self._send({"start": kind, "number": number, "folder": str(folder)})
        return trainer

    def mend(self) -> None:
        """Start the origin anew where it was lost (its trainers are lost with it). Called by the thread that made this."""
        if self._origin.poll() is not None:
            self._listener.join()
            self._channel.close()
            self._open()

    def close(self) -> None:
        """End every trainer and the origin."""
        self._origin.kill()
        self._origin.wait()
        self._channel.close()

    def _send(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        with self._write:
            try:
                self._channel.sendall(line)
            except OSError:  # the origin is gone, and so is the trainer
                gone = self._living.pop(message["number"], None)
                if gone is not None:
                    gone.end(None)

    def _listen(self, channel: socket.socket) -> None:
        with contextlib.suppress(OSError), channel.makefile("rb") as lines:
            for line in lines:
                told = json.loads(line)
                with self._write:
                    trainer = self._living.pop(told["number"], None)
                if trainer is not None:
                    trainer.end(told["status"])
        with self._write:
            lost = list(self._living.values())
            self._living.clear()
        for trainer in lost:
            trainer.end(None)


# --- the origin --------------------------------------------------------------------------------------------------------------


def die_with_parent(parent: int) -> None:
    """Have the system kill this process when its parent ends; end now if that has happened already."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def serve(channel: socket.socket, parent: int, loads_torch: bool) -> None:
    """Fork trainers as they are asked for, until the worker is gone."""
    die_with_parent(parent)
    if loads_torch:
        import kivnun.worker.real
    import kivnun.worker.toy  # noqa: F401

    gc.collect()
    gc.freeze()  # what is loaded is not looked at again, so trainers share its memory
    woken, waker = os.pipe()
    for end in (woken, waker):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    numbers: dict[int, int] = {}  # pid -> the worker's number
    held = b""
    while True:
        ready, _, _ = select.select([channel, woken], [], [])
        if channel in ready:
            received = channel.recv(65536)
            if not received:
                return
            *lines, held = (held + received).split(b"\n")
            for line in lines:
                _obey(json.loads(line), numbers, [channel.fileno(), woken, waker])
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(woken, 512)
        for number, status in _ended(numbers):
            channel.sendall(json.dumps({"number": number, "status": status}).encode() + b"\n")


def _obey(message: dict[str, Any], numbers: dict[int, int], open_files: list[int]) -> None:
    if "signal" in message:
        for pid, number in numbers.items():  # not waited for yet: its number is nobody else's
            if number == message["number"]:
                os.kill(pid, message["signal"])
        return
    origin = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become(message["start"], Path(message["folder"]), origin, open_files)
    numbers[pid] = message["number"]


def _ended(numbers: dict[int, int]) -> list[tuple[int, int]]:
    """Return the numbers of the trainers that have ended since, and their exit statuses."""
    found: list[tuple[int, int]] = []
    while numbers:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            break
        found.append((numbers.pop(pid), os.waitstatus_to_exitcode(status)))
    return found


# --- a trainer ---------------------------------------------------------------------------------------------------------------


def _become(kind: Kind, folder: Path, origin: int, open_files: list[int]) -> NoReturn:
    """Turn this fork into a trainer, run it, and end the process."""
    status = 1
    try:
        die_with_parent(origin)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in open_files:
            os.close(number)
        os.chdir(folder)
        status = _ran(kind, folder)
    except BaseException:
        with contextlib.suppress(Exception):  # its log may be on a disk that is full
            traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)


def _ran(kind: Kind, folder: Path) -> int:
    """Train in this folder, where the process is by now; return the exit status that says how it ended."""
    try:
        with storage_errors(folder):
            log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            for stream in (1, 2):
                os.dup2(log, stream)
            with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:
                score.write("1000")  # where memory runs out, the trainer goes and its worker stays to tell of it
            _run(kind)
    except InterruptedRun as error:
        return error.exit_status
    except KivnunError as error:
        with contextlib.suppress(OSError):
            print(error, file=sys.stderr)
        try:
            atomic_write(Path(OUTCOME), json.dumps({"code": error.code, "message": error.message}))
        except StorageError as full:
            return full.exit_status  # run again where there is room, it comes to the same end
        return error.exit_status
    return 0


def _run(kind: Kind) -> None:
    """Train in this folder. Raises KivnunError subclasses."""
    text = Path("spec.yaml").read_text(encoding="utf-8")
    if kind == "toy":
        from kivnun.worker.toy import tune_toy

        tune_toy(text)
    else:
        from kivnun.worker.real import tune_real

        tune_real(text)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), sys.argv[3] == "torch")
