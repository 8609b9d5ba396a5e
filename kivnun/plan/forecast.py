"""What a resolved spec will take on its rows: steps, tokens, the largest pass, memory of one process by part, seconds by stage.

    order of rows -> steps and passes -> memory (`memory.py`) and time (`time.py`)

Next: `plan.py`, which decides with it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import cast

from kivnun.data.order import RowOrder, order_of
from kivnun.plan.devices import Device
from kivnun.plan.measured import read_table
from kivnun.plan.memory import COMPUTE_BYTES, Shape, step_memory
from kivnun.plan.rows import RunRows
from kivnun.plan.sizes import Sizes
from kivnun.plan.time import AGAIN, CORE_FLOPS, GPU_SHARE, Work, cpu_seconds, gpu_seconds
from kivnun.spec import FullSpec, MultiProcessSpec, TuneSpec

LOOKED_AT = 2000  # steps of the first epoch: enough to see the largest pass
UNEVEN = 1.1  # the most tokens of a step that one process gets, over its part


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of a run: how many, tokens and trained tokens of all, tokens of the largest pass of one process and of the largest
    step, steps of the first epoch (all that were looked at), epochs that end before the last step."""

    count: int
    tokens: int
    trained_tokens: int | None
    largest_pass: int
    largest_step: int
    of_an_epoch: int
    epochs_ended: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes of one process by part at the moment when they are the most, and wall-clock seconds of the run by stage."""

    parts: dict[str, float]
    stages: dict[str, float]

    @property
    def peak(self) -> float:
        return sum(self.parts.values())

    @property
    def seconds(self) -> float:
        """Return the seconds of the whole run; NaN where what the device computes a second is not known."""
        return sum(self.stages.values())


def steps_of(spec: TuneSpec, rows: RunRows) -> Steps:
    """Return the steps that a resolved spec makes of these rows."""
    order = order_of(spec.schedule, spec.seed, rows.lengths, rows.sizes, rows.shares)
    processes = spec.compute.processes if isinstance(spec.compute, MultiProcessSpec) else 1
    budget, count = cast(int, spec.compute.micro_batch_tokens), order.steps
    largest_pass = largest_step = 0
    for lengths in itertools.islice(_first_epoch(order, rows), LOOKED_AT):
        step = sum(lengths)
        largest_step = max(largest_step, step)
        if processes > 1:
            its = min(budget, max(math.ceil(UNEVEN * step / processes), *lengths))
            largest_pass = max(largest_pass, its, *lengths)
        else:
            largest_pass = max(largest_pass, *_passes(lengths, budget))
    epoch = order.epoch_rows(0)
    of_an_epoch, tokens = _steps_of_an_epoch(order), int(rows.lengths[epoch].sum())
    tokens = round(tokens * count / of_an_epoch)
    trained = None if rows.trained_tokens is None else round(rows.trained_tokens / rows.tokens * tokens)
    return Steps(count, tokens, trained, largest_pass, largest_step, of_an_epoch, order.epoch_of(count))


def _first_epoch(order: RowOrder, rows: RunRows) -> Iterator[list[int]]:
    """Yield the lengths of the rows of each step of the first epoch."""
    for step in range(1, order.steps + 1):
        if order.epoch_of(step):
            return
        yield rows.lengths[order.rows_of(step)].tolist()


def _steps_of_an_epoch(order: RowOrder) -> int:
    """Return how many steps the first epoch has, also where the run ends within it."""
    if order.batch_rows is not None:
        return -(-len(order.epoch_rows(0)) // order.batch_rows)
    return next(step for step in itertools.count(1) if order.ends_epoch(step))


def _passes(lengths: Sequence[int], budget: int) -> list[int]:
    """Return the tokens of a step's passes, as `data/packing.py` cuts rows into them."""
    passes = [0]
    for length in lengths:
        if passes[-1] and passes[-1] + length > budget:
            passes.append(0)
        passes[-1] += length
    return passes


def forecast(spec: TuneSpec, sizes: Sizes, rows: RunRows, steps: Steps, device: Device, speed: float) -> Forecast:
    """Return what a resolved spec takes. `speed` is this machine beside one core of the reference's (`time.machine_speed`)."""
    return Forecast(_parts(spec, sizes, steps, device), _stages(spec, sizes, rows, steps, device, speed))


def _parts(spec: TuneSpec, sizes: Sizes, steps: Steps, device: Device) -> dict[str, float]:
    compute, precision = spec.compute, spec.base.precision
    many = compute if isinstance(compute, MultiProcessSpec) else None
    shape = Shape(
        precision,
        steps.largest_pass,
        device.kind,
        bool(compute.activation_checkpointing),
        many.processes if many else 1,
        many.zero_stage if many else 0,
    )
    parts = {"process": process_bytes(device), **asdict(step_memory(sizes, spec.adapter, shape))}
    if compute.packed_weights:  # each matrix twice, for its two products, in place of once
        parts["weights"] += COMPUTE_BYTES[precision] * (sizes.linear_numbers + sizes.vocab * sizes.hidden)
    if many and many.offload != "none":
        parts["moments"] = 0.0
        if isinstance(spec.adapter, FullSpec):
            parts["adapter"] = 0.0  # the float32 weights that the optimizer updates
    if many and many.offload == "parameters":
        parts["weights"] = 0.0
    return parts


def _stages(spec: TuneSpec, sizes: Sizes, rows: RunRows, steps: Steps, device: Device, speed: float) -> dict[str, float]:
    work = Work(steps.tokens, steps.count, steps.largest_pass)
    technique = technique_of(spec)
    processes = spec.compute.processes if isinstance(spec.compute, MultiProcessSpec) else 1
    if device.kind == "cuda":
        share = math.nan if device.flops is None else GPU_SHARE[technique] * device.flops * processes
        training = gpu_seconds(sizes, spec.adapter, work, share)
    else:
        slower = read_table().slower.get(technique, 1.0)
        training = cpu_seconds(sizes, spec.adapter, spec.base.precision, work, slower=slower, speed=speed)
        training /= device.count  # processes of one machine share its cores
    training *= AGAIN if spec.compute.activation_checkpointing else 1.0
    return {"training": training, **_scoring(spec, sizes, rows, steps, device, speed)}


def _scoring(spec: TuneSpec, sizes: Sizes, rows: RunRows, steps: Steps, device: Device, speed: float) -> dict[str, float]:
    """Return the seconds of scoring held-out rows, before, during and after training."""
    if not len(rows.held_out):
        return {"scoring": 0.0}
    every = spec.evaluation.every_steps
    times = 2 + ((steps.count - 1) // every if every is not None else steps.epochs_ended)
    matrices = sizes.linear_numbers + sizes.vocab * sizes.hidden
    tokens = times * int(rows.held_out.sum())
    if device.kind == "cuda":
        return {"scoring": math.nan if device.flops is None else 2.0 * matrices * tokens / (GPU_SHARE["lora"] * device.flops)}
    return {"scoring": 2.0 * matrices * tokens / CORE_FLOPS[COMPUTE_BYTES[spec.base.precision]] / speed}


def technique_of(spec: TuneSpec) -> str:
    """Return a resolved spec's technique by its name in the measured table."""
    return "qlora" if spec.adapter.kind == "lora" and spec.base.precision in ("nf4", "int8") else spec.adapter.kind


def process_bytes(device: Device) -> float:
    """Return what a process holds before it holds a base: libraries and the interpreter. A GPU's figures leave it out."""
    return 0.0 if device.kind == "cuda" else 400e6
