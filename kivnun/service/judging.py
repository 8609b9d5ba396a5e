"""Files judged line by line as soon as they are there: a job never learns late what its upload could have told.

A small file is judged before its upload is answered, a larger one by the duty `JudgeFiles`; both by `judge`, which reads it as the
trainer does and holds one row at a time. Every problem is counted, the first of them are told by line; messages name places and
keys, never what a line says. Next: `problem_codes.py`, `kivnun/data/formats.py`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kivnun.artifacts import storage_errors
from kivnun.data.formats import stream_records
from kivnun.data.jsonl import LineProblem, as_object, read_objects, type_name
from kivnun.data.rows import ChatRecord, PreferenceRecord, PromptRecord, Record, TextRecord
from kivnun.errors import DataError, RowProblem, StorageError
from kivnun.jobs import files, leases
from kivnun.jobs.errors import DatabaseDown, StaleLease, StoreDown
from kivnun.jobs.files import File, FileStatus
from kivnun.service.context import Service
from kivnun.service.problem_codes import code_of
from kivnun.service.turns import OF_EACH, Turns

logger = logging.getLogger(__name__)

FORMATS = ("messages", "prompt_completion", "preference")
OFFERED = (
    '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"input": {"messages": [...]}, "preferred_output": [...], '
    '"non_preferred_output": [...]}'
)
BATCH_URLS = ("/v1/chat/completions", "/v1/completions", "/chat/completions", "/completions")
MAX_SHOWN = 100
MAX_COMPARED = 1 << 20  # rows that are compared with each other
MAX_REQUESTS = 50_000  # of a batch
FEW_EXAMPLES = 10
AT_ONCE_BYTES = 1 << 20
AT_ONCE_ROWS = 20_000
LARGE_BYTES = 64 << 20
TRIES = 5  # a clerk that is told to end in the middle counts as one

Tick = Callable[[], None]
"""Called at every row, so that who judges can show that he lives."""


@dataclass(slots=True)
class Findings:
    """What is found in a file while it is read."""

    format: str = "unknown"
    rows: int = 0
    bad_rows: int = 0
    problems: int = 0
    shown: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    warnings: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    _last_bad: int = -1

    def complain(self, line: int, message: str, code: str | None = None) -> None:
        self.problems += 1
        if line != self._last_bad:
            self.bad_rows += 1
            self._last_bad = line
        if len(self.shown) < MAX_SHOWN:
            self.shown.append({"line": line, "code": code or code_of(message), "message": message})

    def warn(self, line: int, message: str, code: str) -> None:
        self.warnings.append({"line": line, "code": code, "message": message})

    @property
    def status(self) -> FileStatus:
        return "error" if self.problems else "processed"

    @property
    def details(self) -> str | None:
        """Return the sentence that the file's object carries."""
        if not self.problems:
            return None
        first = self.shown[0]
        place = f"line {first['line']}: " if first["line"] else ""
        count = "1 problem: " if self.problems == 1 else f"{self.problems:,} problems; the first: "
        return f"{count}{place}{first['message']}"

    @property
    def facts(self) -> dict[str, Any]:
        return {"format": self.format, "rows": self.rows, "problems": self.problems, "warnings": self.warnings}

    def report(self, file_id: str) -> bytes:
        """Return the report as JSON."""
        body = {"file": file_id, "status": self.status, "bad_rows": self.bad_rows, **self.facts, "problems_total": self.problems}
        return json.dumps({**body, "problems": self.shown}, ensure_ascii=False).encode()


def _no_tick() -> None:
    return


def judge(path: Path, purpose: str, tick: Tick = _no_tick, max_rows: int | None = None) -> Findings | None:
    """Return what is found in a file of a judged purpose; None where it has more than `max_rows` rows.

    `path` ends in .jsonl: whatever an uploaded file is called, its lines are read as JSON."""
    findings = Findings()
    rows = _batch_rows(path, findings) if purpose == "batch" else _training_rows(path, findings)
    try:
        for _ in rows:
            tick()
            if max_rows is not None and findings.rows > max_rows:
                return None
    except DataError as error:
        findings.complain(0, error.message.replace(f"data file {path}", "the file").replace(str(path), "the file"))
    return findings


def _training_rows(path: Path, findings: Findings) -> Iterator[None]:
    """Read a fine-tune file; yield after each item."""
    stream = stream_records(path)
    repeats = _Repeats()
    last = -1
    for item in stream:
        line = item.line if isinstance(item, RowProblem) else item.where.line
        findings.rows += line != last
        last = line
        findings.format = stream.format
        if stream.format not in (*FORMATS, "unknown"):
            findings.complain(line, f"the format {stream.format} is not trained here; a line is {OFFERED}")
            return
        if isinstance(item, RowProblem):
            findings.complain(item.line, item.message)
        else:
            repeats.add(item)
        yield
    repeats.warn(findings)
    if findings.rows < FEW_EXAMPLES:
        findings.warn(0, f"{findings.rows} examples; a training file needs {FEW_EXAMPLES} at least", "few_examples")


def _batch_rows(path: Path, findings: Findings) -> Iterator[None]:
    """Read a file of requests; yield after each line."""
    findings.format = "batch"
    seen: set[bytes] = set()
    for line, row in read_objects(path):
        findings.rows += 1
        if findings.rows > MAX_REQUESTS:
            findings.complain(line, f"a batch has {MAX_REQUESTS:,} requests at most", "too_many_requests")
            return
        if isinstance(row, LineProblem):
            findings.complain(line, str(row))
        else:
            _check_request(row, line, seen, findings)
        yield
    if not findings.rows:
        findings.complain(0, "the file holds no rows")


def _check_request(row: dict[str, Any], line: int, seen: set[bytes], findings: Findings) -> None:
    name = row.get("custom_id")
    if not isinstance(name, str) or not name:
        findings.complain(line, "custom_id must be a string that is not empty", "invalid_request")
    else:
        mark = hashlib.blake2b(name.encode(), digest_size=16).digest()
        if mark in seen:
            findings.complain(line, "the custom_id is that of an earlier line", "duplicate_custom_id")
        seen.add(mark)
    if row.get("method") != "POST":
        findings.complain(line, "method must be 'POST'", "invalid_method")
    if row.get("url") not in BATCH_URLS:
        findings.complain(line, f"url must be one of {', '.join(BATCH_URLS)}", "invalid_url")
    body = as_object(row.get("body"))
    if body is None:
        findings.complain(line, f"body must be an object, got {type_name(row.get('body'))}", "invalid_request")
    elif not isinstance(body.get("model"), str):
        findings.complain(line, "body.model must be a string", "invalid_request")
    unknown = [key for key in row if key not in ("custom_id", "method", "url", "body")]
    if unknown:
        findings.complain(line, f"keys that would have no effect: {', '.join(repr(key[:40]) for key in unknown[:6])}")


class _Repeats:
    """Finds rows that say the same, by 8 bytes of a hash each: memory has a bound whatever the file's size."""

    def __init__(self) -> None:
        self._hashes = array("Q")
        self._lines = array("Q")

    def add(self, record: Record) -> None:
        if len(self._hashes) < MAX_COMPARED:
            said = repr(_said(record)).encode("utf-8", "replace")
            self._hashes.append(int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "big"))
            self._lines.append(record.where.line)

    def warn(self, findings: Findings) -> None:
        if not self._hashes:
            return
        hashes = np.frombuffer(self._hashes, dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        again = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
        if len(again):
            first = int(np.frombuffer(self._lines, dtype=np.uint64)[again].min())
            among = f" of the first {MAX_COMPARED:,}" if len(self._hashes) == MAX_COMPARED else ""
            findings.warn(first, f"{len(again):,} rows{among} repeat an earlier one; the first is line {first}", "duplicate_rows")


def _said(record: Record) -> tuple[object, ...]:
    """Return what a row says, without where it stands."""
    match record:
        case ChatRecord():
            return record.messages, record.tools
        case PreferenceRecord():
            prompt = record.prompt if isinstance(record.prompt, str) else _said(record.prompt)
            return prompt, record.chosen, record.rejected
        case PromptRecord():
            return record.prompt, record.completion
        case TextRecord():
            return (record.text,)


# --- larger files ----------------------------------------------------------------------------------------------------------------


class JudgeFiles:
    """The duty that judges files whose upload was answered before: all, or in two lanes, as large ones take minutes.

    Each is judged under a lease of its own, a few times at most: one that ends every judge is marked as an error, so that no
    client waits for it for ever."""

    name = "judge_files"

    def __init__(
        self, service: Service, clock: Callable[[], float] = time.monotonic, lane: Literal["all", "small", "large"] = "all"
    ) -> None:
        self._service = service
        self._bounds = {"all": (0, None), "small": (0, LARGE_BYTES), "large": (LARGE_BYTES, None)}[lane]
        self._turns = Turns(clock)
        self._clock = clock
        self._watcher = leases.Watcher(clock)
        self._owner = service.new_id("judge-")

    def turn(self) -> bool:
        """Judge the file whose turn it is; return whether there was one."""
        waiting = self._service.db.read(lambda tx: files.unjudged(tx, OF_EACH, *self._bounds))
        self._watcher.forget_all_but(map(_lease_name, waiting))
        for file in self._turns.in_turn(waiting):
            lease = self._claimed(file)
            if lease is not None:
                with self._turns.serving(file):
                    self._judge(file, lease)
                return True
        return False

    def _claimed(self, file: File) -> leases.Lease | None:
        """Take the lease of a file that nobody else judges, and count the try."""
        name = _lease_name(file)
        seen = self._service.db.read(lambda tx: leases.look(tx, [name])).get(name)
        if seen is not None and not self._watcher.is_dead(seen):
            return None
        self._watcher.forget(name)

        def claim(tx: files.Transaction) -> leases.Lease | None:
            lease = leases.claim(tx, name, self._owner, seen)
            if lease is not None:
                files.mark(tx, file.id, file.tenant, "uploaded", facts=_tries(_tries_of(file) + 1))
            return lease

        return self._service.db.write("claim file", claim)

    def _judge(self, file: File, lease: leases.Lease) -> None:
        findings = _given_up() if _tries_of(file) >= TRIES else self._read(file, lease)
        report = self._service.blobs.put_bytes(file.tenant, findings.report(file.id))

        def record(tx: files.Transaction) -> None:
            leases.check(tx, lease)
            files.mark(tx, file.id, file.tenant, findings.status, findings.details, findings.facts, report)
            leases.release(tx, lease)

        self._service.db.write("judge file", record)

    def _read(self, file: File, lease: leases.Lease) -> Findings:
        try:
            return self._findings(file, lease)
        except StaleLease:
            raise
        except (DatabaseDown, StoreDown, StorageError, FileNotFoundError):
            # Not the file's fault: the try does not count.
            self._give_back(file, lease)
            raise
        except Exception as error:  # whatever it is, the file's status must end
            logger.error("a file cannot be judged: %s", type(error).__name__, extra={"action": "judging_failed", "file": file.id})
            return _given_up()

    def _give_back(self, file: File, lease: leases.Lease) -> None:
        def give(tx: files.Transaction) -> None:
            leases.release(tx, lease)
            files.mark(tx, file.id, file.tenant, "uploaded", facts=_tries(_tries_of(file)))

        self._service.db.write("release file", give)

    def _findings(self, file: File, lease: leases.Lease) -> Findings:
        next_beat = self._clock()

        def tick() -> None:
            nonlocal next_beat
            if self._clock() >= next_beat:
                self._service.db.write("beat", lambda tx: leases.beat(tx, lease))
                next_beat = self._clock() + leases.BEAT_S

        scratch = self._service.scratch
        scratch.mkdir(parents=True, exist_ok=True)
        with storage_errors(scratch), tempfile.TemporaryDirectory(dir=scratch, prefix="judged-") as folder:
            path = Path(folder) / "file.jsonl"
            with path.open("xb") as out:
                for piece in self._service.blobs.read(file.blob):
                    out.write(piece)
                    tick()
            found = judge(path, file.purpose, tick)
            assert found is not None, "without a bound on rows there is a verdict"
            if not path.is_file():  # a service that starts clears the scratch folder
                raise FileNotFoundError(errno.ENOENT, "the scratch folder was removed", str(scratch))
            return found


def _lease_name(file: File) -> str:
    return f"file:{file.id}"


def _tries(number: int) -> dict[str, Any]:
    return {"tries": number}


def _tries_of(file: File) -> int:
    return int((file.facts or {}).get("tries", 0))


def _given_up() -> Findings:
    findings = Findings()
    findings.complain(0, "the file could not be judged; upload it again, or in smaller files", "judging_failed")
    return findings
