"""What a run is made of, each made from its spec: facts, engine, weights, objective, order of rows, schedule.

`pipeline.py` names the stages in their order and calls these; other doors that need one part (the matrix, a plan) call the same.
Next: `train/engine.py`, `spec/resolve.py`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import resource
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch

from kivnun.data.loader import Dataset
from kivnun.data.order import RowOrder, order_of
from kivnun.data.rows import PreferencePair
from kivnun.errors import SpecError
from kivnun.lineage import start_of
from kivnun.model.families import count_parameters, longest_row, read_config, stored_precision, weight_files
from kivnun.model.kernels import native_or_reason, triton_or_reason
from kivnun.model.load import Base
from kivnun.model.read_model import open_config
from kivnun.model.rope import rows_turn_from
from kivnun.model.speed import products_per_second
from kivnun.plan.devices import CONTEXT_BYTES, Device, known_flops, this_machine
from kivnun.plan.forecast import Here
from kivnun.plan.memory import COMPUTE_BYTES
from kivnun.plan.plan import make_plan, sizes_or_reason
from kivnun.plan.rows import rows_of
from kivnun.plan.time import REFERENCE_FLOPS
from kivnun.plan.verdict import Plan, Question
from kivnun.run_folder import RunFolder, read_json_file
from kivnun.spec import (
    AdapterSpec,
    ComputeSpec,
    DpoSpec,
    FullSpec,
    MultiProcessSpec,
    MuonSpec,
    OptimizerSpec,
    ResolveFacts,
    TuneSpec,
    resolve,
)
from kivnun.spec.adapters import LowRank, dropout_of
from kivnun.spec.resolve import MIN_MICRO_BATCH
from kivnun.spec.tune import OBJECTIVE_OF_FORMAT
from kivnun.train.continued import open_start, stored_start
from kivnun.train.data_parallel import DataParallelEngine
from kivnun.train.deepspeed_settings import ShardSettings
from kivnun.train.engine import Engine, TorchEngine
from kivnun.train.loop import shareable
from kivnun.train.new_weights import new_weights
from kivnun.train.objectives import DpoObjective, LikelihoodObjective, Objective
from kivnun.train.optim import AdamWSettings, MuonSettings
from kivnun.train.processes import Processes
from kivnun.train.reference import reference_sums
from kivnun.train.schedule import Schedule
from kivnun.train.weights import LiveWeights, Weights

SPEED_SECONDS = 0.1  # of products, from which a run's seconds are foretold


def resolve_facts(
    dataset: Dataset,
    base_folder: Path,
    compute: ComputeSpec | None = None,
    folder: RunFolder | None = None,
    adapter: AdapterSpec | None = None,
) -> ResolveFacts:
    """Return what is known of data, base and machine, of the folder's run where it was begun already, and of the adapter that a
    spec's `adapter` starts from. Raises SpecError where `compute` needs an extra that is not installed."""
    refuse_missing_deepspeed(compute)
    native = native_or_reason()
    return ResolveFacts(
        objective_kind=OBJECTIVE_OF_FORMAT[dataset.format],  # type: ignore[arg-type]
        max_seq_len=longest_row(base_folder),
        longest_row=dataset.report.longest_row,
        base_parameters=count_parameters(base_folder),
        device="cuda" if torch.cuda.is_available() else "cpu",
        threads=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        data_format=dataset.format,  # type: ignore[arg-type]
        stored_precision=stored_precision(base_folder),
        no_native_reason=_reason(native),
        packs=frozenset() if isinstance(native, str) else native.packs(),
        rows_turn_from=_rows_turn_from(dataset, base_folder),
        no_triton_reason=_reason(triton_or_reason()) if torch.cuda.is_available() else "there is no CUDA device",
        local_processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if isinstance(compute, MultiProcessSpec) else 1,
        threads_before=None if compute is None or folder is None else folder.threads_in_another_shape(compute),
        deepspeed=read_json_file(compute.deepspeed) if isinstance(compute, MultiProcessSpec) and compute.deepspeed else None,
        passes=None if folder is None else folder.passes_before(),
        start=None if adapter is None else stored_start(adapter, base_folder),
    )


def plan_run(spec: TuneSpec, dataset: Dataset, base_folder: Path, facts: ResolveFacts, processes: Processes) -> Plan:
    """Return the plan of a run that is about to begin, the same in each of its processes. Nothing of the base is loaded."""
    sizes, unknown = sizes_or_reason(read_config(base_folder), spec.base.model)
    kind = facts.device if spec.compute.device == "auto" else spec.compute.device
    machines = max(1, processes.count // facts.local_processes)
    if kind == "cuda":
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        memory, flops = min(processes.all_of(float(found.total_memory))), known_flops(found.name)
        device = Device(found.name, "cuda", memory - CONTEXT_BYTES, 0, flops, processes.count)
    else:
        here = this_machine(machines)
        device = replace(here, memory_bytes=min(processes.all_of(here.memory_bytes)))
    usual, _ = resolve(spec, facts)
    speed = 1.0
    if kind == "cpu" and sizes is not None:
        speed = processes.from_first(lambda: _speed(usual.base.precision, cast(int, usual.compute.threads)))
    turns = rows_turn_from(open_config(base_folder))
    stored = float(sum(file.stat().st_size for file in weight_files(base_folder)))
    resident = max(processes.all_of(_resident_bytes()))
    return make_plan(Question(spec, facts, rows_of(dataset), device, sizes, unknown, turns, Here(speed, stored, resident)))


def _resident_bytes() -> float:
    """Return what this process holds in memory now."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return float(pages) * os.sysconf("SC_PAGE_SIZE")


@functools.cache
def _speed(precision: str, threads: int) -> float:
    """Return how fast this process is beside one core of the reference machine, by a short product."""
    torch.set_num_threads(threads)
    number = COMPUTE_BYTES[precision]
    return products_per_second({2: "bf16", 4: "fp32"}[number], seconds=SPEED_SECONDS) / REFERENCE_FLOPS[number]


def refuse_missing_deepspeed(compute: ComputeSpec | None) -> None:
    """Raise SpecError where state is to be divided and DeepSpeed, an extra, is not installed."""
    if isinstance(compute, MultiProcessSpec) and compute.zero_stage > 0 and find_spec("deepspeed") is None:
        raise SpecError(
            f"compute.zero_stage is {compute.zero_stage}, which needs DeepSpeed, and it is not installed",
            hint="pip install 'kivnun[deepspeed]', or set compute.zero_stage to 0, which divides the rows alone",
        )


def open_engine(spec: TuneSpec, base: Base, processes: Processes) -> Engine:
    """Return the engine that the spec's compute asks for."""
    compute = spec.compute
    if not isinstance(compute, MultiProcessSpec):
        return TorchEngine(base)
    if compute.zero_stage == 0:
        return DataParallelEngine(base, processes)
    from kivnun.train.deepspeed_engine import DeepSpeedEngine  # an extra: imported where it is asked for

    sizes = (compute.bucket_elements, compute.sub_group_elements, compute.live_elements, compute.persistent_elements)
    settings = ShardSettings(compute.zero_stage, compute.offload, *cast(tuple[int, int, int, int], sizes))
    return DeepSpeedEngine(base, settings, processes)


def _rows_turn_from(dataset: Dataset, base_folder: Path) -> int | None:
    length = rows_turn_from(open_config(base_folder))
    return length if length is not None and dataset.train.rows.longest_side > length else None


def _reason(found: object) -> str | None:
    return found if isinstance(found, str) else None


def row_order(spec: TuneSpec, dataset: Dataset) -> RowOrder:
    """Return the order of training that the spec and the data give."""
    sources = dataset.train
    return order_of(spec.schedule, spec.seed, sources.lengths, sources.sizes, sources.shares)


def spared_tokens(spec: TuneSpec, base: Base, dataset: Dataset) -> float:
    """Return which part of the tokens `compute.share_prefixes` would spare where it is off and may be turned on, else 0."""
    rows = dataset.train.rows
    turns = base.rotary is not None and base.rotary.turns_by_length(rows.longest_side)
    if spec.compute.share_prefixes or turns or dropout_of(spec.adapter):
        return 0.0
    tokens = max(cast(int, spec.compute.micro_batch_tokens), MIN_MICRO_BATCH)  # which a run that shares would take
    return shareable(rows, row_order(spec, dataset), tokens)


def schedule_of(spec: TuneSpec, steps: int) -> Schedule:
    given = spec.schedule
    return Schedule(
        steps, cast(float, given.learning_rate), given.warmup_share, given.decay, given.decay_start_share, given.final_share
    )


def optimizer_settings(spec: OptimizerSpec) -> AdamWSettings | MuonSettings:
    adamw = AdamWSettings(spec.beta1, spec.beta2, spec.eps, spec.weight_decay)
    if isinstance(spec, MuonSpec):
        return MuonSettings(spec.momentum, spec.weight_decay, spec.adamw_share, adamw)
    return adamw


def open_weights(spec: TuneSpec, base: Base, dataset: Dataset) -> Weights:
    """Return what the spec trains, at its start."""
    compute = spec.compute
    if isinstance(spec.adapter, FullSpec) and isinstance(compute, MultiProcessSpec) and compute.zero_stage > 0:
        return LiveWeights(base)
    return new_weights(spec.adapter, base, dataset.train.rows, row_order(spec, dataset).steps, spec.seed)


def open_objective(spec: TuneSpec, engine: TorchEngine, dataset: Dataset, cache: Path, *, writes: bool = True) -> Objective:
    """Return the loss the spec asks for. DPO's reference is what training starts from (the base as it is now, with the adapter
    that it goes on with), computed once and kept in `cache`."""
    if not isinstance(spec.objective, DpoSpec):
        return LikelihoodObjective()
    pairs = cast(Sequence[PreferencePair], dataset.train.rows)
    of = f"{engine.base.content_hash} {dataset.content_hash} {engine.base.dtype} {spec.compute.share_prefixes}"
    reference, start = engine.base_model(), start_of(spec.adapter)
    if start is not None:
        assert isinstance(spec.adapter, LowRank)
        of += f" {start.content_hash}"
        reference = engine.with_adapter(open_start(spec.adapter, engine.base, spec.seed))
    key = hashlib.sha256(of.encode()).hexdigest()
    return DpoObjective(spec.objective.beta, reference_sums(reference, pairs, key, cache, spec.compute, writes))


def peak_memory(device: str) -> int:
    """Return the most memory this process held: resident on a CPU, allocated on a GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
