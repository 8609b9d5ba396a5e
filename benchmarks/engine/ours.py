"""Kivnun's side: one process that trains through the engine's verbs, as the command line does, and prints a line.

`python -m benchmarks.engine.ours JSON`. Given several cases it makes the first step of each, then the second of each, and so on, so
that they can be compared closely. The last line of stdout is a list with what each case came to (`meter.py` says what is in it).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engine.cases import Case, from_json
from benchmarks.engine.meter import Meter, print_runs
from benchmarks.engine.workload import Row, adapter_folder, draw_rows, model_folder
from kivnun.cli.process import keep_freed_memory


def main() -> None:
    cases, work = from_json(sys.argv[1])
    kept = keep_freed_memory()  # before the first large allocation, as the command line does
    import torch

    torch.set_num_threads(cases[0].threads)
    bases: dict[tuple[str, bool], Any] = {}
    sides = [opened(case, Path(work), bases) for case in cases]
    for number in range(cases[0].steps):
        for side in sides:
            if isinstance(side, Opened):
                step(side, number)
    facts: dict[str, object] = {"keeps_freed_memory": kept}
    print_runs(
        [
            side.meter.run(facts | {"linear_bytes": _linear_bytes(side.base)}) if isinstance(side, Opened) else {"failed": side}
            for side in sides
        ]
    )


@dataclass(slots=True)
class Opened:
    """A case that is ready to train: its trainee, and the items of each step."""

    case: Case
    base: Any
    trainee: Any
    steps: list[list[Any]]
    meter: Meter = field(default_factory=Meter)


def opened(case: Case, work: Path, bases: dict[tuple[str, bool], Any]) -> Opened | str:
    """Return the case made ready, or why it cannot run. Bases are shared by their precision and form."""
    from kivnun.model.adapter_folder import load_peft
    from kivnun.model.load import load_base
    from kivnun.spec.resolve import WEIGHT_BYTES
    from kivnun.train.engine import TorchEngine
    from kivnun.train.optim import AdamWSettings
    from kivnun.train.weights import AdapterWeights

    try:
        packed = case.packed and case.precision in WEIGHT_BYTES
        if (case.precision, packed) not in bases:
            bases[case.precision, packed] = load_base(model_folder(work, case.model), case.precision, packed=packed)
        base = bases[case.precision, packed]
        weights = AdapterWeights(base, load_peft(base, adapter_folder(work, case.model, case.variant)))
        steps = [_items(case, number) for number in range(case.steps)]
        objective = _objective(case, [item for items in steps for item in items])
        trainee = TorchEngine(base).open(weights, objective, AdamWSettings(0.9, 0.999, 1e-8, 0.0), case.max_grad_norm)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return Opened(case, base, trainee, steps)


def step(side: Opened, number: int) -> None:
    from kivnun.data.packing import micro_batches, pack

    case, trainee, items = side.case, side.trainee, side.steps[number]
    objective = trainee.objective
    side.meter.begin_step()
    total = sum(objective.weight_of(item) for item in items)
    loss = 0.0
    for part in micro_batches(items, _pass_tokens(side)):
        loss += trainee.forward_backward(pack(part), total)
    result = trainee.optim_step(case.learning_rate)
    side.meter.end_step(sum(item.length for item in items), loss, result.grad_norm)


def _pass_tokens(side: Opened) -> int:
    """Return the tokens of a pass that `kivnun tune` would choose: by the base's size and by the longest row of the data."""
    from kivnun.spec.resolve import CPU_MICRO_BATCH, CPU_MICRO_BATCH_FROM, MIN_MICRO_BATCH

    large = side.base.num_parameters >= CPU_MICRO_BATCH_FROM
    longest = max(item.length for items in side.steps for item in items)
    return max(CPU_MICRO_BATCH[side.case.precision] if large else MIN_MICRO_BATCH, longest)


def _items(case: Case, step: int) -> list[Any]:
    """Return the step's rows as the engine takes them: token rows, or for DPO each two neighbours as a preference pair."""
    from kivnun.data.rows import PreferencePair

    drawn = draw_rows((step + 1) * case.rows)
    rows = [_token_row(drawn[number], number) for number in range(step * case.rows, (step + 1) * case.rows)]
    if case.objective == "likelihood":
        return rows
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return [PreferencePair(chosen, rejected, chosen.row, chosen.where) for chosen, rejected in pairs]


def _token_row(row: Row, number: int) -> Any:
    import numpy as np

    from kivnun.data.rows import TokenRow, Where

    weights = np.asarray(row.supervised, dtype=np.float32)
    return TokenRow(np.asarray(row.ids, dtype=np.int32), weights, number, Where("bench", number + 1), 1)


def _objective(case: Case, items: Sequence[Any]) -> Any:
    from kivnun.train.objectives import DpoObjective, LikelihoodObjective

    if case.objective == "likelihood":
        return LikelihoodObjective()
    # The reference is scored once before a run, so it is no part of a step; any numbers of the right size do here.
    return DpoObjective(0.1, {pair.row: (-10.4 * pair.chosen.total_weight, -10.4 * pair.rejected.total_weight) for pair in items})


def _linear_bytes(base: Any) -> int:
    """Return the bytes that the linear layers hold, without head and embedding; packed ones count once, as they were stored."""
    from kivnun.model.products import PackedMatrix

    layers = [module for name, module in base.linears.items() if name != base.head_name]
    packed = [layer.matrix for layer in layers if isinstance(layer.matrix, PackedMatrix)]
    held = sum(t.numel() * t.element_size() for layer in layers for t in (*layer.parameters(), *layer.buffers()))
    return held + sum(matrix.shape.numel() * matrix.dtype.itemsize for matrix in packed)


if __name__ == "__main__":
    main()
