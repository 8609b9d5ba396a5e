"""What one process of a ZeRO test does, under torchrun: `python -m torch.distributed.run ... tests/zero_worker.py FOLDER`.

FOLDER holds a base and cases.json; for each case the first process writes what it saw, and files of its trainee."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from kivnun.data.rows import TokenRow
from kivnun.model.generate import SamplingParams
from kivnun.model.load import Base, load_base
from kivnun.train.deepspeed_engine import DeepSpeedEngine, DeepSpeedTrainee
from kivnun.train.deepspeed_settings import ShardSettings
from kivnun.train.engine import Trainee
from kivnun.train.objectives import LikelihoodObjective
from kivnun.train.optim import AdamWSettings
from kivnun.train.processes import ProcessGroup, joined
from kivnun.train.weights import FullWeights, Weights
from tiny import new_weights, random_ids, random_rows

ADAMW = AdamWSettings(beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
# Trained tokens of each row of a step: uneven, and in the third step fewer rows than processes.
STEPS = [[9, 3, 14, 5, 2, 7], [4, 4, 21, 1, 6, 2, 2], [11], [8, 3, 5, 13]]
BUDGET = 30
RATE = 0.01


def rows_of_step(step: int) -> list[TokenRow]:
    return random_rows(STEPS[step - 1], prompt=2 + step)


def weights_of(base: Base, kind: str) -> Weights:
    if kind == "full":
        return FullWeights(base)
    return new_weights(base, kind, dropout=0.2 if kind == "lora" else 0.0)  # type: ignore[arg-type]


def train(trainee: Trainee | DeepSpeedTrainee, first: int, last: int) -> list[dict[str, float]]:
    """Run steps and return what each one was."""
    seen = []
    for step in range(first, last + 1):
        rows = rows_of_step(step)
        packs, tokens = trainee.packs_of(rows, BUDGET, False)
        total = sum(row.total_weight for row in rows)
        loss = sum(trainee.forward_backward(pack, total) for pack in packs)
        result = trainee.optim_step(RATE)
        seen.append(
            {"loss": loss, "grad_norm": result.grad_norm, "clip": result.clip_factor, "packs": len(packs), "tokens": tokens}
        )
    return seen


def score(trainee: Any) -> list[float]:
    packs, _ = Trainee.packs_of(trainee, rows_of_step(2), BUDGET, False)
    return [float(value) for pack in packs for value in trainee.forward(pack)]


def run_case(folder: Path, case: dict[str, Any], processes: ProcessGroup) -> None:
    settings = ShardSettings(case["stage"], bucket_elements=3000, sub_group_elements=4000, live_elements=1, persistent_elements=1)
    place = folder / case["name"]

    def opened() -> DeepSpeedTrainee:
        base = load_base(folder / case.get("base", "base"), case["precision"], recompute=case.get("recompute", False))
        weights = weights_of(base, case["kind"])
        engine = DeepSpeedEngine(base, settings, processes)
        return engine.open(weights, LikelihoodObjective(), ADAMW, case.get("clip", 1.0))

    trainee = opened()
    seen: dict[str, Any] = {"before": score(trainee)}
    if "resume" in case:
        trainee.load(folder / case["resume"])
    half = trainee.steps or 2
    seen["steps"] = train(trainee, trainee.steps + 1, half) if not trainee.steps else []
    if processes.rank == 0:
        (place / "half").mkdir(parents=True)
        (place / "end").mkdir()
        (place / "export").mkdir()
    processes.any(False)
    trainee.save(place / "half")
    seen["steps"] += train(trainee, trainee.steps + 1, len(STEPS))
    seen["after"] = score(trainee)
    seen["sampled"] = trainee.sample([random_ids(5, 1), random_ids(3, 2)], SamplingParams(4, ()))
    trainee.save(place / "end")
    trainee.export(place / "export", "base")
    seen["live"] = float(sum(p.detach().double().sum() for p in trainee.weights.parameters().values()))
    if "again" in case:
        second = opened()
        second.load(place / "half")
        seen["again"] = train(second, 3, len(STEPS))
        if processes.rank == 0:
            (place / "again").mkdir()
        processes.any(False)
        second.save(place / "again")
        seen["again_after"] = score(second)
    if processes.rank == 0:
        (place / "seen.json").write_text(json.dumps(seen))


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    with joined("cpu", int(os.environ["WORLD_SIZE"])) as processes:
        for case in json.loads((folder / "cases.json").read_text()):
            run_case(folder, case, processes)


if __name__ == "__main__":
    main()
