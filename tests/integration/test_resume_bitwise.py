"""Killed at any point and resumed = never stopped: weights, moments, losses and order of rows, to the bit.

Every kill is a SIGKILL of a real process, forked from this one so that a run takes a fraction of a second;
`test_resume_process.py` starts and kills processes of their own. Runs without a kill are the measure, one per kind of training.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kivnun.errors import IntegrityError
from kivnun.events import CheckpointSaved, Evaluated, Event, Resumed, RunFinished, StepDone, Warned, read_events
from runs import (
    Tree,
    at_step,
    chats,
    in_child,
    kill_self,
    killed,
    newest_checkpoint,
    numbers_of,
    pairs,
    prompted,
    result_hashes,
    run_spec,
    state_hashes,
    write_spec,
)

KINDS: dict[str, Tree] = {
    "lora": {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.2}},
    "dora": {"adapter": {"kind": "dora", "rank": 2, "dropout": 0.1}, "schedule": {"batch_rows": None, "batch_tokens": 160}},
    "shared": {
        "base": {"precision": "bf16"},
        "adapter": {"kind": "lora", "rank": 4},
        "compute": {"share_prefixes": True, "micro_batch_tokens": 256},
    },
    "full_bf16_muon": {
        "base": {"precision": "bf16"},
        "adapter": {"kind": "full"},
        "schedule": {"learning_rate": 0.001, "optimizer": {"kind": "muon", "weight_decay": 0.01}},
    },
    "full_fp32": {"adapter": {"kind": "full"}, "schedule": {"learning_rate": 0.001}},
    "dpo": {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.1}, "schedule": {"epochs": 4, "batch_rows": 4}},
    "dpo_full": {"adapter": {"kind": "full"}, "schedule": {"epochs": 4, "batch_rows": 4, "learning_rate": 0.0001}},
}


@dataclass(frozen=True)
class Whole:
    """A run that was never stopped, and the spec it was made by."""

    spec: Path
    run: Path

    @property
    def num_steps(self) -> int:
        return len(numbers_of(self.run))


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Whole]:
    """Return the uninterrupted run of a kind with a checkpoint every so many steps; each is made once."""
    made: dict[tuple[str, int], Whole] = {}

    def run(kind: str, every_steps: int) -> Whole:
        if (kind, every_steps) not in made:
            folder = tmp_path_factory.mktemp(f"{kind}_{every_steps}")
            sections: dict[str, Any] = dict(KINDS[kind])
            sections["base"] = {"model": str(base), **sections.get("base", {})}
            sections["checkpoints"] = {"every_steps": every_steps, "every_epoch": False, "every_seconds": None}
            rows = pairs() if kind.startswith("dpo") else prompted(chats()) if kind == "shared" else chats()
            spec = write_spec(folder, base, rows, **sections)
            run_spec(spec, folder / "run")
            made[kind, every_steps] = Whole(spec, folder / "run")
        return made[kind, every_steps]

    return run


def assert_same(run: Path, whole: Whole) -> None:
    assert numbers_of(run) == numbers_of(whole.run)
    assert state_hashes(run) == state_hashes(whole.run)
    assert result_hashes(run) == result_hashes(whole.run)
    assert scores_of(run) == scores_of(whole.run)


def scores_of(run: Path) -> list[tuple[str, int, float]]:
    return [(e.which, e.step, e.nll) for e in read_events(run / "events.jsonl") if isinstance(e, Evaluated)]


@pytest.mark.parametrize(
    ("kind", "step", "every_steps"),
    [
        ("lora", 1, 1), ("lora", 2, 2), ("lora", 5, 3), ("lora", 16, 1),
        ("dora", 4, 3), ("dora", 7, 1), ("shared", 3, 2),
        ("full_bf16_muon", 3, 2), ("full_bf16_muon", 12, 3), ("full_fp32", 6, 2),
        ("dpo", 2, 1), ("dpo", 9, 2), ("dpo_full", 5, 2),
    ],
)  # fmt: skip
def test_killed_once_and_resumed(
    whole: Callable[[str, int], Whole], tmp_path: Path, kind: str, step: int, every_steps: int
) -> None:
    expected, run = whole(kind, every_steps), tmp_path / "run"
    killed(expected.spec, run, at_step(step))
    result = run_spec(expected.spec, run, resume=True)
    assert result["status"] == "succeeded"
    assert_same(run, expected)


@pytest.mark.slow
def test_the_shared_run_computes_its_system_prompt_once(whole: Callable[[str, int], Whole]) -> None:
    steps = [event for event in read_events(whole("shared", 2).run / "events.jsonl") if isinstance(event, StepDone)]
    assert sum(step.computed_tokens for step in steps) < 0.7 * sum(step.tokens for step in steps)


QUICK = {("lora", 1)}  # the others take minutes: `make test-slow`; above, each of their kinds is killed at some step


@pytest.mark.parametrize(
    ("kind", "every_steps"),
    [
        pytest.param(kind, every_steps, marks=() if (kind, every_steps) in QUICK else pytest.mark.slow)
        for kind in KINDS
        for every_steps in (1, 2, 3)
    ],
)
def test_killed_at_every_step(whole: Callable[[str, int], Whole], tmp_path: Path, kind: str, every_steps: int) -> None:
    expected = whole(kind, every_steps)
    for step in range(1, expected.num_steps + 1):
        run = tmp_path / f"run_{step}"
        killed(expected.spec, run, at_step(step))
        run_spec(expected.spec, run, resume=True)
        assert_same(run, expected)


@pytest.mark.parametrize("kind", ["lora", "full_bf16_muon"])
def test_killed_three_times_in_one_run(whole: Callable[[str, int], Whole], tmp_path: Path, kind: str) -> None:
    """The second kill comes before the step of the first, the third after it has been passed again."""
    expected, run = whole(kind, 3), tmp_path / "run"
    killed(expected.spec, run, at_step(8))
    killed(expected.spec, run, at_step(7), resume=True)
    killed(expected.spec, run, at_step(14), resume=True)
    run_spec(expected.spec, run, resume=True)
    assert_same(run, expected)
    assert [e.step for e in read_events(run / "events.jsonl") if isinstance(e, Resumed)] == [6, 6, 12]


def is_checkpoint(event: Event) -> bool:
    return isinstance(event, CheckpointSaved) and event.step == 4


def is_last_score(event: Event) -> bool:
    return isinstance(event, Evaluated) and event.step == 16


@pytest.mark.parametrize(
    "when",
    [is_checkpoint, is_last_score, lambda event: isinstance(event, RunFinished)],
    ids=["after_a_checkpoint", "after_the_last_score", "after_run_finished"],
)
def test_killed_between_stages(whole: Callable[[str, int], Whole], tmp_path: Path, when: Callable[[Event], bool]) -> None:
    expected, run = whole("lora", 2), tmp_path / "run"
    killed(expected.spec, run, when)
    run_spec(expected.spec, run, resume=True)
    assert_same(run, expected)


# --- killed at the system's calls: in the middle of checkpoints, result, report, manifest ---

CALLS = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "ftruncate")


def killed_at_call(spec: Path, run: Path, number: int, *, resume: bool = False) -> bool:
    """Run a spec in a process that dies just before its `number`-th call of the file system; return False where it makes fewer."""
    calls = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                kill_self()
            return original(*args, **kwargs)

        return call

    def work() -> None:
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        run_spec(spec, run, resume=resume)

    code = in_child(work)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def assert_killed_at_calls(expected: Whole, place: Path, numbers: range) -> int:
    """Kill at each of these calls, resume and compare; return how many kills there were."""
    for done, number in enumerate(numbers):
        run = place / f"run_{number}"
        if not killed_at_call(expected.spec, run, number):
            return done
        if not any(run.glob("*")):
            shutil.rmtree(run, ignore_errors=True)
        run_spec(expected.spec, run, resume=run.exists())
        assert_same(run, expected)
        assert not list(run.rglob(".tmp-*")), f"call {number} left something behind"
        shutil.rmtree(run)
    return len(numbers)


def test_killed_in_the_middle_of_writing(whole: Callable[[str, int], Whole], tmp_path: Path) -> None:
    assert assert_killed_at_calls(whole("lora", 3), tmp_path, range(3, 1000, 13)) > 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["lora", "full_bf16_muon", "dpo"])
def test_killed_at_every_call_of_the_file_system(whole: Callable[[str, int], Whole], tmp_path: Path, kind: str) -> None:
    assert assert_killed_at_calls(whole(kind, 3), tmp_path, range(1, 2000)) > 50


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora", "full_bf16_muon", "dpo"])
def test_twenty_kills_at_random_calls_in_one_run(whole: Callable[[str, int], Whole], tmp_path: Path, kind: str) -> None:
    expected, run, draw = whole(kind, 1), tmp_path / "run", random.Random(5)
    kills = 0
    for _ in range(20):
        kills += killed_at_call(expected.spec, run, draw.randint(8, 60), resume=run.exists())
    run_spec(expected.spec, run, resume=True)
    assert kills > 5
    assert_same(run, expected)


# --- damaged checkpoints ---


def damage_tensor(checkpoint: Path) -> None:
    file = checkpoint / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def cut_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_bytes((checkpoint / "manifest.json").read_bytes()[:-20])


def lose_file(checkpoint: Path) -> None:
    (checkpoint / "trainee.json").unlink()


@pytest.mark.parametrize("harm", [damage_tensor, cut_manifest, lose_file, shutil.rmtree])
def test_a_lost_or_damaged_checkpoint_falls_back_to_the_one_before(
    whole: Callable[[str, int], Whole], tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    expected, run = whole("lora", 3), tmp_path / "run"
    killed(expected.spec, run, at_step(10))
    assert newest_checkpoint(run).name == "step-000009"
    harm(newest_checkpoint(run))
    run_spec(expected.spec, run, resume=True)
    events = read_events(run / "events.jsonl")
    assert [event.step for event in events if isinstance(event, Resumed)] == [6]
    told = [event.message for event in events if isinstance(event, Warned) and "step-000009 is damaged" in event.message]
    assert len(told) == (harm is not shutil.rmtree)
    assert_same(run, expected)


def test_a_damaged_only_checkpoint_is_an_error_and_a_removed_one_starts_over(
    whole: Callable[[str, int], Whole], tmp_path: Path
) -> None:
    expected, run = whole("lora", 3), tmp_path / "run"
    killed(expected.spec, run, at_step(4))
    damage_tensor(newest_checkpoint(run))
    with pytest.raises(IntegrityError, match="step-000003 is damaged"):
        run_spec(expected.spec, run, resume=True)
    shutil.rmtree(run / "checkpoints")
    run_spec(expected.spec, run, resume=True)
    assert [event.step for event in read_events(run / "events.jsonl") if isinstance(event, Resumed)] == [0]
    assert_same(run, expected)
