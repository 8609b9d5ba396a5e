"""The most memory that a training step takes, by part, above a process at rest: predicted from sizes, without running anything.

What stays is counted exactly: weights, adapter, moments. What a pass keeps follows from what each layer saves for its backward
pass (`model/decoder.py`, `model/linear.py`). What operations need for a moment was fitted to measured steps: on a CPU of models of
28 and 71 M parameters (benchmarks/results/matrix_memory_2026-11-27), on a GPU of eight layers of Phi-4-mini's width
(gpu_2026-11-27.json there); `tests/unit/test_plan_memory.py` holds it to all of them.
T tokens of a pass, D model width, F inner width, L layers, V vocabulary. Next: `time.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from kivnun.plan.sizes import Sizes
from kivnun.plan.trained import chosen_linears, trained_of
from kivnun.spec.adapters import AdapterSpec, FullSpec, PrefixSpec, PromptSpec, Targeted, VeraSpec

COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "int8": 2, "nf4": 2}  # of a number that is computed with
# Of a number in codes: NF4's half byte, its block's scale in 8 bits for 64 numbers, and the scales' own for 256 of them; int8's row
# scales are too few to count.
CODE_BYTES = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
# What operations need for a moment, per token of a pass: bytes per word of the vocabulary and per inner width, and a method's share
# of that beside LoRA's; the rest is what the allocator keeps. Kernels in Triton hold no logits of a whole pass.
WORD_BYTES = {2: 2.5, 4: 1.9}
INNER_BYTES = {2: 32.0, 4: 80.0}
GPU_INNER_BYTES = {2: 16.0, 4: 32.0}
WORKSPACE = {
    "full": 1.1, "lora": 1.0, "dora": 1.0, "adalora": 1.0, "loha": 2.3, "lokr": 2.0, "vera": 2.5, "ia3": 2.0, "ln_tuning": 1.0,
    "prompt": 1.0, "prefix": 1.15,
}  # fmt: skip
ALLOCATOR = 14e6  # bytes


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes of each part at the moment when they are the most together."""

    weights: float
    adapter: float
    gradients: float
    moments: float
    activations: float
    workspace: float

    @property
    def peak(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True)
class Shape:
    """How a step is computed: the precision of the base, the tokens of a pass, whether layers are computed again in the backward
    pass, over how many processes state is divided and from what ZeRO stage on."""

    precision: str
    pass_tokens: int
    device: Literal["cpu", "cuda"] = "cpu"
    recompute: bool = False
    processes: int = 1
    zero_stage: int = 0


def step_memory(sizes: Sizes, spec: AdapterSpec, shape: Shape) -> StepMemory:
    """Return what a step of one process takes at most, in bytes above the same process at rest."""
    number, trained, full = COMPUTE_BYTES[shape.precision], trained_of(sizes, spec), isinstance(spec, FullSpec)
    weights = weight_bytes(sizes.linear_numbers, sizes.outer_numbers, shape.precision)
    # Weights in 16 bits are trained through float32 ones.
    adapter = (0 if number == 4 else 4 * trained.numbers) if full else 4 * (trained.numbers + trained.fixed)
    moments, gradients = 8.0 * trained.numbers, 4.0 * trained.numbers
    kept = number * shape.pass_tokens * _kept(sizes, spec, shape)
    workspace = WORKSPACE[spec.kind] * _workspace(sizes, number, shape)
    if shape.recompute:  # inputs of all layers, and one layer whole
        workspace += number * shape.pass_tokens * (sizes.layers * sizes.hidden + _kept(sizes, spec, shape) / sizes.layers)
        kept = 0.0
    # A backward pass uses activations up while it makes gradients: the peak is at its beginning, when the head's are there alone,
    # or at its end.
    head = 4.0 * sizes.vocab * sizes.hidden if full else 0.0
    copies = 2.0 * sizes.numbers + head if full else 0.0
    early, late = head / 2 + kept, gradients + copies - head / 2
    part = 1 / shape.processes
    weights *= part if shape.zero_stage >= 3 else 1
    adapter *= part if shape.zero_stage >= (3 if full and number == 4 else 1) else 1
    moments *= part if shape.zero_stage >= 1 else 1
    gradients *= part if shape.zero_stage >= 2 else 1
    if early >= late or not full:
        return StepMemory(weights, adapter, head / 2, moments, kept, workspace)
    return StepMemory(weights, adapter, gradients, moments, 0.0, workspace + (late - 4.0 * trained.numbers))


def weight_bytes(linear_numbers: int, outer_numbers: int, precision: str) -> float:
    """Return what a base's weights take in a precision: linear layers, and what is never held as codes."""
    number = COMPUTE_BYTES[precision]
    return CODE_BYTES.get(precision, number) * linear_numbers + number * outer_numbers


def held_layer(sizes: Sizes, spec: AdapterSpec, pass_tokens: int) -> float:
    """Return how many numbers one layer keeps for its backward pass, per token."""
    attention = sizes.queries + 2 * sizes.keys
    # Queries, keys and values, what attention says, gate and up, and the residual stream before and after attention.
    kept = float(attention + sizes.queries + 2 * sizes.mlp + 2 * sizes.hidden)
    inputs = 2 * sizes.hidden + sizes.queries + sizes.mlp
    outputs = attention + 2 * sizes.hidden + 2 * sizes.mlp
    match spec.kind:
        case "full":  # normed inputs and gated products are kept rather than made again
            return kept + 2 * sizes.hidden + sizes.mlp
        case "dora":  # outputs of the frozen layers, for the gradient of magnitudes
            return kept + outputs
        case "adalora":  # in float32 both ways
            return kept + 2 * inputs + 2 * outputs
        case "ia3":
            return kept + outputs + sizes.mlp + sizes.hidden
        case "vera":
            return kept + 2 * inputs + outputs + (4 * spec.rank if isinstance(spec, VeraSpec) else 0)
        case "loha" | "lokr":  # the update as a whole matrix, in float32
            return kept + outputs + 2 * sizes.linear_numbers / sizes.layers / pass_tokens
        case _:
            return kept


def _kept(sizes: Sizes, spec: AdapterSpec, shape: Shape) -> float:
    """Return how many numbers a pass keeps, per token; the last layer's second half sees the scored tokens alone."""
    kept = sizes.layers * held_layer(sizes, spec, shape.pass_tokens)
    if isinstance(spec, Targeted):
        bare = held_layer(sizes, FullSpec(), shape.pass_tokens) - 2 * sizes.hidden - sizes.mlp
        covered = len(chosen_linears(sizes, spec)) / len(sizes.linears)
        kept = sizes.layers * bare + (kept - sizes.layers * bare) * covered
    if isinstance(spec, PromptSpec):
        kept *= 1 + spec.num_virtual_tokens / shape.pass_tokens
    if isinstance(spec, PrefixSpec):
        kept += 2 * sizes.layers * sizes.keys * spec.num_virtual_tokens / shape.pass_tokens
    return kept


def _workspace(sizes: Sizes, number: int, shape: Shape) -> float:
    if shape.device == "cuda":
        return ALLOCATOR + shape.pass_tokens * GPU_INNER_BYTES[number] * sizes.mlp
    return ALLOCATOR + shape.pass_tokens * (WORD_BYTES[number] * sizes.vocab + INNER_BYTES[number] * sizes.mlp)
