"""What DeepSpeed is told: its configuration, out of the options of compute. Nothing here imports it.

Next: `deepspeed_engine.py`, `spec/compute.py` (the options and how their sizes follow from the base's).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ShardSettings:
    """How state is divided among processes. Sizes are in elements; `docs/concepts/zero.md` says what each one costs."""

    zero_stage: int
    offload: str = "none"
    bucket_elements: int = 500_000
    sub_group_elements: int = 500_000
    live_elements: int = 500_000
    persistent_elements: int = 10_000


def deepspeed_config(settings: ShardSettings, max_grad_norm: float | None, *, widest_vector: int, masters: bool) -> dict[str, Any]:
    """Return DeepSpeed's configuration. `masters`: the weights are bfloat16, and it keeps float32 ones beside them.

    Vectors stay whole in every process whatever their size: a layer makes its normed input again in the backward pass of the next.
    """
    buckets = settings.bucket_elements
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": buckets,
        "allgather_bucket_size": buckets + buckets % 2,  # DeepSpeed insists on an even one
    }
    if settings.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": buckets,
            "stage3_max_live_parameters": settings.live_elements,
            "stage3_max_reuse_distance": settings.live_elements,
            "stage3_param_persistence_threshold": max(settings.persistent_elements, widest_vector),
            "sub_group_size": settings.sub_group_elements,
        }
    if settings.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if settings.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants one; rows are packed and counted here
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # a step is what ends with its update
        "gradient_clipping": max_grad_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": masters, **({"check_grad_overflow": True} if masters else {})},
    }
    if masters:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
