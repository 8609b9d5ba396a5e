"""Tenants, jobs, commands, and workers that crash, sleep and hand over, in any order: a model of the service beside its records.

Hypothesis writes the story and shortens it when something does not hold. Workers are objects of this test that use the same
transactions as the real ones (`kivnun/jobs/running.py`) and train by a chain of hashes; so a lost, doubled or reordered step shows
in the adapter. Where the processes are real: `tests/integration/test_serve_service.py`.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from kivnun.jobs import leases, running, tuning, usage
from kivnun.jobs.config import Limits, Price
from kivnun.jobs.database import Database
from kivnun.jobs.errors import StaleLease
from kivnun.jobs.leases import TERM_S, Lease, Watcher, release_all
from kivnun.jobs.running import Adapter, Snapshot, Told
from kivnun.jobs.schema import job_events, metadata, models, outbox
from kivnun.jobs.schema import usage as usage_rows
from kivnun.jobs.states import TERMINAL, Command, Status, after_command, may_follow
from kivnun.jobs.tenants import add_tenant

TENANTS = ("ann", "ben", "cem")
LIMITS = Limits(active_jobs=2)
PRICES = {"toy": Price(training=2.0)}
TOKENS_A_STEP = 7
PICK = st.integers(0, 11)
MEMORY = Path("/dev/shm")  # where a disk would be waited for: what is tested is the order of things, not the disk


def trained(job: str, step: int) -> str:
    """Return the adapter of a job after so many steps, trained by nobody but this function."""
    state = hashlib.sha256(job.encode()).hexdigest()
    for number in range(1, step + 1):
        state = hashlib.sha256(f"{state} {number}".encode()).hexdigest()
    return state


@dataclass
class Worker:
    """A process that trains. `lease` is what it believes it holds."""

    name: str
    watcher: Watcher
    asleep: bool = False
    lease: Lease | None = None
    job: str = ""
    step: int = 0
    state: str = ""

    def drop(self) -> None:
        self.lease, self.job = None, ""


@dataclass
class Known:
    """A job as the model has it."""

    id: str
    tenant: str
    steps: int
    status: Status = "validating_files"
    ever_ran: bool = False
    seen: list[Status] = field(default_factory=lambda: ["validating_files"])


class Service(RuleBasedStateMachine):
    """What may happen to a service, and what must hold whatever happens."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.folder: Path | None = None
        url = self.url
        if not url:
            self.folder = Path(tempfile.mkdtemp(prefix="kivnun-machine-", dir=MEMORY if MEMORY.is_dir() else None))
            url = f"sqlite:///{self.folder / 'db.sqlite'}"
        self.db = Database(url)
        self.db.write("schema", _emptied)
        self.clock = 0.0
        self.numbers = itertools.count(1)
        self.known: dict[str, Known] = {}
        self.workers: list[Worker] = []
        self.snapshots: dict[str, str] = {}  # a manifest and the state in it: the blobs
        for tenant in TENANTS:
            self.db.write("tenant", lambda tx, tenant=tenant: add_tenant(tx, tenant, 0.0))
        for _ in range(3):
            self._start_worker()

    def teardown(self) -> None:
        self._let_everything_end()
        self.db.close()
        if self.folder is not None:
            shutil.rmtree(self.folder)

    # --- what users do ---

    @initialize(wished=st.lists(st.tuples(st.sampled_from(TENANTS), st.integers(2, 6)), min_size=3, max_size=6))
    def some_jobs_wait(self, wished: list[tuple[str, int]]) -> None:
        for tenant, steps in wished:
            self.judge(self.create(tenant, steps), True)

    @rule(tenant=st.sampled_from(TENANTS), steps=st.integers(1, 5))
    def create_one(self, tenant: str, steps: int) -> None:
        self.create(tenant, steps)

    def create(self, tenant: str, steps: int) -> str:
        job = tuning.Job(
            id=self._id("ftjob-"), tenant=tenant, created_at=self._now(), model="toy", base="toy", training_file="file-1",
            method={"type": "supervised"}, seed=1,
        )  # fmt: skip
        self.db.write("create", lambda tx: tuning.create(tx, job, self._id))
        self.known[job.id] = Known(job.id, tenant, steps)
        return job.id

    @precondition(lambda self: any(known.status == "validating_files" for known in self.known.values()))
    @rule(good=st.sampled_from([True, True, False]))
    def judge_all(self, good: bool) -> None:
        for job_id in self.known:
            self.judge(job_id, good)

    def judge(self, job_id: str, good: bool) -> None:
        known = self.known[job_id]
        if known.status != "validating_files":
            return
        now = self._now()

        def judged(tx: tuning.Transaction) -> None:
            job = tuning.find(tx, job_id)
            assert job is not None
            values = {"planned_tokens": known.steps * TOKENS_A_STEP, "total_steps": known.steps, "queued_at": now}
            error = {"code": "invalid_training_file", "message": "no", "param": "training_file"}
            tuning.move(tx, job, "queued" if good else "failed", now, self._id, **(values if good else {"error": error}))

        self.db.write("judged", judged)
        self._became(known, "queued" if good else "failed")

    @rule(pick=PICK, kind=st.sampled_from(["pause", "pause", "resume", "resume", "cancel"]), by=st.sampled_from((None, *TENANTS)))
    def command_one(self, pick: int, kind: Command, by: str | None) -> None:
        known = list(self.known.values())[pick % len(self.known)]
        self.command(known.id, kind, by or known.tenant)

    def command(self, job_id: str, kind: Command, by: str) -> None:
        known, now = self.known[job_id], self._now()

        def commanded(tx: tuning.Transaction) -> tuple[bool, tuning.Job | None]:
            job = tuning.find(tx, job_id, by)
            return job is not None, None if job is None else tuning.command(tx, job, kind, now, self._id)

        found, after = self.db.write("command", commanded)
        assert found == (by == known.tenant), "another tenant's job is not there"
        if not found:
            return
        expected = after_command(known.status, kind)
        assert (None if after is None else after.status) == expected
        if expected is not None:
            self._became(known, expected)

    # --- what workers do ---

    @rule(number=st.integers(0, 2), times=st.integers(1, 5))
    def work_on(self, number: int, times: int) -> None:
        for _ in range(times):
            self.work(number)

    @rule(times=st.integers(1, 3))
    def work_all(self, times: int) -> None:
        for _ in range(times):
            for number in range(3):
                self.work(number)

    def work(self, number: int) -> None:
        """A worker does the next thing: it takes a job, trains a step of it, or ends it."""
        worker = self.workers[number]
        if worker.asleep:
            return
        if worker.lease is None:
            self._take(worker)
        else:
            self._train(worker)

    @precondition(lambda self: any(worker.lease for worker in self.workers))
    @rule(number=st.integers(0, 2))
    def save(self, number: int) -> None:
        worker = self.workers[number]
        if worker.lease is not None and not worker.asleep:
            self._under_lease(worker, lambda: self._commit(worker))

    @precondition(lambda self: any(worker.lease for worker in self.workers))
    @rule(number=st.integers(0, 2), saves=st.booleans())
    def hand_over(self, number: int, saves: bool) -> None:
        """SIGTERM: what is trained is saved, where the store answers, and the job given back, whatever it was told meanwhile."""
        worker = self.workers[number]
        if worker.lease is None or worker.asleep:
            return
        lease, known = worker.lease, self.known[worker.job]

        def given() -> None:
            if saves and not self._commit(worker):
                return
            now = self._now()
            status = self.db.write("back", lambda tx: running.hand_back(tx, lease, known.id, PRICES, now, self._id))
            after: dict[Status, Status] = {"running": "queued", "pausing": "paused"}
            assert status == after.get(known.status, known.status)
            if status != known.status:
                self._became(known, status)
            assert self.db.read(lambda tx: leases.look(tx, [lease.name]))[lease.name].owner is None
            worker.drop()

        self._under_lease(worker, given)

    @precondition(lambda self: any(worker.lease for worker in self.workers))
    @rule(number=st.integers(0, 2))
    def crash(self, number: int) -> None:
        """kill -9: the process is gone with all that it had not saved; another one is started."""
        self.workers.pop(number)
        self._start_worker()

    @rule(number=st.integers(0, 2))
    def fall_asleep_or_wake(self, number: int) -> None:
        """SIGSTOP and SIGCONT: the process goes on later as though nothing had happened."""
        self.workers[number].asleep = not self.workers[number].asleep

    @rule()
    def a_term_passes(self) -> None:
        """Everybody who is awake shows that he lives, more often than once a term, and looks who else does."""
        for _ in range(3):
            for worker in self.workers:
                if worker.lease is not None and not worker.asleep:
                    lease = worker.lease
                    self._under_lease(worker, lambda lease=lease: self.db.write("beat", lambda tx: leases.beat(tx, lease)))
            self._look()
            self.clock += TERM_S / 2

    @precondition(lambda self: any(worker.lease for worker in self.workers))
    @rule(number=st.integers(0, 2))
    def sleep_past_the_lease(self, number: int) -> None:
        """SIGSTOP for longer than a term: others take the job over; then SIGCONT."""
        worker = self.workers[number]
        worker.asleep = True
        self.a_term_passes()
        for other in range(3):
            self.work(other)
        worker.asleep = False
        self.work(number)

    @rule()
    def everything_is_killed_and_started_again(self) -> None:
        self.db.write("start", release_all)
        self.workers.clear()
        for _ in range(3):
            self._start_worker()

    # --- what holds ---

    @invariant()
    def every_job_is_what_the_model_says(self) -> None:
        found = self.db.read(lambda tx: {job_id: tuning.find(tx, job_id) for job_id in self.known})
        for known in self.known.values():
            job = found[known.id]
            assert job is not None
            assert job.status == known.status
            assert (job.finished_at is not None) == (job.status in TERMINAL)
            assert 0 <= job.step <= known.steps
            assert job.trained_tokens == job.step * TOKENS_A_STEP

    @invariant()
    def events_are_numbered_without_gaps_and_no_step_is_told_twice(self) -> None:
        query = sa.select(job_events.c.job, job_events.c.number, job_events.c.data).order_by(job_events.c.job, job_events.c.number)
        rows = self.db.read(lambda tx: tx.execute(query).all())
        for job_id, of_job in itertools.groupby(rows, key=lambda row: row.job):
            events = list(of_job)
            assert [row.number for row in events] == list(range(1, len(events) + 1))
            told = [row.data["step"] for row in events if "loss" in row.data]
            assert told == list(range(1, len(told) + 1)), job_id

    @invariant()
    def a_job_that_succeeded_has_one_model_of_its_own_steps_and_no_other_has_any(self) -> None:
        query = sa.select(models.c.job, models.c.tenant, models.c.content_hash).where(models.c.checkpoint.is_(None))
        made = {row.job: row for row in self.db.read(lambda tx: tx.execute(query).all())}
        number = self.db.read(lambda tx: tx.execute(sa.select(sa.func.count()).select_from(query.subquery())).scalar_one())
        assert number == len(made)
        assert set(made) == {known.id for known in self.known.values() if known.status == "succeeded"}
        for job_id, row in made.items():
            assert row.tenant == self.known[job_id].tenant
            assert row.content_hash == trained(job_id, self.known[job_id].steps)

    @invariant()
    def a_tenant_sees_its_own_jobs_alone(self) -> None:
        for tenant in TENANTS:
            page, more = self.db.read(lambda tx, tenant=tenant: tuning.page(tx, tenant, 1000))
            assert not more
            assert {job.id for job in page} == {known.id for known in self.known.values() if known.tenant == tenant}

    # --- how a worker works ---

    def _take(self, worker: Worker) -> None:
        """Take a job whose holder is dead, or else the next of the queue."""
        for job_id, seen in self.db.read(running.left_alone):
            if worker.watcher.is_dead(seen):
                now, known = self._now(), self.known[job_id]
                claim = self.db.write(
                    "take over", lambda tx, j=job_id, s=seen, n=now: running.take_over(tx, j, s, worker.name, PRICES, n, self._id)
                )
                if claim is not None:
                    assert known.status == "running"
                    self._begin(worker, claim)
                    return
                if known.status == "pausing":
                    self._became(known, "paused")
        claim = self.db.write("claim", lambda tx: running.claim_next(tx, worker.name, LIMITS, self._now(), self._id))
        waiting = [known for known in self.known.values() if known.status == "queued"]
        if claim is None:
            for known in waiting:
                assert self._active(known.tenant) >= LIMITS.active_jobs, "a job waits although it may begin"
            return
        known = self.known[claim.job.id]
        assert known in waiting
        assert self._active(known.tenant) < LIMITS.active_jobs
        self._became(known, "running")
        known.ever_ran = True
        self._begin(worker, claim)

    def _active(self, tenant: str) -> int:
        return sum(known.tenant == tenant and known.status in ("running", "pausing") for known in self.known.values())

    def _begin(self, worker: Worker, claim: running.Claim) -> None:
        """Go on from the newest snapshot."""
        found = self.db.read(lambda tx: running.newest(tx, claim.job.id))
        worker.lease, worker.job = claim.lease, claim.job.id
        worker.step = found[0].step if found else 0
        worker.state = self.snapshots[found[0].manifest] if found else trained(claim.job.id, 0)

    def _train(self, worker: Worker) -> None:
        known = self.known[worker.job]

        def on() -> None:
            if worker.step == known.steps:
                self._finish(worker)
                return
            worker.step += 1
            worker.state = hashlib.sha256(f"{worker.state} {worker.step}".encode()).hexdigest()
            told = Told(f"Step {worker.step}", type="metrics", data={"step": worker.step, "loss": 1.0}, step=worker.step,
                        trained_tokens=TOKENS_A_STEP)  # fmt: skip
            lease = worker.lease
            assert lease is not None
            self._heed(
                worker, self.db.write("told", lambda tx: running.tell(tx, lease, known.id, [told], None, self._now(), self._id))
            )

        self._under_lease(worker, on)

    def _commit(self, worker: Worker) -> bool:
        """Save where the worker is; return whether it still trains the job."""
        lease, job_id, manifest = worker.lease, worker.job, f"{worker.job} {worker.step} {worker.state}"
        assert lease is not None
        self.snapshots[manifest] = worker.state
        snapshot = Snapshot(worker.step, manifest)
        status = self.db.write("save", lambda tx: running.commit(tx, lease, job_id, snapshot, None, "org", self._now(), self._id))
        return self._heed(worker, status, saved=True)

    def _heed(self, worker: Worker, status: Status, *, saved: bool = False) -> bool:
        """Do what a job's status asks of its worker; return whether it is to go on."""
        lease, known, now = worker.lease, self.known[worker.job], self._now()
        assert lease is not None
        assert status == known.status
        if status == "running":
            return True
        if status == "pausing":
            if not saved:
                return self._commit(worker)
            self.db.write("paused", lambda tx: running.pause(tx, lease, known.id, now, self._id))
            self._became(known, "paused")
        elif status == "cancelled":
            self.db.write("settled", lambda tx: running.settle_cancelled(tx, lease, known.id, PRICES, now))
        worker.drop()
        return False

    def _finish(self, worker: Worker) -> None:
        lease, known = worker.lease, self.known[worker.job]
        assert lease is not None
        adapter = Adapter(worker.step, f"{known.id} adapter", worker.state, {})
        status = self.db.write(
            "succeed", lambda tx: running.succeed(tx, lease, known.id, adapter, [], "org", PRICES, self._now(), self._id)
        )
        if status == "succeeded":
            self._became(known, "succeeded")
            worker.drop()
        else:
            self._heed(worker, status)

    def _under_lease(self, worker: Worker, act) -> None:
        """Do something under a worker's lease. One that was taken over meanwhile must fail, and only such a one."""
        lease = worker.lease
        assert lease is not None
        seen = self.db.read(lambda tx: leases.look(tx, [lease.name]))[lease.name]
        holds = seen.epoch == lease.epoch and seen.owner == worker.name
        try:
            act()
            assert holds, "a stale worker wrote something"
        except StaleLease:
            assert not holds
            worker.drop()

    def _look(self) -> None:
        for worker in self.workers:
            if not worker.asleep:
                for _job, seen in self.db.read(running.left_alone):
                    worker.watcher.is_dead(seen)

    # --- the rest ---

    def _let_everything_end(self) -> None:
        """Wake everybody, resume what rests, and work until nothing is left to do; then count the money."""
        for known in self.known.values():
            self.judge(known.id, True)
            if known.status == "pausing":
                self.everything_is_killed_and_started_again()
                self._take(self.workers[0])
            if known.status == "paused":
                self.command(known.id, "resume", known.tenant)
        for worker in self.workers:
            worker.asleep = False
        for _ in range(12 * (len(self.known) + 3)):
            if not self.db.read(running.left_alone) and all(known.status in TERMINAL for known in self.known.values()):
                break
            self.a_term_passes()
            for number in range(3):
                self.work(number)
        assert all(known.status in TERMINAL for known in self.known.values()), list(self.known.values())
        self.every_job_is_what_the_model_says()
        self.a_job_that_succeeded_has_one_model_of_its_own_steps_and_no_other_has_any()
        self._money()

    def _money(self) -> None:
        rows = self.db.read(lambda tx: tx.execute(sa.select(usage_rows)).all())
        charged = {row.job: row for row in rows}
        assert len(charged) == len(rows), "a job is charged once"
        told = {row.data["id"]: row.type for row in self.db.read(lambda tx: tx.execute(sa.select(outbox)).all())}
        for known in self.known.values():
            job = self.db.read(lambda tx, known=known: tuning.find(tx, known.id))
            assert job is not None
            owes = job.trained_tokens if known.status in ("succeeded", "cancelled") else 0
            row = charged.pop(known.id, None)
            assert (row.tokens if row is not None else 0) == owes, known
            assert row is None or (row.tenant, row.cost_micros) == (known.tenant, usage.cost_micros(owes, 2.0))
            assert told.pop(known.id) == tuning.TOLD[known.status], "who is to hear of the end"
        assert not charged
        assert not told

    def _became(self, known: Known, status: Status) -> None:
        if status != known.status:
            assert may_follow(known.status, status)
            known.status = status
            known.seen.append(status)

    def _start_worker(self) -> None:
        self.workers.append(Worker(self._id("worker-"), Watcher(lambda: self.clock)))

    def _id(self, prefix: str) -> str:
        return f"{prefix}{next(self.numbers):024}"

    def _now(self) -> float:
        return 1e9 + next(self.numbers)


def _emptied(tx: sa.Connection) -> None:
    metadata.create_all(tx)
    for table in reversed(metadata.sorted_tables):
        tx.execute(sa.delete(table))


def play(url: str, examples: int, steps: int, *, known: bool) -> None:
    """Let hypothesis write so many stories; `known`: the same ones each time."""
    machine = type("Service", (Service,), {"url": url})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=known, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


def test_whatever_happens_nothing_is_lost_or_doubled() -> None:
    play("", 10, 40, known=True)


def test_the_same_holds_on_postgresql(postgres: str) -> None:
    from postgres import empty_database

    with empty_database(postgres) as url:
        play(url, 2, 25, known=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whatever_happens_in_many_long_stories() -> None:
    play("", int(os.environ.get("KIVNUN_STORIES", "400")), 80, known=False)
