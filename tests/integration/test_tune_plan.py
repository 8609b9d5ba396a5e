"""A run is planned before its base is loaded: the plan is in its record and result, decides passes, refuses what cannot fit, and a
run that was begun goes on as it was begun, however much memory there is."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from kivnun.cli.screen import PlainScreen
from kivnun.data.packing import PackedBatch
from kivnun.errors import WontFitError
from kivnun.events import BaseLoaded, DataLoaded, PassesShortened, Planned, RunFailed, Warned, read_events
from kivnun.run_folder import RunFolder
from kivnun.spec import load_spec
from kivnun.train.engine import Trainee
from runs import at_step, chats, killed, numbers_of, result_hashes, run_spec, state_hashes, steps_of, write_spec

STEADY = {"every_steps": 2, "every_epoch": False, "every_seconds": None}
RESIDENT = 500e6


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that sets how much memory the machine has, for runs of a process that holds RESIDENT bytes."""
    monkeypatch.setattr("kivnun.parts._resident_bytes", lambda: RESIDENT)
    return lambda has: monkeypatch.setattr("kivnun.plan.devices.machine_memory", lambda: has)


def planned(run: Path) -> Planned:
    return next(event for event in read_events(run / "events.jsonl") if isinstance(event, Planned))


def test_record_result_and_screen_hold_what_was_foretold(base: Path, tmp_path: Path) -> None:
    text = io.StringIO()
    screen = PlainScreen(Console(file=text, soft_wrap=True), lambda: 0.0)
    result = run_spec(write_spec(tmp_path, base, chats()), tmp_path / "run", listener=screen)
    event = planned(tmp_path / "run")
    assert result["plan"] == {
        "peak_bytes": event.peak_bytes,
        "parts": event.parts,
        "seconds": event.seconds,
        "steps": event.steps,
    }
    assert event.peak_bytes == sum(event.parts.values())
    assert (event.steps, event.seconds > 0) == (result["steps"], True)
    kinds = [type(event) for event in read_events(tmp_path / "run" / "events.jsonl")]
    assert kinds.index(DataLoaded) < kinds.index(Planned) < kinds.index(BaseLoaded)
    assert json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))["plan"] == result["plan"]
    assert "\nplan: 16 steps, 0:0" in text.getvalue()
    assert " MiB at most (foretold: 0:0" in text.getvalue().splitlines()[-1]


def test_a_run_that_cannot_fit_is_refused_before_its_base_is_loaded_and_may_be_given_again(
    base: Path, tmp_path: Path, memory: Callable[[float], None]
) -> None:
    spec, run = write_spec(tmp_path, base, chats()), tmp_path / "run"
    memory(RESIDENT / 2)
    with pytest.raises(WontFitError, match=r"the run takes about .* of memory at most, and 238 MiB are there"):
        run_spec(spec, run)
    events = read_events(run / "events.jsonl")
    assert not any(isinstance(event, BaseLoaded) for event in events)
    assert isinstance(events[-1], RunFailed)
    assert events[-1].code == "does_not_fit"
    assert any(isinstance(event, Planned) for event in events)
    memory(2**33)
    assert run_spec(spec, run)["status"] == "succeeded"


def test_memory_that_runs_out_before_training_is_told(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*given: object, **named: object) -> None:
        raise MemoryError("cannot map 8 bytes")

    monkeypatch.setattr("kivnun.pipeline.load_base", no_memory)
    with pytest.raises(WontFitError, match="memory ran out in a stage outside of training's passes: cannot map 8 bytes"):
        run_spec(write_spec(tmp_path, base, chats()), tmp_path / "run")
    last = read_events(tmp_path / "run" / "events.jsonl")[-1]
    assert isinstance(last, RunFailed)
    assert last.code == "does_not_fit"


def test_short_memory_shortens_passes_and_a_resumed_run_keeps_them(
    base: Path, tmp_path: Path, memory: Callable[[float], None]
) -> None:
    schedule = {"epochs": 4, "batch_rows": 120, "learning_rate": 0.01}
    spec = write_spec(tmp_path, base, chats(300), schedule=schedule, checkpoints=STEADY)
    memory(2**40)
    run_spec(spec, tmp_path / "roomy")
    roomy = RunFolder(tmp_path / "roomy").read_spec().compute
    assert (roomy.micro_batch_tokens, roomy.activation_checkpointing) == (4096, False)
    enough = planned(tmp_path / "roomy").peak_bytes
    assert max(step.tokens for step in steps_of(tmp_path / "roomy")) > 2048

    memory(enough - 100_000)
    run_spec(spec, tmp_path / "short")
    short = RunFolder(tmp_path / "short").read_spec().compute
    assert short.micro_batch_tokens == 2048
    resolved = (tmp_path / "short" / "resolved.yaml").read_text(encoding="utf-8")
    assert "micro_batch_tokens: 2048  # else the run would take " in resolved
    assert load_spec(tmp_path / "spec.yaml").compute.micro_batch_tokens is None

    killed(spec, tmp_path / "stopped", at_step(5))
    for now in (1.0, 2**40):  # neither refused nor changed
        memory(now)
        if now == 1.0:
            killed(spec, tmp_path / "stopped", at_step(6), resume=True)
        else:
            run_spec(spec, tmp_path / "stopped", resume=True)
    assert numbers_of(tmp_path / "stopped") == numbers_of(tmp_path / "short")
    assert state_hashes(tmp_path / "stopped") == state_hashes(tmp_path / "short")


def test_a_run_whose_memory_ran_out_is_resumed_to_the_same_bits(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine's fault is put in at the trainee's verb: the real error of torch's allocator, from the fifth step on."""
    whole = Trainee.forward_backward
    spec = write_spec(tmp_path, base, chats(60), schedule={"epochs": 1, "batch_rows": 8, "learning_rate": 0.01}, checkpoints=STEADY)

    def short(self: Trainee, batch: PackedBatch, total_weight: float) -> float:
        share = whole(self, batch, total_weight)
        if self.steps + 1 >= 4 and batch.num_tokens > 90:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12")
        return share

    tokens = "compute.micro_batch_tokens=160"
    run_spec(spec, tmp_path / "roomy", tokens)
    monkeypatch.setattr(Trainee, "forward_backward", short)
    run_spec(spec, tmp_path / "whole", tokens)
    killed(spec, tmp_path / "stopped", at_step(5), tokens)
    monkeypatch.setattr(Trainee, "forward_backward", whole)  # there is memory again
    run_spec(spec, tmp_path / "stopped", tokens, resume=True)
    events = read_events(tmp_path / "stopped" / "events.jsonl")
    assert [(e.step, e.micro_batch_tokens) for e in events if isinstance(e, PassesShortened)] == [(4, 80)]
    assert any(isinstance(e, Warned) and "memory ran out in step 4" in e.message for e in events)
    assert numbers_of(tmp_path / "stopped") == numbers_of(tmp_path / "whole") != numbers_of(tmp_path / "roomy")
    assert state_hashes(tmp_path / "stopped") == state_hashes(tmp_path / "whole")
    assert result_hashes(tmp_path / "stopped") == result_hashes(tmp_path / "whole")
