"""A DeepSpeed configuration, field by field: what each field means here, or why it is refused.

A field that says what an option of the spec says is taken over where the option was not given, and must agree where it was; `auto`,
as Hugging Face's files have it, leaves the choice to the spec. A field with one value here must have it. Others are refused.
`docs/guides/many-processes.md` shows the three tables. Next: `sharding.py`, which asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from kivnun.spec.problems import Problem
from kivnun.spec.section import Section, as_mapping
from kivnun.spec.tune import TuneSpec

Convert = Callable[[object], object]


def _number(value: object) -> object:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _count(value: object) -> object:
    """Return a whole number that JSON writes as 5e8."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _limit(value: object) -> object:
    return None if value == 0 else _number(value)


def _as_it_is(value: object) -> object:
    return value


@dataclass(frozen=True, slots=True)
class Taken:
    """A field that an option of the spec stands for."""

    option: str
    convert: Convert = _as_it_is


TAKEN: dict[str, Taken] = {
    "train_batch_size": Taken("schedule.batch_rows", _count),
    "gradient_clipping": Taken("schedule.max_grad_norm", _limit),
    "optimizer.params.lr": Taken("schedule.learning_rate", _number),
    "optimizer.params.eps": Taken("schedule.optimizer.eps", _number),
    "optimizer.params.weight_decay": Taken("schedule.optimizer.weight_decay", _number),
    "zero_optimization.stage": Taken("compute.zero_stage", _count),
    "zero_optimization.reduce_bucket_size": Taken("compute.bucket_elements", _count),
    "zero_optimization.allgather_bucket_size": Taken("compute.bucket_elements", _count),
    "zero_optimization.stage3_prefetch_bucket_size": Taken("compute.bucket_elements", _count),
    "zero_optimization.sub_group_size": Taken("compute.sub_group_elements", _count),
    "zero_optimization.stage3_max_live_parameters": Taken("compute.live_elements", _count),
    "zero_optimization.stage3_max_reuse_distance": Taken("compute.live_elements", _count),
    "zero_optimization.stage3_param_persistence_threshold": Taken("compute.persistent_elements", _count),
}

# Fields with one value here, which is allowed to be said, and why it is that one.
FIXED: dict[str, tuple[object, str]] = {
    "optimizer.type": ("AdamW", "the one rule whose state can be divided, with decay apart from the gradient"),
    "optimizer.params.adam_w_mode": (True, "AdamW decays weights, not gradients"),
    "optimizer.params.torch_adam": (True, "the update is torch's"),
    "zero_optimization.overlap_comm": (False, "a second set of buffers would be held"),
    "zero_optimization.contiguous_gradients": (True, "gradients would lie scattered"),
    "zero_optimization.reduce_scatter": (True, "each process needs its own part of a sum alone"),
    "zero_optimization.round_robin_gradients": (False, "not tested here"),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": (True, "results are always whole"),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (True, "results are always whole"),
    "zero_optimization.offload_optimizer.pin_memory": (True, "copies from pageable memory would wait"),
    "zero_optimization.offload_param.pin_memory": (True, "copies from pageable memory would wait"),
    "zero_allow_untested_optimizer": (True, "the rule is torch's, and is tested here"),
    "zero_force_ds_cpu_optimizer": (False, "torch's fused rule needs no compiler"),
    "fp16.enabled": (False, "there is no float16 here: choose base.precision bf16"),
    "wall_clock_breakdown": (False, "events.jsonl is the record"),
    "dump_state": (False, "events.jsonl is the record"),
    "memory_breakdown": (False, "events.jsonl is the record"),
}

# Sections and fields that are refused whatever they say but `auto`.
REFUSED: dict[str, str] = {
    "train_micro_batch_size_per_gpu": "a pass is bounded by its tokens: set compute.micro_batch_tokens",
    "gradient_accumulation_steps": "passes follow from compute.micro_batch_tokens and are summed exactly",
    "scheduler": "the learning rate follows schedule.decay and schedule.warmup_share",
    "fp16": "there is no float16 here: choose base.precision bf16",
    "amp": "there is no float16 here: choose base.precision bf16",
    "torch_autocast": "products are computed in base.precision",
    "data_types": "gradients are summed in float32",
    "communication_data_type": "gradients are summed in their own type",
    "prescale_gradients": "gradients are shares of a sum already",
    "gradient_predivide_factor": "gradients are shares of a sum already",
    "sparse_gradients": "gradients are dense",
    "activation_checkpointing": "set compute.activation_checkpointing",
    "steps_per_print": "events.jsonl is the record; DeepSpeed prints nothing here",
    "checkpoint": "checkpoints are Kivnun's own, whole, for any number of processes",
    "zero_optimization.offload_optimizer.nvme_path": "state is left in memory, not on a disk",
    "zero_optimization.offload_param.nvme_path": "weights are left in memory, not on a disk",
    "zero_optimization.zero_quantized_weights": "weights are gathered as they are",
    "zero_optimization.zero_quantized_gradients": "gradients are summed as they are",
    "zero_optimization.zero_hpz_partition_size": "one division over all processes is what is tested",
    "zero_optimization.mics_shard_size": "one division over all processes is what is tested",
    "aio": "state is left in memory, not on a disk",
    "flops_profiler": "events.jsonl is the record",
    "tensorboard": "events.jsonl is the record",
    "wandb": "events.jsonl is the record",
    "csv_monitor": "events.jsonl is the record",
    "comms_logger": "events.jsonl is the record",
    "autotuning": "sizes follow from the base",
    "elasticity": "a run goes on with another compute.processes by --resume",
    "pipeline": "layers are not divided among processes",
    "tensor_parallel": "layers are not divided among processes",
    "data_efficiency": "rows come in the order of the seed",
    "curriculum_learning": "rows come in the order of the seed",
    "compression_training": "use base.precision nf4 or int8 and an adapter",
}
DEVICES = {"optimizer": "zero_optimization.offload_optimizer.device", "parameters": "zero_optimization.offload_param.device"}


def taken_over(spec: TuneSpec, fields: Mapping[str, object]) -> tuple[dict[str, object], list[Problem]]:
    """Return the values that a DeepSpeed configuration gives to options left open, by path, and what is wrong with the rest."""
    given = {path: value for path, value in _leaves(fields) if value != "auto"}
    values: dict[str, object] = {}
    problems = [problem for path, value in _meant(given) for problem in _place(spec, values, path, value)]
    for path, value in given.items():
        problems += _judged(spec, path, value)
    return values, problems


def _meant(given: Mapping[str, object]) -> Iterator[tuple[tuple[str, str], object]]:
    """Yield ((field, option), value) of each field that stands for an option."""
    for path, value in given.items():
        if path in TAKEN:
            yield (path, TAKEN[path].option), TAKEN[path].convert(value)
    betas = given.get("optimizer.params.betas")
    if isinstance(betas, list) and len(cast("list[object]", betas)) == 2:
        for name, value in zip(("beta1", "beta2"), cast("list[object]", betas), strict=True):
            yield ("optimizer.params.betas", f"schedule.optimizer.{name}"), _number(value)
    devices = {offload: given.get(path) for offload, path in DEVICES.items()}
    if any(device is not None for device in devices.values()):
        left = [offload for offload, device in devices.items() if device == "cpu"]
        yield (DEVICES["parameters" if "parameters" in left else "optimizer"], "compute.offload"), (left or ["none"])[-1]
    enabled = given.get("bf16.enabled")
    if enabled is True:
        yield ("bf16.enabled", "base.precision"), "bf16"


def _place(spec: TuneSpec, values: dict[str, object], names: tuple[str, str], value: object) -> Iterator[Problem]:
    field, option = names
    found, was_given = _option(spec, option)
    if not was_given and option not in values:
        values[option] = value
        return
    expected = values.get(option, found)
    if expected != value:
        whose = "another field of the file" if option in values else option
        yield _problem(field, f"{value!r}, but {whose} says {expected!r}", "make them agree, or leave one out")


def _judged(spec: TuneSpec, path: str, value: object) -> Iterator[Problem]:
    """Yield what is wrong with a field that stands for no option."""
    known = {*TAKEN, *DEVICES.values(), "optimizer.params.betas", "bf16.enabled"}
    if path in DEVICES.values() and value not in ("cpu", "none"):
        yield _problem(path, f"{value!r}; allowed are cpu and none", "leave it out")
    elif path == "optimizer.params.betas" and not (isinstance(value, list) and len(cast("list[object]", value)) == 2):
        yield _problem(path, f"{value!r}; a list of two numbers is allowed", "leave it out")
    elif path == "bf16.enabled" and value is False and spec.base.precision == "bf16":
        yield _problem(path, "false, but base.precision says 'bf16'", "make them agree, or leave one out")
    elif path in FIXED:
        fixed, reason = FIXED[path]
        if value != fixed:
            yield _problem(path, f"{value!r}, where only {fixed!r} is allowed: {reason}", "leave it out")
    elif path not in known:
        parts = path.split(".")
        parents = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        reason = next((REFUSED[parent] for parent in parents if parent in REFUSED), None)
        yield _problem(path, f"{value!r}, which is refused: {reason or 'it is not known here'}", "leave it out")


def _option(spec: TuneSpec, option: str) -> tuple[object, bool]:
    """Return an option's value, and whether the spec gave it."""
    value: object = spec
    given = True
    for name in option.split("."):
        if not isinstance(value, Section) or name not in type(value).model_fields:
            return None, False
        given = given and name in value.model_fields_set
        value = cast("object", getattr(value, name))
    return value, given


def _leaves(fields: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in fields.items():
        inner = as_mapping(value)
        if inner is None:
            yield prefix + name, value
        else:
            yield from _leaves(inner, f"{prefix}{name}.")


def _problem(field: str, text: str, hint: str) -> Problem:
    return Problem("compute.deepspeed", f"compute.deepspeed: {field} is {text}", hint)
