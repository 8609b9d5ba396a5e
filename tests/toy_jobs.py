"""Jobs of the toy trainer as the API would have made them, and workers to run them: in a thread, or in a process to be killed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import yaml

from kivnun.jobs import tuning
from kivnun.jobs.database import Database
from kivnun.jobs.effects import Watch, unwatched
from kivnun.jobs.files import File, add
from kivnun.jobs.ids import new_id
from kivnun.jobs.place import Place
from kivnun.jobs.schema import files, jobs, models, usage
from kivnun.jobs.snapshots import read_manifest
from kivnun.jobs.toy import ToySpec, planned_tokens, rows_of
from kivnun.jobs.tuning import Job, JobEvent
from kivnun.worker.trainer import Trainers
from kivnun.worker.tune_jobs import work
from service_parts import place

CONFIG = {"version": 1, "bases": {"toy": {"trainer": "toy", "price": {"training": 2.0}}}}
ROWS = [f'{{"messages": [{{"role": "user", "content": "{n}"}}, {{"role": "assistant", "content": "{n * n}"}}]}}' for n in range(12)]
SLOW = ToySpec(seed=3, epochs=3, batch_rows=2, step_ms=80.0, checkpoint_every_steps=2)
FAST: dict[str, Any] = {"look_s": 0.05, "beat_s": 0.2}


def toy_place(folder: Path, db_url: str | None = None) -> Place:
    """Return a place with a configuration that knows the toy base alone."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "service.yaml"
    config.write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    return place(folder, db_url, config)


def queue_job(
    place: Place,
    tenant: str = "default",
    spec: ToySpec | None = None,
    *,
    spec_text: str | None = None,
    held_out: bool = False,
    rows: int = 12,
    **columns: Any,
) -> str:
    """Make a job that is queued, with its file; return its id. `spec_text` is a spec that is no toy's."""
    spec = spec or ToySpec(seed=3, epochs=3, batch_rows=4)
    content = "\n".join(ROWS[n % len(ROWS)] for n in range(rows)).encode() + b"\n"
    db, blobs = place.database(), place.blobs()
    job_id, now = columns.pop("id", new_id("ftjob-")), time.time()
    names = {"training_file": new_id("file-"), **({"validation_file": new_id("file-")} if held_out else {})}
    blob = blobs.put_bytes(tenant, content)
    for name in names.values():
        file = File(name, tenant, now, "fine-tune", "rows.jsonl", len(content), blob, "processed")
        db.write("file", lambda tx, file=file: add(tx, file))
    job = Job(
        id=job_id, tenant=tenant, created_at=now, model="toy", base="toy", **names,
        method={"type": "supervised"}, seed=spec.seed, status="queued", queued_at=now, spec=spec.to_yaml(),
        total_steps=spec.steps_of(rows), planned_tokens=planned_tokens(spec, rows_of(content)),
    )  # fmt: skip
    if spec_text is not None:
        made: dict[str, Any] = yaml.safe_load(spec_text)
        columns |= {"spec": spec_text, "total_steps": made["schedule"]["epochs"] * -(-rows // made["schedule"]["batch_rows"])}
    job = replace(job, **columns)
    db.write("job", lambda tx: tuning.create(tx, job, new_id))
    db.close()
    return job_id


def work_here(place: Place, watch: Watch = unwatched, **given: Any) -> None:
    """Work in this thread until nothing is left to do."""
    work(place, threading.Event(), watch, **{**FAST, "until_idle": True, **given})


@contextmanager
def worker_thread(place: Place, **given: Any) -> Iterator[threading.Event]:
    """Work in a thread; give the event that stops it, and wait for its end."""
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(place, stop), kwargs={**FAST, **given})
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(90)
        assert not thread.is_alive()


@dataclass
class WorkerProcess:
    """A worker that can be killed."""

    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 90) -> int:
        return self.process.wait(timeout)


_WORKER = """
import signal, sys, threading
from pathlib import Path
from kivnun.jobs.place import Place
from kivnun.worker.tune_jobs import work
data, db_url, store_url, config, term_s, kill_at = sys.argv[1:]
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
count = 0
lock = threading.Lock()
def watch(point):
    global count
    with lock:
        count += 1
        if count == int(kill_at):
            print(point, flush=True)
            import os
            os.kill(os.getpid(), signal.SIGKILL)
work(Place(Path(data), db_url, store_url, Path(config)), stop, watch, term_s=float(term_s), look_s=0.05,
     beat_s=60.0 if int(kill_at) else 0.1, until_idle=int(kill_at) != 0)
print(count, flush=True)
"""


def worker_process(place: Place, *, term_s: float = 1.0, kill_at: int = 0, stdout: int | None = None) -> WorkerProcess:
    """Start a worker. With `kill_at`, it kills itself at that point of its durable effects, or ends when nothing is left to do."""
    words = [str(place.data), place.db_url, place.store_url, str(place.config), str(term_s), str(kill_at)]
    return WorkerProcess(subprocess.Popen([sys.executable, "-c", _WORKER, *words], stdout=stdout))


def until(condition: Callable[[], Any], timeout: float = 200.0) -> Any:
    """Wait for a condition; return what it gave."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.03)
    raise AssertionError("it did not come to be")


def job_of(db: Database, job_id: str) -> Job:
    job = db.read(lambda tx: tuning.find(tx, job_id))
    assert job is not None
    return job


def events_of(db: Database, job_id: str) -> list[JobEvent]:
    """Return a job's events, the oldest first."""
    return db.read(lambda tx: tuning.events_page(tx, job_id, 1 << 30)[0])[::-1]


def command(db: Database, job_id: str, kind: Any) -> Job | None:
    return db.write("command", lambda tx: tuning.command(tx, job_of_tx(tx, job_id), kind, time.time(), new_id))


def job_of_tx(tx: sa.Connection, job_id: str) -> Job:
    job = tuning.find(tx, job_id)
    assert job is not None
    return job


def adapter_bytes(place: Place, db: Database, job_id: str) -> dict[str, str]:
    """Return the hash of each file of a job's model, read from the store; check that it is what the rows say."""
    row = db.read(lambda tx: tx.execute(sa.select(models).where(models.c.job == job_id, models.c.checkpoint.is_(None))).one())
    blobs = place.blobs()
    found = {
        entry.path: hashlib.sha256(b"".join(blobs.read(entry.blob))).hexdigest() for entry in read_manifest(blobs, row.manifest)
    }
    assert found
    return found


def trains(db: Database, job_id: str, step: int = 3) -> bool:
    return job_of(db, job_id).step >= step


def adapter_of_quiet_run(place: Place, job_id: str, trainers: Trainers) -> dict[str, str]:
    """Return the hash of each file of a job's model, trained without a stop."""
    work_here(place, trainers=trainers)
    db = place.database()
    assert_whole(place, db, job_id)
    found = adapter_bytes(place, db, job_id)
    db.close()
    return found


def assert_whole(place: Place, db: Database, job_id: str) -> None:
    """Check all that must hold of a job that has succeeded, whatever was killed on the way."""
    job, events = job_of(db, job_id), events_of(db, job_id)
    assert job.status == "succeeded", (job.status, job.error)
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    assert job.num_events == len(events)
    steps = [event.data["step"] for event in events if event.type == "metrics"]
    assert steps == list(range(1, (job.total_steps or 0) + 1)), "each step is told once, in order"
    assert job.trained_tokens == sum(event.data["trained_tokens"] for event in events if event.type == "metrics")
    assert job.trained_tokens == job.planned_tokens
    said = [event.message for event in events]
    assert sum(message == "The job has successfully completed" for message in said) == 1
    assert said[-1] == "The job has successfully completed"
    rows = db.read(lambda tx: tx.execute(sa.select(usage).where(usage.c.job == job_id)).all())
    assert [row.tokens for row in rows] == [job.trained_tokens]
    of_job = db.read(lambda tx: tx.execute(sa.select(models).where(models.c.job == job_id)).all())
    assert [row.id for row in of_job if row.checkpoint is None] == [job.tuned_model]
    shown = sorted(row.step for row in of_job if row.checkpoint is not None and row.deleted_at is None)
    assert shown[-1] == job.total_steps
    assert len(shown) <= (3 if job.validation_file is None else 4), "the last three, and the best"
    for row in of_job:
        assert row.content_hash
    result = db.read(lambda tx: tx.execute(sa.select(files).where(files.c.id.in_(job.result_files))).all())
    assert len(result) == len(job.result_files) == 2
    for file in result:
        content = b"".join(place.blobs().read(file.blob))
        assert len(content) == file.bytes
        assert content.count(b"\n") == 1 + (job.total_steps or 0)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def below(pid: int) -> list[int]:
    """Return the processes below a process."""
    found: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == pid:
            found += [int(stat.parent.name), *below(int(stat.parent.name))]
    return found


def trainer_of(job_id: str) -> int | None:
    """Return the process below this one that trains a job: the one that works in its folder."""
    for pid in below(os.getpid()):
        with contextlib.suppress(OSError):
            if Path(os.readlink(f"/proc/{pid}/cwd")).name.startswith(job_id):
                return pid
    return None


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def rows_of_database(db: Database) -> str:
    """Return everything that jobs and events hold, to be compared with itself later."""

    def read(tx: sa.Connection) -> str:
        tables = [jobs, *(table for table in jobs.metadata.sorted_tables if table.name not in ("leases", "jobs"))]
        return json.dumps({table.name: [list(map(str, row)) for row in tx.execute(sa.select(table))] for table in tables})

    return db.read(read)


SIGSTOP, SIGCONT = signal.SIGSTOP, signal.SIGCONT
