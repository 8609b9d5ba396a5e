"""The duty that judges jobs whose files are judged: checks, numbers for every `auto`, the spec its worker runs, then the queue.

What is computed is computed outside of any transaction, and written in one, so that a process killed at any moment leaves the job
to be validated again from its beginning. Next: `planning.py`.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from kivnun.artifacts import storage_errors
from kivnun.errors import KivnunError, StorageError
from kivnun.jobs import files, models, queue, tuning
from kivnun.jobs.database import Transaction
from kivnun.jobs.errors import DatabaseDown, StaleLease, StoreDown
from kivnun.jobs.files import File
from kivnun.jobs.results import REPORT_FILE
from kivnun.jobs.snapshots import fetch_folder
from kivnun.jobs.tenants import limits_of
from kivnun.jobs.tuning import Job
from kivnun.service.context import Service
from kivnun.service.planning import (
    START,
    TRAINING,
    VALIDATION,
    JobRefused,
    Machine,
    Outlook,
    check_quota,
    outlook,
    this_machine_asked,
)
from kivnun.service.turns import OF_EACH, Turns

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Sources:
    """The blobs that a job begins from. `start` is the manifest of the adapter it continues."""

    training: File
    validation: File | None
    start: str | None


LARGE_BYTES = 64 << 20  # of a training file: reading it takes a minute or so


@dataclass
class ValidateJobs:
    """A duty of the clerk: every job, or in two lanes, so that nobody waits behind a large file."""

    service: Service
    lane: Literal["all", "small", "large"] = "all"
    machine: Machine = this_machine_asked
    name: str = "validate_jobs"
    turns: Turns = field(default_factory=Turns)

    def turn(self) -> bool:
        """Validate the job whose turn it is; return whether there was one."""
        bounds = {"all": (0, None), "small": (0, LARGE_BYTES), "large": (LARGE_BYTES, None)}[self.lane]
        waiting = self.service.db.read(lambda tx: tuning.to_validate(tx, *bounds, of_each=OF_EACH))
        if not waiting:
            return False
        job = self.turns.in_turn(waiting)[0]
        with self.turns.serving(job):
            self.validate(job)
        return True

    def validate(self, job: Job) -> None:
        """Move a job to the queue, or end it with what is wrong with it."""
        with self._folder() as folder:
            try:
                with storage_errors(folder):
                    self._validate(job, folder)
            except (DatabaseDown, StoreDown, StorageError, StaleLease):
                raise  # of the machine or the clerk, not of the job: it is tried again
            except JobRefused as refused:
                self._fail(job, refused, folder)
            except KivnunError as error:
                self._fail(job, JobRefused(error.code, error.message), folder)
            except Exception as error:
                if not folder.is_dir():
                    raise  # a service that starts clears the scratch folder
                # What an unknown error says may hold what a file says; where it came from does not.
                told = {"action": "validation_failed", "job": job.id}
                logger.error("a job could not be validated", exc_info=error, extra=told)
                self._fail(job, JobRefused("internal_error", "the job could not be validated; the server's log says why"), folder)

    def _validate(self, job: Job, folder: Path) -> None:
        sources = self.service.db.read(lambda tx: _sources(tx, job))
        self.service.blobs.fetch(sources.training.blob, folder / TRAINING)
        if sources.validation is not None:
            self.service.blobs.fetch(sources.validation.blob, folder / VALIDATION)
        if sources.start is not None:
            fetch_folder(self.service.blobs, sources.start, folder / START)
        with (folder / REPORT_FILE).open("x", encoding="utf-8") as report:
            found = outlook(job, self.service.config, folder, report, self.machine)
        limits = self.service.db.read(lambda tx: limits_of(tx, job.tenant, self.service.config.limits))
        check_quota(found, limits.training_tokens)
        kept = self._kept_report(job, folder)
        self.service.db.write("validate job", lambda tx: _queue(tx, self.service, job, found, kept))

    def _fail(self, job: Job, refused: JobRefused, folder: Path) -> None:
        kept = self._kept_report(job, folder)
        error = {"code": refused.code, "message": refused.message, "param": refused.param}

        def work(tx: Transaction) -> None:
            now, new_id = self.service.clock(), self.service.new_id
            current = tuning.find(tx, job.id)
            if current is None or current.status != "validating_files":
                return  # cancelled meanwhile
            if kept is not None:
                files.add(tx, kept)
            report = {} if kept is None else {"result_files": [kept.id]}
            tuning.append_event(tx, job.id, now, refused.message, new_id, level="error")
            tuning.move(tx, current, "failed", now, new_id, error=error, **report)

        self.service.db.write("refuse job", work)

    def _kept_report(self, job: Job, folder: Path) -> File | None:
        """Keep the report of the examples as far as it came; return its file, not recorded yet."""
        path = folder / REPORT_FILE
        if not path.is_file() or not path.stat().st_size:
            return None
        blob = self.service.blobs.put(job.tenant, path)
        return File(
            id=self.service.new_id("file-"), tenant=job.tenant, created_at=self.service.clock(), purpose="fine-tune-results",
            filename=REPORT_FILE, bytes=path.stat().st_size, blob=blob, status="processed",
        )  # fmt: skip

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        with storage_errors(self.service.scratch):
            self.service.scratch.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="validating-", dir=self.service.scratch))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _sources(tx: Transaction, job: Job) -> _Sources:
    training = files.find(tx, job.training_file, job.tenant)
    validation = None if job.validation_file is None else files.find(tx, job.validation_file, job.tenant)
    for found, given, param in (
        (training, job.training_file, "training_file"),
        (validation, job.validation_file, "validation_file"),
    ):
        if given is not None and found is None:
            raise JobRefused(f"invalid_{param}", f"the file {given} was deleted", param)
        if found is not None and found.status == "error":
            why = found.status_details or "its lines cannot be used"
            raise JobRefused(f"invalid_{param}", f"the file {given} was refused: {why}", param)
    assert training is not None
    start = None
    if job.model.startswith("ft:"):
        model = models.find(tx, job.model, job.tenant)
        if model is None:
            raise JobRefused("model_not_found", f"the model {job.model} was deleted", "model")
        start = model.manifest
    return _Sources(training, validation, start)


def _queue(tx: Transaction, service: Service, job: Job, found: Outlook, kept: File | None) -> None:
    """Write what a job will be and move it to the queue, unless it was cancelled meanwhile."""
    now, new_id = service.clock(), service.new_id
    current = tuning.find(tx, job.id)
    if current is None or current.status != "validating_files":
        return
    facts = {**found.facts(), "price": service.config.bases[job.base].price.training}
    if kept is not None:
        files.add(tx, kept)
        facts["report_file"] = kept.id
    for level, message in _told(job, found):
        tuning.append_event(tx, job.id, now, message, new_id, level=level)
    tuning.append_event(tx, job.id, now, "Files validated, moving job to queued state", new_id)
    tuning.move(
        tx, current, "queued", now, new_id, hyperparameters=found.hyperparameters.shown(), spec=found.spec, facts=facts,
        total_steps=found.total_steps, planned_tokens=found.planned_tokens, planned_seconds=found.seconds, queued_at=now,
    )  # fmt: skip
    place = queue.position(tx, job.id, service.config.limits)
    if place is not None and place.position > 1:
        tuning.append_event(tx, job.id, now, _place_told(place, found, now), new_id)


def _place_told(place: queue.Place, found: Outlook, now: float) -> str:
    wait = place.wait(found.seconds, found.planned_tokens)
    start = "" if wait is None else f", estimated start {datetime.fromtimestamp(now + wait, UTC):%Y-%m-%d %H:%M} UTC"
    return f"Queue position {place.position}{start}"


def _told(job: Job, found: Outlook) -> Iterator[tuple[tuning.Level, str]]:
    """Yield what was decided and what is worth a look, before the job is queued."""
    numbers, examples = found.hyperparameters, found.examples
    beta = "" if numbers.beta is None else f", beta {numbers.beta:g}"
    yield (
        "info",
        f"Hyperparameters: n_epochs {numbers.n_epochs}, batch_size {numbers.batch_size}, learning_rate_multiplier "
        f"{numbers.learning_rate_multiplier:g} (a learning rate of {numbers.learning_rate:g}){beta}",
    )
    if examples.truncated:
        yield "warn", f"Examples cut to the longest length: {examples.truncated:,} (see the report of the examples)"
    if examples.overlap:
        yield "warn", f"{examples.overlap:,} of {examples.held_out:,} validation examples are training examples too"
    if not found.counted:
        yield "warn", "Tokens are estimated: the base is not on this machine yet"
    if found.plan is not None and found.plan.verdict == "does_not_fit":
        refusal = found.plan.refusal()
        assert refusal is not None
        yield "warn", f"The plan for this machine: {refusal.message}"
