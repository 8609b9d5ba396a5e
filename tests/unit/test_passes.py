"""Where memory runs out, a step begins again in shorter passes, and computes what a run with such passes would have computed."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kivnun.data.order import RowOrder
from kivnun.data.packing import PackedBatch
from kivnun.data.rows import TokenRow
from kivnun.errors import WontFitError
from kivnun.events import Event, PassesShortened, StepDone, Warned
from kivnun.model.load import load_base
from kivnun.train.data_parallel import DataParallelTrainee
from kivnun.train.engine import Trainee
from kivnun.train.loop import fit
from kivnun.train.passes import PassBudget, PassTooLarge, is_short_of_memory
from kivnun.train.processes import OneProcess
from kivnun.train.schedule import Schedule
from kivnun.train.weights import FullWeights
from runs import in_child
from tiny import CONFIGS, new_trainee, new_weights, random_rows, write_base

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
SHORTAGES: dict[str, Callable[[], Exception]] = {
    "cpu": lambda: RuntimeError(CPU),
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "kernels in C": lambda: MemoryError("attention: no memory for its scratch"),
}


class Short:
    """A trainee that runs out of memory in passes of more than `most` tokens, from a step on: it computes, and then fails."""

    def __init__(self, whole: Trainee, most: int, error: Callable[[], Exception], since: int = 1) -> None:
        self._whole, self._most, self._error, self._since = whole, most, error, since

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def forward_backward(self, batch: PackedBatch, total_weight: float) -> float:
        share = self._whole.forward_backward(batch, total_weight)
        if batch.num_tokens > self._most and self._whole.steps + 1 >= self._since:
            raise self._error()
        return share


class NoSaver:
    def after_step(self, step: int, epoch_ended: bool) -> None: ...

    def now(self, step: int, epoch_ended: bool) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), CONFIGS["phi3"]())


ROWS = random_rows([5, 9, 14, 3, 7, 11, 6, 8] * 2)
LONGEST = max(row.length for row in ROWS)


def trainee_of(folder: Path, kind: str = "lora", precision: str = "fp32") -> Trainee:
    base = load_base(folder, precision)  # type: ignore[arg-type]
    return new_trainee(base, FullWeights(base) if kind == "full" else new_weights(base, dropout=0.1))


def trained(trainee: Any, budget: PassBudget, rows: Sequence[TokenRow] = ROWS, steps: int = 4, batch_rows: int = 8) -> list[Event]:
    order = RowOrder(np.array([row.length for row in rows]), (len(rows),), None, batch_rows, None, None, steps, 3)
    told: list[Event] = []
    quiet: dict[str, Any] = {"evaluate": lambda step: None, "evaluate_every_steps": None, "stop_requested": lambda: False}
    fit(trainee, rows, order, Schedule(steps, 0.01, 0.0, "constant", 1.0, 1.0), budget, emit=told.append, saver=NoSaver(), **quiet)
    return told


def losses(events: Sequence[Event]) -> list[tuple[float, float, int]]:
    return [(event.loss, event.grad_norm, event.computed_tokens) for event in events if isinstance(event, StepDone)]


@pytest.mark.parametrize(
    ("said", "kind", "precision"),
    [*((said, "lora", "fp32") for said in SHORTAGES), ("cpu", "full", "fp32"), ("cpu", "full", "bf16")],
)
def test_a_step_that_ran_out_of_memory_is_that_of_a_run_with_shorter_passes(
    folder: Path, said: str, kind: str, precision: str
) -> None:
    short = trained(Short(trainee_of(folder, kind, precision), 39, SHORTAGES[said]), PassBudget(80))
    plain = trained(trainee_of(folder, kind, precision), PassBudget(40))
    assert losses(short) == losses(plain)
    assert [(e.step, e.micro_batch_tokens) for e in short if isinstance(e, PassesShortened)] == [(1, 40)]
    assert sum(isinstance(event, Warned) for event in short) == 1
    assert losses(trained(trainee_of(folder, kind, precision), PassBudget(80))) != losses(plain)  # else nothing was compared


def test_shorter_passes_hold_from_their_step_on_and_a_resumed_run_has_them_at_the_same_steps(folder: Path) -> None:
    short = trained(Short(trainee_of(folder), 39, SHORTAGES["cpu"], since=3), PassBudget(80))
    again = trained(trainee_of(folder), PassBudget.recorded(80, short))
    assert losses(again) == losses(short)
    assert losses(short)[:2] == losses(trained(trainee_of(folder), PassBudget(80)))[:2]
    assert not any(isinstance(event, PassesShortened) for event in again)


def test_a_budget_is_the_least_that_holds_at_a_step() -> None:
    budget = PassBudget(4096, [(7, 2048), (9, 1024), (3, 3000)])
    assert [budget.at(step) for step in (1, 3, 7, 8, 9, 100)] == [4096, 3000, 2048, 2048, 1024, 1024]


def test_passes_are_shortened_down_to_the_longest_row_and_then_refused(folder: Path) -> None:
    told: list[int] = []
    with pytest.raises(WontFitError, match=f"step 1, in a pass of {LONGEST} tokens, as many as the longest row has") as refused:
        trained(Short(trainee_of(folder), 1, SHORTAGES["cpu"]), _listened(PassBudget(80), told))
    assert told == [40, 20, LONGEST]
    assert "compute.activation_checkpointing" in str(refused.value)


def _listened(budget: PassBudget, told: list[int]) -> PassBudget:
    class Told(list[tuple[int, int]]):
        def append(self, entry: tuple[int, int]) -> None:
            told.append(entry[1])
            super().append(entry)

    budget.shortened = Told()
    return budget


def test_other_errors_are_no_shortage(folder: Path) -> None:
    assert not is_short_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_short_of_memory(WontFitError("said already"))
    with pytest.raises(RuntimeError, match="shapes"):
        trained(Short(trainee_of(folder), 1, lambda: RuntimeError("shapes cannot be multiplied")), PassBudget(80))


def test_an_update_without_memory_is_told(folder: Path) -> None:
    trainee = trainee_of(folder)

    class NoUpdate(Short):
        def optim_step(self, learning_rate: float) -> Any:
            raise RuntimeError(CPU)

    with pytest.raises(WontFitError, match="memory ran out in the update of step 1"):
        trained(NoUpdate(trainee, 1000, SHORTAGES["cpu"]), PassBudget(80))


class TwoProcesses(OneProcess):
    """As one of two: the other adds what it is told to."""

    def __init__(self, other: float) -> None:
        self._other = other

    def total(self, value: float) -> float:
        return value + self._other


def test_every_process_hears_of_one_that_ran_out_of_memory(folder: Path) -> None:
    whole = trainee_of(folder)
    batch = whole.packs_of(ROWS[:2], 100, False)[0][0]
    mine = DataParallelTrainee(Short(whole, 1, SHORTAGES["cpu"]), TwoProcesses(0.5))  # type: ignore[arg-type]
    other = DataParallelTrainee(whole, TwoProcesses(float("inf")))
    for trainee in (mine, other):
        with pytest.raises(PassTooLarge):
            trainee.forward_backward(batch, 1.0)
        trainee.discard_step()
    assert all(parameter.grad is None for parameter in whole.weights.parameters().values())


def _address_space() -> int:
    """Return the most bytes of address space that this process has had."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmPeak"))


def run_short_of_memory(folder: Path, place: Path) -> None:
    """Train a step in passes of two sizes, then in the larger ones with address space for the smaller ones; write what each found.

    For a process of its own: what other tests have freed would be taken again, whatever the limit.
    """
    rows = random_rows([480] * 64)

    def run(name: str, tokens: int, limit: int | None = None) -> dict[str, Any]:
        def work() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            events = trained(trainee_of(folder), PassBudget(tokens), rows, steps=1, batch_rows=64)
            shortened = [e.micro_batch_tokens for e in events if isinstance(e, PassesShortened)]
            found = {"losses": losses(events), "shortened": shortened, "peak": _address_space()}
            (place / name).write_text(json.dumps(found), encoding="utf-8")

        assert in_child(work) == 0
        return json.loads((place / name).read_text(encoding="utf-8"))

    run("first", 480)  # what is built and cached once takes memory once
    whole, half = run("whole", 32_000), run("half", 16_000)
    run("short", 32_000, (whole["peak"] + 3 * half["peak"]) // 4)


def test_memory_that_really_runs_out_shortens_passes(folder: Path, tmp_path: Path) -> None:
    tests = Path(__file__).parent
    command = "import sys; from pathlib import Path; import test_passes; test_passes.run_short_of_memory(*map(Path, sys.argv[1:]))"
    paths = os.pathsep.join(map(str, (tests, tests.parent, tests.parents[1])))
    given = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", command, str(folder), str(tmp_path)], env=given, check=True, timeout=200)
    whole, half, short = (json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("whole", "half", "short"))
    assert whole["peak"] > half["peak"] + 2**25
    assert short["shortened"] == [16_000]
    assert short["losses"] == half["losses"]
