"""From a created job to a queued one: checks in their order, numbers for every auto, and a spec whose run does what was planned."""

from __future__ import annotations

import errno
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from openai import OpenAI

from kivnun.errors import StorageError
from kivnun.events import StepDone, read_events
from kivnun.jobs import leases, running, tuning
from kivnun.jobs.config import Price, ServiceConfig
from kivnun.jobs.database import Transaction
from kivnun.jobs.files import find as find_file
from kivnun.jobs.ids import new_id
from kivnun.jobs.models import Model
from kivnun.jobs.models import add as add_model
from kivnun.jobs.naming import model_name
from kivnun.jobs.schema import usage
from kivnun.jobs.snapshots import content_hash, files_in, keep_files
from kivnun.jobs.toy import planned_tokens, read_toy, rows_of
from kivnun.plan.devices import Device
from kivnun.plan.verdict import Question
from kivnun.service import validating
from kivnun.service.context import Service
from kivnun.service.logs import JsonLines
from kivnun.service.planning import START, TRAINING, VALIDATION
from kivnun.service.validating import ValidateJobs
from kivnun.spec import parse_spec
from service_jobs import conversations, lines, openai_client, preferences, uploaded
from service_parts import KEY, api, place, service_at

TINY = "kivnun/tiny-phi"
PHI = "microsoft/Phi-4-mini-instruct"  # known by its configuration, and not on this machine
CONFIG = ServiceConfig.model_validate(
    {
        "bases": {
            "toy": {"trainer": "toy", "price": {"training": 1000.0}},
            "narrow": {"trainer": "toy", "max_seq_len": 40},
            PHI: {},
            TINY: {"price": {"training": 3.0}, "max_seq_len": 64, "rank": 4},
        },
        "limits": {"training_tokens": 50_000, "requests_per_minute": 100_000},
    }
)


def as_foretold(question: Question) -> Question:
    """Take this machine for the reference one: its speed is not what is tested."""
    return question


@dataclass(frozen=True)
class World:
    service: Service
    address: str
    client: OpenAI

    def create(self, training: str, model: str = "toy", **given: Any) -> str:
        return self.client.fine_tuning.jobs.create(model=model, training_file=training, **given).id

    def validate(self) -> None:
        duty = ValidateJobs(self.service, machine=as_foretold)
        while duty.turn():
            pass

    def job(self, job_id: str) -> tuning.Job:
        found = self.service.db.read(lambda tx: tuning.find(tx, job_id))
        assert found is not None
        return found

    def messages(self, job_id: str) -> list[str]:
        return [event.message for event in self.client.fine_tuning.jobs.list_events(job_id, limit=100)][::-1]

    def report(self, job_id: str) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self.address}/v1/fine_tuning/jobs/{job_id}/x_report", headers={"api-key": KEY})
        assert answer.status_code == 200
        return [json.loads(line) for line in answer.text.splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    service = service_at(place(tmp_path_factory.mktemp("service")), CONFIG)
    with api(service) as address:
        yield World(service, address, openai_client(address))


@pytest.mark.parametrize("prices", [{}, {"toy": Price(training=5.0)}])
def test_a_job_is_charged_by_the_price_it_was_queued_with_whatever_is_configured_at_its_end(
    world: World, prices: dict[str, Price]
) -> None:
    db, now = world.service.db, time.time()
    job_id = world.create(uploaded(world.client, conversations(12)))
    world.validate()

    def train(tx: Transaction) -> None:
        lease = leases.claim(tx, running.lease_name(job_id), "worker")
        assert lease is not None
        tuning.move(tx, world.job(job_id), "running", now, new_id)
        running.tell(tx, lease, job_id, [running.Told("Step 1", step=1, trained_tokens=7)], None, now, new_id)
        adapter = running.Adapter(1, "default/" + "0" * 64, "hash", {})
        assert running.succeed(tx, lease, job_id, adapter, [], "org", prices, now, new_id) == "succeeded"

    db.write("train", train)
    charged = db.read(lambda tx: tx.execute(sa.select(usage).where(usage.c.job == job_id)).one())
    assert (charged.tokens, charged.cost_micros) == (7, 7_000)


def reply(words: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Say much."}, {"role": "assistant", "content": "very much " * (words // 2)}]}


def test_a_job_is_validated_in_the_published_order_and_shows_the_numbers_that_auto_stood_for(world: World) -> None:
    training, held = uploaded(world.client, conversations(12)), uploaded(world.client, conversations(3, first=20))
    job_id = world.create(training, validation_file=held)
    world.validate()
    assert world.messages(job_id) == [
        f"Created fine-tuning job: {job_id}",
        f"Validating training file: {training} and validation file: {held}",
        "Hyperparameters: n_epochs 8, batch_size 1, learning_rate_multiplier 1 (a learning rate of 0.0002)",
        "Files validated, moving job to queued state",
    ]
    job = world.client.fine_tuning.jobs.retrieve(job_id).to_dict()
    numbers = {"n_epochs": 8, "batch_size": 1, "learning_rate_multiplier": 1.0}
    assert (job["status"], job["hyperparameters"]) == ("queued", numbers)
    assert job["method"] == {"type": "supervised", "supervised": {"hyperparameters": numbers}}
    assert job["x_learning_rate"] == 2e-4
    assert job["x_queue"]["position"] == 1  # type: ignore[index]
    facts = job["x_examples"]
    assert isinstance(facts, dict)
    assert (facts["examples"], facts["held_out"], facts["overlap"], facts["refused"]) == (12, 3, 0, 0)


def test_a_job_behind_others_is_told_its_place_and_when_it_may_begin_once(world: World) -> None:
    training = uploaded(world.client, conversations(12))
    jobs = [world.create(training) for _ in range(2)]
    world.validate()
    place = world.client.fine_tuning.jobs.retrieve(jobs[1]).to_dict()["x_queue"]
    assert isinstance(place, dict)
    said = [message for message in world.messages(jobs[1]) if message.startswith("Queue position")]
    assert len(said) == 1
    assert re.fullmatch(rf"Queue position {place['position']}, estimated start \d{{4}}-\d\d-\d\d \d\d:\d\d UTC", said[0])
    assert world.messages(jobs[1]).index(said[0]) == len(world.messages(jobs[1])) - 1


def test_a_toy_jobs_plan_is_what_the_toy_trainer_will_do(world: World) -> None:
    content = conversations(12)
    job_id = world.create(uploaded(world.client, content), seed=5)
    world.validate()
    job = world.job(job_id)
    spec = read_toy(job.spec or "")
    assert (spec.seed, spec.epochs, spec.batch_rows, spec.rows) == (5, 8, 1, 12)
    assert job.total_steps == spec.steps_of(12)
    assert job.planned_tokens == planned_tokens(spec, rows_of(content))


@pytest.mark.parametrize(
    ("training", "held", "given", "code", "param", "words"),
    [
        (conversations(3), None, {}, "invalid_n_examples", "training_file",
         "Training file has 3 example(s), but must have at least 10 examples"),
        (preferences(12), None, {}, "invalid_training_file", "training_file",
         "the method supervised needs conversations (messages) or prompts with completions, and the training file holds pref"),
        (conversations(12), None, {"method": {"type": "dpo"}}, "invalid_training_file", "training_file",
         "the method dpo needs preferences, and the training file holds messages"),
        (conversations(12), lines({"prompt": f"{n}", "completion": "yes"} for n in range(3)), {}, "invalid_validation_file",
         "validation_file", "the validation file holds prompt_completion and the training file messages: give both in one format"),
        (conversations(10) + lines([reply(80)]), None, {"model": "narrow"}, "context_length_exceeded", "training_file",
         "1 examples of the training file are longer than 40 tokens: line 11: has"),
        (conversations(12), lines([reply(80)]), {"model": "narrow"}, "context_length_exceeded", "validation_file", "line 1"),
        (conversations(12), None, {"hyperparameters": {"n_epochs": 50}, "metadata": {"big": "yes"}}, None, None, ""),
        (lines([reply(4000)] * 10), None, {}, "exceeded_quota", "training_file", "50,000 are allowed in one job"),
        (conversations(12), None, {"model": TINY, "extra_body": {"x_lora": {"targets": ["q_proj"]}}}, "invalid_value",
         "x_lora.targets", "names 'q_proj', and kivnun/tiny-phi has o_proj, qkv_proj, gate_up_proj, down_proj"),
    ],
)  # fmt: skip
def test_what_a_job_cannot_be_made_of_ends_it_with_its_reason(
    world: World, training: bytes, held: bytes | None, given: dict[str, Any], code: str | None, param: str | None, words: str
) -> None:
    files = {"validation_file": uploaded(world.client, held)} if held is not None else {}
    job_id = world.create(uploaded(world.client, training), **{"model": "toy", **given}, **files)
    world.validate()
    job = world.client.fine_tuning.jobs.retrieve(job_id)
    if code is None:
        assert job.status == "queued"
        return
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.param) == (code, param)
    assert words in job.error.message
    assert job.finished_at is not None
    last = next(iter(world.client.fine_tuning.jobs.list_events(job_id)))
    assert (last.level, last.message) == ("error", job.error.message)


def test_a_long_example_is_cut_where_that_is_asked_for_and_each_line_is_accounted_for(world: World) -> None:
    training = uploaded(world.client, conversations(10) + lines([reply(80)]))
    job_id = world.create(training, model="narrow", extra_body={"x_over_long": "truncate"})
    refused = world.create(training, model="narrow")
    world.validate()
    assert "Examples cut to the longest length: 1 (see the report of the examples)" in world.messages(job_id)
    report = world.report(job_id)
    assert [line["line"] for line in report] == list(range(1, 12))
    assert [line["status"] for line in report] == ["trained"] * 10 + ["cut"]
    assert report[-1]["tokens"] - report[-1]["cut_tokens"] == report[-1]["trained_tokens"] == 40
    job = world.job(job_id)
    assert job.planned_tokens == sum(line["trained_tokens"] for line in report) * job.hyperparameters["n_epochs"]
    assert [line["status"] for line in world.report(refused)] == ["trained"] * 10 + ["refused"]
    assert "40 are allowed" in world.report(refused)[-1]["reason"]
    shown = world.client.fine_tuning.jobs.retrieve(refused).result_files
    assert [world.client.files.retrieve(file_id).filename for file_id in shown] == ["report.jsonl"]


def test_examples_in_both_files_are_a_warning(world: World) -> None:
    job_id = world.create(
        uploaded(world.client, conversations(12)), validation_file=uploaded(world.client, conversations(4, first=10))
    )
    world.validate()
    warned = [event for event in world.client.fine_tuning.jobs.list_events(job_id) if event.level == "warn"]
    assert [event.message for event in warned] == ["2 of 4 validation examples are training examples too"]


def test_a_job_waits_for_the_judgement_of_its_files_and_one_cancelled_meanwhile_stays_cancelled(world: World) -> None:
    training = uploaded(world.client, conversations(12))
    job_id = world.create(training)
    mark(world, training, "uploaded")
    world.validate()
    assert world.job(job_id).status == "validating_files"
    mark(world, training, "processed")

    def cancelled_meanwhile(question: Question) -> Question:
        raise AssertionError("toys have no plan")

    duty = ValidateJobs(world.service, machine=cancelled_meanwhile)
    seen = world.service.db.read(tuning.to_validate)
    assert [job.id for job in seen] == [job_id]
    world.client.fine_tuning.jobs.cancel(job_id)
    duty.validate(seen[0])
    assert world.job(job_id).status == "cancelled"
    assert world.messages(job_id)[-1] == "Job cancelled"


def test_a_job_of_a_large_file_keeps_no_other_waiting(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kivnun.service.validating.LARGE_BYTES", 4096)
    large = world.create(uploaded(world.client, conversations(100)))
    small = world.create(uploaded(world.client, conversations(12)))
    lanes = {lane: ValidateJobs(world.service, lane, as_foretold) for lane in ("small", "large")}
    assert (lanes["small"].turn(), lanes["small"].turn()) == (True, False)
    assert (world.job(large).status, world.job(small).status) == ("validating_files", "queued")
    assert (lanes["large"].turn(), lanes["large"].turn()) == (True, False)
    assert world.job(large).status == "queued"


def mark(world: World, file_id: str, status: str) -> None:
    from kivnun.jobs import files

    world.service.db.write("mark", lambda tx: files.mark(tx, file_id, "default", status))  # type: ignore[arg-type]


def test_a_fault_of_the_program_ends_the_job_and_tells_the_log_no_content(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> object:
        raise KeyError(" ".join(["what", "a", "line", "said"]))

    monkeypatch.setattr("kivnun.service.validating.outlook", broken)
    job_id = world.create(uploaded(world.client, conversations(12)))
    world.validate()
    error = world.client.fine_tuning.jobs.retrieve(job_id).error
    assert error is not None
    assert error.code == "internal_error"
    logged = "".join(map(JsonLines().format, caplog.records))
    assert "KeyError" in logged
    assert "what a line said" not in logged


def test_a_full_disk_fails_no_job(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> object:
        raise OSError(errno.ENOSPC, "full")

    def removed(_job: object, _config: object, folder: Path, *_: object) -> object:
        shutil.rmtree(folder)
        return (folder / TRAINING).open()

    job_id = world.create(uploaded(world.client, conversations(12)))
    for where, name, breaks in ((validating, "outlook", full), (tempfile, "mkdtemp", full), (validating, "outlook", removed)):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, breaks)
            with pytest.raises((StorageError, FileNotFoundError)):
                world.validate()
        assert world.job(job_id).status == "validating_files"
    world.validate()
    assert world.job(job_id).status == "queued"


def test_a_dry_run_makes_nothing_and_says_what_the_job_then_is(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kivnun.service.planning.machine_speed", lambda precision: 1.0)
    training = uploaded(world.client, conversations(12))
    held = uploaded(world.client, conversations(3, first=30))
    given: dict[str, Any] = {"model": TINY, "training_file": training, "validation_file": held, "seed": 1}
    before = len(world.client.fine_tuning.jobs.list(limit=100).data)
    said = world.client.fine_tuning.jobs.create(**given, extra_body={"x_dry_run": True}).to_dict()
    assert len(world.client.fine_tuning.jobs.list(limit=100).data) == before
    assert (said["object"], said["verdict"], said["fits"]) == ("fine_tuning.job.dry_run", "fits", True)
    job_id = world.create(training, TINY, validation_file=held, seed=1)
    world.validate()
    job = world.job(job_id)
    assert said["hyperparameters"] == job.hyperparameters
    assert (said["trained_tokens"], said["steps"]) == (job.planned_tokens, job.total_steps)
    assert said["cost"] == pytest.approx((job.planned_tokens or 0) * 3.0 / 1e6)
    assert said["memory"]["bytes"] < said["memory"]["available"]  # type: ignore[index]
    assert said["seconds"] is not None
    much = world.client.fine_tuning.jobs.create(
        model="toy", training_file=uploaded(world.client, lines([reply(4000)] * 10)), extra_body={"x_dry_run": True}
    ).to_dict()
    assert (much["fits"], much["error"]["code"]) == (False, "exceeded_quota")  # type: ignore[index]
    few = world.client.fine_tuning.jobs.create(
        model=TINY, training_file=uploaded(world.client, conversations(3)), extra_body={"x_dry_run": True}
    ).to_dict()
    assert (few["verdict"], few["error"]["code"]) == ("refused", "invalid_n_examples")  # type: ignore[index]


def test_what_does_not_fit_in_memory_is_told_with_what_would_and_warned_of_in_the_job(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kivnun.service.planning.device_here", lambda: Device("a small machine", "cpu", 6e9, 2))
    monkeypatch.setattr("kivnun.service.planning.machine_speed", lambda precision: 1.0)
    training = uploaded(world.client, conversations(12))
    said = world.client.fine_tuning.jobs.create(model=PHI, training_file=training, extra_body={"x_dry_run": True}).to_dict()
    assert (said["verdict"], said["fits"]) == ("does_not_fit", False)
    assert said["memory"]["bytes"] > said["memory"]["available"] == 6e9  # type: ignore[index]
    assert said["changes"]
    assert said["counted"] is False
    job_id = world.create(training, PHI)
    world.validate()
    assert world.job(job_id).status == "queued", "a worker may have more memory than this machine"
    warned = [event.message for event in world.client.fine_tuning.jobs.list_events(job_id) if event.level == "warn"]
    assert any(message.startswith("The plan for this machine: the run takes about") for message in warned)
    assert "Tokens are estimated: the base is not on this machine yet" in warned


def test_a_dry_run_of_a_large_file_reads_its_beginning_and_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kivnun.service.dry_run.READ_BYTES", 4096)
    content = conversations(400)
    training = uploaded(world.client, content)
    said = world.client.fine_tuning.jobs.create(model="toy", training_file=training, extra_body={"x_dry_run": True}).to_dict()
    assert abs(said["examples"] - 400) <= 10  # type: ignore[operator]
    assert said["counted"] is False
    assert any("estimates" in warning for warning in said["warnings"])  # type: ignore[union-attr]


def test_a_run_of_the_spec_trains_what_was_planned(world: World, tmp_path: Path) -> None:
    job = supervised_job(world, n_epochs=1, batch_size=6)
    check_run(job, run_here(world, job, tmp_path / "run"))


@pytest.mark.slow
def test_a_run_that_goes_on_with_a_tuned_model_trains_what_was_planned(world: World, tmp_path: Path) -> None:
    job = supervised_job(world, n_epochs=2, batch_size=4)
    run = run_here(world, job, tmp_path / "first")
    check_run(job, run)
    model = kept_model(world, job, run / "adapter")
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2}}}
    going_on_id = world.create(uploaded(world.client, preferences(10)), model, method=method)
    world.validate()
    going_on = world.job(going_on_id)
    assert (going_on.status, going_on.base, going_on.hyperparameters["beta"]) == ("queued", TINY, 0.1)
    check_run(going_on, run_here(world, going_on, tmp_path / "second", model))


def supervised_job(world: World, **hyper: int) -> tuning.Job:
    """Return a queued job that cuts an example, has held-out ones, and says what its adapter is."""
    job_id = world.create(
        uploaded(world.client, conversations(10) + lines([reply(80)])),
        TINY,
        validation_file=uploaded(world.client, conversations(2, first=50)),
        method={"type": "supervised", "supervised": {"hyperparameters": hyper}},
        extra_body={"x_over_long": "truncate", "x_lora": {"rank": 2, "alpha": 3, "targets": ["qkv_proj"]}},
    )
    world.validate()
    return world.job(job_id)


def check_run(job: tuning.Job, run: Path) -> None:
    done = [event for event in read_events(run / "events.jsonl") if isinstance(event, StepDone)]
    assert (len(done), sum(step.trained_tokens for step in done)) == (job.total_steps, job.planned_tokens)
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (2, 3)
    assert {name.rpartition(".")[2] for name in adapter["target_modules"]} == {"qkv_proj"}


def run_here(world: World, job: tuning.Job, folder: Path, start: str | None = None) -> Path:
    """Run a job's spec as a worker does; return the run's folder."""
    from kivnun.jobs.models import find as find_model
    from kivnun.jobs.snapshots import fetch_folder
    from kivnun.pipeline import tune

    folder.mkdir()
    for file_id, name in ((job.training_file, TRAINING), (job.validation_file, VALIDATION)):
        if file_id is not None:
            file = world.service.db.read(lambda tx, file_id=file_id: find_file(tx, file_id, "default"))
            assert file is not None
            world.service.blobs.fetch(file.blob, folder / name)
    if start is not None:
        model = world.service.db.read(lambda tx: find_model(tx, start, "default"))
        assert model is not None
        fetch_folder(world.service.blobs, model.manifest, folder / START)
    assert job.spec is not None
    tune(parse_spec(job.spec, folder=folder), job.spec, folder / "run")
    return folder / "run"


def kept_model(world: World, job: tuning.Job, adapter: Path) -> str:
    """Record a run's adapter as a worker does; return its model's name."""
    found = dict(files_in(adapter, frozenset({"README.md", "manifest.json"})))
    manifest, entries = keep_files(world.service.blobs, "default", found)
    name = model_name(job, "kivnun")
    model = Model(name, "default", 1.0, job.id, job.base, job.total_steps or 0, manifest, content_hash(entries))
    world.service.db.write("model", lambda tx: add_model(tx, model))
    return name
