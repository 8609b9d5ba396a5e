"""What one process of a ZeRO test does, under torchrun: `zero_worker.py FOLDER [DEVICE]`.

FOLDER holds bases and cases.json; for each case the first process writes what it saw, and the files of its trainee."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kivnun.data.rows import TokenRow
from kivnun.errors import NonFiniteLossError
from kivnun.model.generate import SamplingParams
from kivnun.model.load import Base, load_base
from kivnun.train.data_parallel import DataParallelEngine
from kivnun.train.deepspeed_settings import ShardSettings
from kivnun.train.engine import TorchEngine, Trainee
from kivnun.train.objectives import LikelihoodObjective
from kivnun.train.optim import AdamWSettings
from kivnun.train.processes import OneProcess, Processes, joined
from kivnun.train.weights import FullWeights, LiveWeights, Weights
from tiny import VOCAB, new_weights, random_ids, random_rows, token_row

ADAMW = AdamWSettings(beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
# Trained tokens of each row of a step: uneven, and in the third step fewer rows than processes.
STEPS = [[9, 3, 14, 5, 2, 7], [4, 4, 21, 1, 6, 2, 2], [11], [8, 3, 5, 13]]
HALF = 2
BUDGET = 30
RATE = 0.01
CLIP = 6.9  # of some steps, not of others

Case = dict[str, Any]


def rows_of_step(step: int) -> list[TokenRow]:
    return random_rows(STEPS[step - 1], prompt=2 + step)


def weights_of(base: Base, case: Case) -> Weights:
    if case["kind"] == "full":
        return LiveWeights(base) if case.get("stage") else FullWeights(base)
    return new_weights(base, case["kind"], dropout=case.get("dropout", 0.0))


def opened(folder: Path, case: Case, processes: Processes) -> Any:
    """Return the case's trainee: one process's own without a stage."""
    base = load_base(folder / case["base"], case["precision"], case.get("device", "cpu"), recompute=case.get("recompute", False))
    settings = ShardSettings(case.get("stage") or 0, case.get("offload", "none"), 3000, 4000, 1, 1)
    if "stage" not in case:
        engine: Any = TorchEngine(base)
    elif case["stage"] == 0:
        engine = DataParallelEngine(base, processes)
    else:
        from kivnun.train.deepspeed_engine import DeepSpeedEngine

        engine = DeepSpeedEngine(base, settings, processes)
    return engine.open(weights_of(base, case), LikelihoodObjective(), ADAMW, CLIP)


def train(trainee: Any, last: int) -> list[dict[str, float]]:
    """Run steps and return what each one was."""
    seen: list[dict[str, float]] = []
    for step in range(trainee.steps + 1, last + 1):
        rows = rows_of_step(step)
        packs, tokens = trainee.packs_of(rows, BUDGET, False)
        total = sum(row.total_weight for row in rows)
        loss = sum(trainee.forward_backward(pack, total) for pack in packs)
        result = trainee.optim_step(RATE)
        seen.append({"loss": loss, "norm": result.grad_norm, "clip": result.clip_factor, "packs": len(packs), "tokens": tokens})
    return seen


def score(trainee: Any) -> list[float]:
    packs, _ = Trainee.packs_of(trainee, rows_of_step(2), BUDGET, False)
    return [float(value) for pack in packs for value in trainee.forward(pack)]


def sample(trainee: Any) -> list[list[int]]:
    return trainee.sample([random_ids(5, 1), random_ids(3, 2)], SamplingParams(4, ()))


def saved(trainee: Any, place: Path, processes: Processes) -> Path:
    processes.from_first(lambda: place.mkdir(parents=True))
    trainee.save(place)
    return place


def run_case(folder: Path, case: Case, processes: Processes) -> Case:
    """Train to the half, save, go on, save and export; with `resume` begin from that checkpoint instead; with `again` go on from
    the half a second time, with a trainee made anew."""
    place = folder / case["name"]
    trainee = opened(folder, case, processes)
    seen: Case = {"before": score(trainee), "trained": trainee.trainable_parameters}
    if "resume" in case:
        trainee.load(folder / case["resume"])
    else:
        seen["first"] = train(trainee, HALF)
        saved(trainee, place / "half", processes)
    seen["rest"] = train(trainee, len(STEPS))
    seen["after"], seen["sampled"] = score(trainee), sample(trainee)
    saved(trainee, place / "end", processes)
    processes.from_first(lambda: (place / "export").mkdir())
    trainee.export(place / "export", "base")
    if "again" in case:
        second = opened(folder, case, processes)
        second.load(place / "half")
        seen["again"], seen["again_after"] = train(second, len(STEPS)), score(second)
        saved(second, place / "again", processes)
    return seen


def run_cases(folder: Path, processes: Processes) -> None:
    for case in json.loads((folder / "cases.json").read_text()):
        seen = run_case(folder, case, processes)
        if processes.rank == 0:
            (folder / case["name"] / "seen.json").write_text(json.dumps(seen))


def _step(trainee: Any, rows: list[TokenRow], total_weight: float) -> None:
    for batch in trainee.packs_of(rows, BUDGET, False)[0]:
        trainee.forward_backward(batch, total_weight)
    trainee.optim_step(RATE)


def run_broken(folder: Path, processes: Processes) -> Case:
    """Meet a loss and then a gradient that is not finite in one process alone; return what is raised."""
    it = {"base": "broken", "kind": "lora", "stage": 3, "precision": "fp32"}
    trainee = opened(folder, it, processes)
    before = score(trainee)
    seen: Case = {}
    odd, plain = (token_row([5, 6, 7, last, 8], row, 4) for row, last in ((0, VOCAB - 1), (1, 9)))
    with pytest.raises(NonFiniteLossError) as raised:
        _step(trainee, [odd, plain], 8.0)
    seen["loss"] = raised.value.message
    trainee = opened(folder, it, processes)
    if processes.rank == 1:
        next(iter(trainee.weights.parameters().values())).register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteLossError) as raised:
        _step(trainee, [plain, plain], 8.0)
    seen["gradient"] = raised.value.message
    seen["unchanged"] = score(trainee) == before
    return seen


def in_one_process(folder: Path, case: Case) -> Case:
    """Return what the case is in one process: the measure of all others."""
    return run_case(
        folder,
        {**{k: v for k, v in case.items() if k not in ("stage", "again", "offload")}, "name": f"one_{case['name']}"},
        OneProcess(),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined(sys.argv[2] if len(sys.argv) > 2 else "cpu", int(os.environ["WORLD_SIZE"])) as together:
        run_cases(Path(sys.argv[1]), together)
        broken = together.all_of(run_broken(Path(sys.argv[1]), together)) if Path(sys.argv[1], "broken").is_dir() else []
        if together.rank == 0:
            Path(sys.argv[1], "broken.json").write_text(json.dumps(broken))
