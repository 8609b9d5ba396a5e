"""What a resolved spec will take on its rows: steps, tokens, the largest pass, memory of one process by part, seconds by stage.

    order of rows -> steps and passes -> memory (`memory.py`) and time (`time.py`)

Next: `verdict.py`, which decides with it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import cast

from kivnun.data.order import RowOrder, order_of
from kivnun.plan.devices import Device
from kivnun.plan.memory import IDLE_BYTES, Shape, peak_bytes, process_memory, step_memory
from kivnun.plan.rows import RunRows
from kivnun.plan.sizes import Sizes
from kivnun.plan.time import (
    GPU_SHARE,
    IMPORT_S,
    Work,
    generation_seconds,
    gpu_seconds,
    operations,
    scoring_seconds,
    start_seconds,
    training_seconds,
    work_of,
)
from kivnun.spec import FullSpec, LoraSpec, MultiProcessSpec, TuneSpec

LOOKED_AT = 2000  # steps of the first epoch: enough to see the largest pass

# Tokens of the rows of evaluate/unrelated.jsonl, about: the built-in tokenizer makes 2,624 of 48. Scored twice. Of a user's own
# file it is not known before it is read.
UNRELATED = [55] * 48


@dataclass(frozen=True, slots=True)
class Here:
    """What was found out beside the spec: this machine with all its cores for one process beside one core of the reference's, bytes
    of the base's files (None: its numbers in 16 bits), bytes that the process holds already, rows included (None: not begun)."""

    speed: float = 1.0
    stored_bytes: float | None = None
    resident_bytes: float | None = None


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of a run: how many, tokens and trained tokens of all, tokens of the largest pass of one process, epochs that end
    before the last step, and what one process computes in all of them."""

    count: int
    tokens: int
    trained_tokens: int | None
    largest_pass: int
    epochs_ended: int
    work: Work


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes of one process by part at the moment when they are the most, and wall-clock seconds by stage from the moment on at
    which the rows are read."""

    parts: dict[str, float]
    stages: dict[str, float]

    @property
    def peak(self) -> float:
        return sum(self.parts.values())

    @property
    def seconds(self) -> float:
        """Return the seconds of all stages; NaN where what the device computes a second is not known."""
        return sum(self.stages.values())


def steps_of(spec: TuneSpec, rows: RunRows) -> Steps:
    """Return the steps that a resolved spec makes of these rows."""
    order = order_of(spec.schedule, spec.seed, rows.lengths, rows.sizes, rows.shares)
    processes = _processes(spec)
    first = [_part(lengths, processes) for lengths in itertools.islice(_first_epoch(order, rows), LOOKED_AT)]
    share = 1.0 if rows.trained_tokens is None else rows.trained_tokens / rows.tokens
    looked_at = work_of(first, cast(int, spec.compute.micro_batch_tokens), share)
    count = order.steps
    tokens = round(int(rows.lengths[order.epoch_rows(0)].sum()) * count / _steps_of_an_epoch(order))
    trained = None if rows.trained_tokens is None else round(share * tokens)
    times = count / len(first)
    work = replace(
        looked_at,
        tokens=round(looked_at.tokens * times),
        steps=count,
        passes=round(looked_at.num_passes * times),
        scored=round(looked_at.num_scored * times),
    )
    return Steps(count, tokens, trained, looked_at.pass_tokens, order.epoch_of(count), work)


def _processes(spec: TuneSpec) -> int:
    return spec.compute.processes if isinstance(spec.compute, MultiProcessSpec) else 1


def _first_epoch(order: RowOrder, rows: RunRows) -> Iterator[list[int]]:
    """Yield the lengths of the rows of each step of the first epoch."""
    for step in range(1, order.steps + 1):
        if order.epoch_of(step):
            return
        yield rows.lengths[order.rows_of(step)].tolist()


def _part(lengths: list[int], processes: int) -> list[int]:
    """Return about the rows of a step that the process with the most tokens gets, in their order where it gets all."""
    return lengths if processes == 1 else sorted(lengths, reverse=True)[::processes]


def _steps_of_an_epoch(order: RowOrder) -> int:
    """Return how many steps the first epoch has, also where the run ends within it."""
    if order.batch_rows is not None:
        return -(-len(order.epoch_rows(0)) // order.batch_rows)
    return next(step for step in itertools.count(1) if order.ends_epoch(step))


def forecast(spec: TuneSpec, sizes: Sizes, rows: RunRows, steps: Steps, device: Device, here: Here) -> Forecast:
    """Return what a resolved spec takes on a device."""
    shape = _shape(spec, steps, device)
    return Forecast(_parts(spec, sizes, shape, rows, here), _stages(spec, sizes, shape, rows, steps, device, here))


def _shape(spec: TuneSpec, steps: Steps, device: Device) -> Shape:
    compute = spec.compute
    return Shape(
        spec.base.precision,
        steps.largest_pass,
        device.kind,
        bool(compute.activation_checkpointing),
        _processes(spec),
        compute.zero_stage if isinstance(compute, MultiProcessSpec) else 0,
        bool(compute.packed_weights),
    )


def _parts(spec: TuneSpec, sizes: Sizes, shape: Shape, rows: RunRows, here: Here) -> dict[str, float]:
    # A process that has read its rows is looked at as it is; one that has not begun holds them beside what it is when idle.
    read = {} if here.resident_bytes is not None else {"rows": len(rows.lengths) + len(rows.held_out), "tokens": rows.all_tokens}
    idle = IDLE_BYTES if here.resident_bytes is None else here.resident_bytes
    process = process_memory(sizes, spec.adapter, shape, idle=idle, **read).rest
    parts = {"process": process, **asdict(step_memory(sizes, spec.adapter, shape))}
    # Reading the base may take more for a moment than training does.
    more = peak_bytes(sizes, spec.adapter, shape, idle=idle, **read) - sum(parts.values())
    parts["workspace"] += max(0.0, more)
    compute = spec.compute
    if isinstance(compute, MultiProcessSpec) and compute.offload != "none":  # to the machine's memory, from a GPU's
        parts["moments"] = 0.0
        parts["adapter"] = 0.0 if isinstance(spec.adapter, FullSpec) else parts["adapter"]
        parts["weights"] = 0.0 if compute.offload == "parameters" else parts["weights"]
    return parts


def _stages(
    spec: TuneSpec, sizes: Sizes, shape: Shape, rows: RunRows, steps: Steps, device: Device, here: Here
) -> dict[str, float]:
    speed, adapter = here.speed, spec.adapter
    loading = start_seconds(sizes, adapter, shape, stored_bytes=here.stored_bytes, speed=speed) - IMPORT_S / speed
    every = spec.evaluation.every_steps
    scorings = 2 + ((steps.count - 1) // every if every is not None else steps.epochs_ended)
    held_out = work_of([rows.held_out.tolist()], cast(int, spec.compute.micro_batch_tokens))
    replies = num_replies(spec, rows)
    if device.kind == "cuda":
        flops = math.nan if device.flops is None else GPU_SHARE[technique_of(spec)] * device.flops
        training = gpu_seconds(sizes, adapter, steps.work, flops)
        scoring = operations(sizes, LoraSpec()) / 2 * held_out.tokens / flops
        return {"loading": loading, "training": training, "scoring": scorings * scoring}
    training = training_seconds(sizes, adapter, shape, steps.work, speed=speed)
    scoring = scoring_seconds(sizes, adapter, shape, held_out, speed=speed) if held_out.tokens else 0.0
    probing = 0.0
    if held_out.tokens and spec.evaluation.forgetting == "builtin":
        probe = work_of([UNRELATED], cast(int, spec.compute.micro_batch_tokens))
        probing = 2 * scoring_seconds(sizes, adapter, shape, probe, speed=speed)
    told = 0.0
    if replies:
        prompts = rows.prompts[:replies].tolist()
        for new_tokens in _reply_tokens(spec, rows):
            told += generation_seconds(sizes, adapter, shape, prompts=prompts, new_tokens=new_tokens, speed=speed)
    return {"loading": loading, "training": training, "scoring": scorings * scoring + probing, "replies": told}


def num_replies(spec: TuneSpec, rows: RunRows) -> int:
    """Return how many held-out rows a model is asked to reply to, each time."""
    asked = [metric for metric in spec.evaluation.metrics if metric not in ("perplexity", "macro_f1")]
    return min(spec.evaluation.generate_rows if asked else spec.evaluation.samples, len(rows.prompts))


def _reply_tokens(spec: TuneSpec, rows: RunRows) -> Sequence[int]:
    """Return the tokens of a reply of the base, which may not know where to end, and of the tuned model, which ends as rows do."""
    most = spec.evaluation.max_new_tokens
    mean = (rows.held_out.sum() - rows.prompts.sum()) / len(rows.held_out)
    return most, max(1, min(most, round(float(mean))))


def technique_of(spec: TuneSpec) -> str:
    """Return a resolved spec's technique by its name in the measured table."""
    return "qlora" if spec.adapter.kind == "lora" and spec.base.precision in ("nf4", "int8") else spec.adapter.kind
