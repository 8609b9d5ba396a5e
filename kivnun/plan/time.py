"""How long training takes, predicted: operations at a rate, and what a pass keeps at another.

A step computes 4 operations per number of the base's matrices and token where they are frozen (forward, and the gradient of the
input), 6 where they are trained; attention's own are few for rows of these lengths. A CPU moves what layers keep at a cost of its
own. The rates are those of one core of the machine that the table was measured on (docs/LOG.md, 2026-11-27), scaled by a short
product on this one. Next: `advise.py`.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

from kivnun.plan.memory import COMPUTE_BYTES, held_layer
from kivnun.plan.sizes import Sizes
from kivnun.plan.trained import trained_of
from kivnun.spec.adapters import AdapterSpec, FullSpec, LoraSpec

CORE_FLOPS = {2: 273e9, 4: 149e9}  # of one core of the reference machine, by the bytes of a number
KEPT_S = {2: 6.84e-9, 4: 10.4e-9}  # seconds per number that a pass keeps
UPDATE_S = 4.4e-9  # seconds of AdamW per number trained and step
REFERENCE_FLOPS = {2: 165e9, 4: 66e9}  # what `model/speed.py` found on one core of the reference machine
AGAIN = 1.33  # of a step whose layers are computed twice
# The share of a GPU's dense bfloat16 peak that a step's operations come to: an H100 on eight layers of Phi-4-mini's width, 8,192
# tokens a pass (benchmarks/results/gpu_2026-11-27.json).
GPU_SHARE = {
    "full": 0.27, "lora": 0.44, "qlora": 0.43, "dora": 0.36, "adalora": 0.21, "loha": 0.04, "lokr": 0.04, "vera": 0.19, "ia3": 0.32,
    "ln_tuning": 0.47, "prompt": 0.37, "prefix": 0.41,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be trained: tokens and steps in all, tokens of a pass."""

    tokens: int
    steps: int
    pass_tokens: int


def operations(sizes: Sizes, spec: AdapterSpec) -> float:
    """Return the operations of training on one token."""
    matrices = sizes.linear_numbers + sizes.vocab * sizes.hidden
    return (6.0 if isinstance(spec, FullSpec) else 4.0) * matrices


def cpu_seconds(sizes: Sizes, spec: AdapterSpec, precision: str, work: Work, *, slower: float, speed: float) -> float:
    """Return the seconds of all steps. `slower`: a step of the method beside LoRA's; `speed`: this machine beside one core of the
    reference."""
    number = COMPUTE_BYTES[precision]
    like = spec if isinstance(spec, FullSpec) else LoraSpec()
    kept = sizes.layers * held_layer(sizes, LoraSpec(), work.pass_tokens)
    per_token = operations(sizes, like) / CORE_FLOPS[number] + KEPT_S[number] * kept
    update = UPDATE_S * trained_of(sizes, spec).numbers * work.steps
    return (per_token * work.tokens * (1.0 if isinstance(spec, FullSpec) else slower) + update) / speed


def gpu_seconds(sizes: Sizes, spec: AdapterSpec, work: Work, flops: float) -> float:
    """Return the seconds of all steps on a GPU that does so many operations a second at such work."""
    return operations(sizes, spec) * work.tokens / flops


def machine_speed(precision: str) -> float:
    """Return how fast this machine, with all its cores, is beside one core of the reference machine, by products in a precision."""
    command = [sys.executable, "-m", "kivnun.model.speed", precision]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return float(found.stdout) / REFERENCE_FLOPS[COMPUTE_BYTES[precision]]
