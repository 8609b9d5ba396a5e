"""Choices and rules of runs in several processes. Next: `resolve.py`, which asks; `deepspeed_fields.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kivnun.spec.adapters import FullSpec
from kivnun.spec.compute import MultiProcessSpec
from kivnun.spec.deepspeed_fields import taken_over
from kivnun.spec.problems import Problem
from kivnun.spec.schedule import MuonSpec
from kivnun.spec.tune import TuneSpec

LEAST_ELEMENTS = 500_000
PERSISTENT_ELEMENTS = 10_000


def sharding_mismatches(spec: TuneSpec, device: str, precision: str, fields: Mapping[str, object] | None) -> Iterator[Problem]:
    """Yield what a run in several processes asks for that it cannot have on this device and in this precision."""
    compute = spec.compute
    if not isinstance(compute, MultiProcessSpec):
        return
    values, problems = taken_over(spec, fields) if fields is not None else ({}, [])
    yield from problems
    offload = values.get("compute.offload", compute.offload)
    if offload != "none" and device == "cpu":
        text = (
            f"compute.offload is {offload}, but the run computes on a CPU: state would be left where it is already, with a "
            "copy more (measured: 15 % more memory at stage 3)"
        )
        yield Problem("compute.offload", text, "leave it out: each further process takes a part of the state")
    if compute.zero_stage > 0 and isinstance(spec.schedule.optimizer, MuonSpec):
        text = (
            f"schedule.optimizer is muon, but compute.zero_stage is {compute.zero_stage}: Muon turns whole matrices, and a process "
            "holds parts of them"
        )
        yield Problem("schedule.optimizer", text, "choose adamw, or zero_stage 0")
    if compute.zero_stage == 1 and isinstance(spec.adapter, FullSpec) and precision == "bf16":
        text = (
            "adapter is full, base.precision bf16 and compute.zero_stage 1: there DeepSpeed keeps its float32 weights in another "
            "form, which is not read here"
        )
        yield Problem("compute.zero_stage", text, "choose zero_stage 2, which divides more, or 0")
    if compute.deepspeed is not None and compute.zero_stage == 0:
        yield Problem(
            "compute.deepspeed", "compute.deepspeed is given, but zero_stage 0 does without DeepSpeed", "leave one of them out"
        )


def sharding_choices(
    spec: TuneSpec, base_parameters: int, fields: Mapping[str, object] | None
) -> Iterator[tuple[str, object, str]]:
    """Yield (path, value, reason) of what several processes leave open, first of all what a DeepSpeed configuration says."""
    compute = spec.compute
    if not isinstance(compute, MultiProcessSpec):
        return
    taken = taken_over(spec, fields)[0] if fields is not None else {}
    for path, value in taken.items():
        yield path, value, f"as {compute.deepspeed.name if compute.deepspeed else 'the DeepSpeed configuration'} says"
    size = f"{base_parameters / 1e6:.1f} M parameters"
    bucket, group = max(LEAST_ELEMENTS, base_parameters // 50), max(LEAST_ELEMENTS, base_parameters // 20)
    sizes = (
        ("bucket_elements", compute.bucket_elements, bucket, f"the larger of half a million and a fiftieth of {size}"),
        ("sub_group_elements", compute.sub_group_elements, group, f"the larger of half a million and a twentieth of {size}"),
        ("live_elements", compute.live_elements, bucket, "as many as a bucket"),
        (
            "persistent_elements",
            compute.persistent_elements,
            PERSISTENT_ELEMENTS,
            "norms and the like: dearer to gather than to keep",
        ),
    )
    for name, given, value, reason in sizes:
        if given is None and f"compute.{name}" not in taken:
            yield f"compute.{name}", value, reason
