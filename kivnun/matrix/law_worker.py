"""One process of a case, under torchrun: `python -m kivnun.matrix.law_worker MODEL_FOLDER CASE_JSON OUT`.

Memory is anonymous: what a process has to itself, without the files that it maps."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from kivnun.matrix.law_cases import MODELS, STEPS, TOKENS, Case


def main() -> None:
    folder, case, out = Path(sys.argv[1]), Case(**json.loads(sys.argv[2])), Path(sys.argv[3])
    import torch

    from kivnun.train.processes import joined

    torch.set_num_threads(1)
    with joined("cpu", case.processes) as processes:
        if case.zero_stage:
            import deepspeed  # noqa: F401  # its code is in the baseline
        measured = _measure(folder, case, processes)
        everyone = processes.all_of(measured)
    if int(os.environ["RANK"]) == 0:
        out.write_text(json.dumps({"processes": everyone}))


def _measure(folder: Path, case: Case, processes: object) -> dict[str, object]:
    import numpy as np

    from kivnun.data.rows import TokenRow, Where
    from kivnun.model.load import load_base
    from kivnun.train.objectives import LikelihoodObjective
    from kivnun.train.optim import AdamWSettings

    model = MODELS[case.model]
    draws = np.random.default_rng(0)
    rows = []
    for number in range(case.processes):
        weights = np.ones(TOKENS, dtype=np.float32)
        weights[0] = 0
        ids = draws.integers(3, model.vocab, TOKENS).astype(np.int32)
        rows.append(TokenRow(ids, weights, number, Where("rows", number + 1), 1))
    baseline = _anonymous("RssAnon")
    _reset_peak()
    base = load_base(folder, case.precision)
    trainee = _opened(base, case, processes, LikelihoodObjective(), AdamWSettings(0.9, 0.999, 1e-8, 0.0))
    start = _peak() - baseline
    opened = _anonymous("RssAnon") - baseline
    _reset_peak()
    losses, seconds = [], []
    for _ in range(STEPS):
        began = time.perf_counter()
        packs, _ = trainee.packs_of(rows, TOKENS, False)
        losses.append(sum(trainee.forward_backward(pack, case.processes * (TOKENS - 1.0)) for pack in packs))
        trainee.optim_step(1e-4)
        seconds.append(time.perf_counter() - began)
    return {
        "baseline": baseline,
        "start": start,
        "opened": opened,
        "peak": _peak() - baseline,
        "end": _anonymous("RssAnon") - baseline,
        "losses": losses,
        "seconds": seconds,
        "trained": trainee.trainable_parameters,
    }


def _opened(base, case: Case, processes, objective, optimizer):  # types are torch's, which is imported inside
    from kivnun.model.adapters import AdapterShape, new_adapter, resolve_targets
    from kivnun.spec.sharding import LEAST_ELEMENTS, PERSISTENT_ELEMENTS
    from kivnun.train.data_parallel import DataParallelEngine
    from kivnun.train.deepspeed_settings import ShardSettings
    from kivnun.train.weights import AdapterWeights, FullWeights, LiveWeights

    if case.kind == "full":
        weights = LiveWeights(base) if case.zero_stage else FullWeights(base)
    else:
        shape = AdapterShape(case.kind, 8, 16.0, 0.0, False, resolve_targets(base, "all-linear"))
        weights = AdapterWeights(base, new_adapter(base, shape, "kaiming", 0))
    if case.zero_stage == 0:
        return DataParallelEngine(base, processes).open(weights, objective, optimizer, 1.0)
    from kivnun.train.deepspeed_engine import DeepSpeedEngine

    size = MODELS[case.model].parameters
    bucket = max(LEAST_ELEMENTS, size // 50)
    settings = ShardSettings(case.zero_stage, case.offload, bucket, max(LEAST_ELEMENTS, size // 20), bucket, PERSISTENT_ELEMENTS)
    return DeepSpeedEngine(base, settings, processes).open(weights, objective, optimizer, 1.0)


def _status() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.endswith(" kB"))
    return {name.rstrip(":"): int(size) * 1024 for name, size, _ in lines}


def _anonymous(name: str) -> int:
    return _status()[name]


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident size


def _peak() -> int:
    """Return the most anonymous memory since the reset: the peak of all, less the files' pages, which come and do not go."""
    status = _status()
    return status["VmHWM"] - status["RssFile"] - status["RssShmem"]


if __name__ == "__main__":
    main()
