"""The most memory that a training step takes, by part, and what its process takes before: predicted from sizes, without running
anything.

What stays is counted exactly: weights, adapter, moments. What a pass keeps follows from what each layer saves for its backward
pass (`model/decoder.py`, `model/linear.py`); of layers that transformers computes it is reckoned and was not measured. What
operations need for a moment was fitted to measured steps: on a CPU to benchmarks/results/matrix_memory_2026-11-27 (steps above a
process at rest) and to plan_calibration_2026-11-27.json there (whole processes), on a GPU to eight layers of Phi-4-mini's width
(gpu_2026-11-27.json there). `tests/unit/test_plan_memory.py` and `test_plan_laws.py` hold it to all of them; how it does on what it
was not fitted to is what `python -m benchmarks.plan` shows.
T tokens of a pass, D model width, F inner width, L layers, V vocabulary. Next: `time.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from typing import Literal

from kivnun.plan.sizes import Sizes
from kivnun.plan.trained import chosen_linears, trained_of
from kivnun.spec.adapters import (
    AdaloraSpec,
    AdapterSpec,
    FullSpec,
    Ia3Spec,
    LohaSpec,
    LokrSpec,
    LoraSpec,
    PrefixSpec,
    PromptSpec,
    Targeted,
    VeraSpec,
)

PeftSpec = VeraSpec | AdaloraSpec | LohaSpec | LokrSpec | Ia3Spec  # whose layers PEFT computes
COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "int8": 2, "nf4": 2}  # of a number that is computed with
# Of a number in codes: NF4's half byte, its block's scale in 8 bits for 64 numbers, and the scales' own for 256 of them; int8's row
# scales are too few to count.
CODE_BYTES = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
# On a CPU: what operations need for a moment, and what the allocator keeps between them.
CHUNK = 256  # positions whose logits exist at once (`model/loss.py`)
WORD_BYTES = 6.8  # for each of them and each word
# Of what a LoRA step keeps: gradients on their way, and what a method makes beside.
BACKWARD_SHARE = {
    "full": 0.05, "lora": 0.43, "dora": 0.39, "adalora": 0.3, "loha": 0.84, "lokr": 0.75, "vera": 1.8, "ia3": 1.09,
    "ln_tuning": 0.44, "prompt": 0.43, "prefix": 0.54,
}  # fmt: skip
WIDE_SHARE = BACKWARD_SHARE | {
    "ia3": 0.0,
    "vera": 0.36,
    "adalora": 0.0,
    "loha": 0.4,
    "lokr": 0.4,
}  # in float32, which PEFT need not widen
AGAIN_INPUTS = 9.0  # times the inputs of all layers, where layers are computed again
HEAD_BYTES = 5.5  # of a trained head's number: sums of its gradient over chunks
# Of a number of the linear layers, where an update is made whole, by the bytes of a number that is computed with.
UPDATE_BYTES = {"loha": {2: 5.5, 4: 2.0}, "lokr": {2: 3.5, 4: 1.5}}
FULL_BYTES, FULL_ALLOCATOR = 0.8, 15e6  # of a trained base's number, and beside: holes that gradients leave
GATHERED = {"full": 0.4, "adapter": 0.1}  # of the weights: what ZeRO's third stage has whole for a moment
OPENING = 0.8  # of the weights, whole and divided, while it divides them
ALLOCATOR = 10e6
# A process on a CPU before it has a base (`python -m benchmarks.plan` measures it, docs/LOG.md).
IDLE_BYTES = 285e6  # Python, torch and what a run imports
TOUCHED_BYTES = 23e6  # code and tables that loading and the first step touch
PEFT_BYTES = 190e6  # PEFT, with what it imports where that is installed
DEEPSPEED_BYTES = 135e6
COMPILER_BYTES = 88e6  # torch's, which it imports where layers are computed again
TOGETHER_BYTES = 10e6  # torch's and gloo's own, of each of several processes
TOKENIZER_BYTES, ROW_BYTES, TOKEN_BYTES = 6e6, 1450.0, 15.0  # the built-in base's, and what rows and their records leave
SCRATCH_BYTES = 4e6  # through which files are read
# On a GPU: per token of a pass and inner width, and a method's share of that beside LoRA's. Kernels in Triton hold no logits.
GPU_INNER_BYTES = {2: 16.0, 4: 32.0}
GPU_WORKSPACE = {
    "full": 1.1, "lora": 1.0, "dora": 1.0, "adalora": 1.0, "loha": 2.3, "lokr": 2.0, "vera": 2.5, "ia3": 2.0, "ln_tuning": 1.0,
    "prompt": 1.0, "prefix": 1.15,
}  # fmt: skip
GPU_ALLOCATOR = 14e6  # bytes


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
    pass, over how many processes state is divided and from what ZeRO stage on, whether frozen weights are kept packed."""

    precision: str
    pass_tokens: int
    device: Literal["cpu", "cuda"] = "cpu"
    recompute: bool = False
    processes: int = 1
    zero_stage: int = 0
    packed: bool = False


def step_memory(sizes: Sizes, spec: AdapterSpec, shape: Shape) -> StepMemory:
    """Return what a step of one process takes at most, in bytes above the same process at rest."""
    return _on_gpu(sizes, spec, shape) if shape.device == "cuda" else _on_cpu(sizes, spec, shape)


def _on_cpu(sizes: Sizes, spec: AdapterSpec, shape: Shape) -> StepMemory:
    """Return the parts on a CPU, whose allocator keeps what was freed: what is there one after the other adds up. Several processes
    give it back: there the peak is at the beginning of a backward pass, or at its end."""
    number, full, together = COMPUTE_BYTES[shape.precision], isinstance(spec, FullSpec), shape.processes > 1
    stays = _divided(_staying(sizes, spec, shape), shape)
    kept, gradients = number * shape.pass_tokens * _kept(sizes, spec, shape), stays.gradients
    share = (WIDE_SHARE if number == 4 else BACKWARD_SHARE)[spec.kind]
    backward = share * number * shape.pass_tokens * _kept(sizes, LoraSpec(), shape)
    if shape.recompute:
        kept, backward = 0.0, AGAIN_INPUTS * number * shape.pass_tokens * sizes.layers * sizes.hidden
    workspace = ALLOCATOR + WORD_BYTES * sizes.vocab * min(shape.pass_tokens, CHUNK)
    if spec.kind in UPDATE_BYTES:
        workspace += UPDATE_BYTES[spec.kind][number] * sizes.linear_numbers
    if shape.zero_stage == 3:
        workspace += GATHERED["full" if full else "adapter"] * number * sizes.numbers
    if not together:
        workspace += backward + (FULL_BYTES * sizes.numbers + HEAD_BYTES * sizes.vocab * sizes.hidden + FULL_ALLOCATOR) * full
    elif full:
        averaged = gradients if shape.zero_stage >= 2 else 0.0  # once more, over all processes
        workspace += averaged
        kept, gradients = (0.0, gradients) if kept < gradients + averaged else (kept - averaged, 0.0)
    return StepMemory(stays.weights, stays.adapter, gradients, stays.moments, kept, workspace)


@dataclass(frozen=True, slots=True)
class _Staying:
    weights: float
    adapter: float
    gradients: float
    moments: float


def _staying(sizes: Sizes, spec: AdapterSpec, shape: Shape) -> _Staying:
    """Return the bytes of what is there from step to step, and of all gradients, nothing divided."""
    number, trained = COMPUTE_BYTES[shape.precision], trained_of(sizes, spec)
    weights = weight_bytes(sizes.linear_numbers, sizes.outer_numbers, shape.precision)
    if shape.packed:  # for products with both sides, in the place of the weights; a tied head beside the embedding
        head = sizes.vocab * sizes.hidden
        weights += number * (sizes.linear_numbers + (2 if sizes.tied else 1) * head)
    if isinstance(spec, FullSpec):  # weights in 16 bits are trained through float32 ones; DeepSpeed has such ones in any case
        adapter = 0.0 if number == 4 and not shape.zero_stage else 4.0 * trained.numbers
    else:
        adapter = 4.0 * (trained.numbers + trained.fixed)
    return _Staying(weights, adapter, 4.0 * trained.numbers, 8.0 * trained.numbers)


def _divided(whole: _Staying, shape: Shape) -> _Staying:
    """Return what one process holds of it."""
    part, stage = 1 / shape.processes, shape.zero_stage
    return _Staying(
        whole.weights * (part if stage >= 3 else 1),
        whole.adapter * (part if stage >= 1 else 1),
        whole.gradients * (part if stage >= 2 else 1),
        whole.moments * (part if stage >= 1 else 1),
    )


def _on_gpu(sizes: Sizes, spec: AdapterSpec, shape: Shape) -> StepMemory:
    """Return the parts on a GPU. A backward pass uses activations up while it makes gradients: the peak is at its beginning, when
    the head's are there alone, or at its end."""
    number, full = COMPUTE_BYTES[shape.precision], isinstance(spec, FullSpec)
    stays = _divided(_staying(sizes, spec, shape), shape)
    kept = number * shape.pass_tokens * _kept(sizes, spec, shape)
    workspace = GPU_WORKSPACE[spec.kind] * (GPU_ALLOCATOR + shape.pass_tokens * GPU_INNER_BYTES[number] * sizes.mlp)
    if shape.recompute:  # inputs of all layers, and one layer whole
        workspace += number * shape.pass_tokens * sizes.layers * sizes.hidden + kept / sizes.layers
        kept = 0.0
    if not full:
        return StepMemory(stays.weights, stays.adapter, 0.0, stays.moments, kept, workspace)
    head, gradients = 4.0 * sizes.vocab * sizes.hidden, 4.0 * sizes.numbers
    copies = 2.0 * sizes.numbers + head
    early, late = head / 2 + kept, gradients + copies - head / 2
    if early >= late:
        return StepMemory(stays.weights, stays.adapter, head / 2, stays.moments, kept, workspace)
    return StepMemory(stays.weights, stays.adapter, stays.gradients, stays.moments, 0.0, workspace + (late - gradients))


def weight_bytes(linear_numbers: int, outer_numbers: int, precision: str) -> float:
    """Return what a base's weights take in a precision: linear layers, and what is never held as codes."""
    number = COMPUTE_BYTES[precision]
    return CODE_BYTES.get(precision, number) * linear_numbers + number * outer_numbers


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Bytes of a process beside what a step counts: `idle` before a base is loaded, `libraries` that loading and training bring
    in, `rows` of text and tokens; `loading` is there for a moment while the base is read."""

    idle: float
    libraries: float
    rows: float
    loading: float

    @property
    def rest(self) -> float:
        """Return what is there at every step, beside the step's own."""
        return self.idle + self.libraries + self.rows


def process_memory(
    sizes: Sizes, spec: AdapterSpec, shape: Shape, *, rows: int = 0, tokens: int = 0, idle: float = IDLE_BYTES
) -> ProcessMemory:
    """Return what one process takes before a step, in bytes. `rows` and `tokens` are all that are loaded, held out ones included;
    `idle` is what `idle_bytes` found on this machine. On a GPU it is nothing: there, what the run allocates is counted."""
    if shape.device == "cuda":
        return ProcessMemory(0.0, 0.0, 0.0, 0.0)
    libraries = TOUCHED_BYTES
    if isinstance(spec, PeftSpec):
        libraries += PEFT_BYTES
    elif shape.zero_stage:
        libraries += DEEPSPEED_BYTES
    libraries += COMPILER_BYTES if shape.recompute else 0.0
    libraries += TOGETHER_BYTES if shape.processes > 1 else 0.0
    held = TOKENIZER_BYTES + ROW_BYTES * rows + TOKEN_BYTES * tokens if rows else 0.0
    return ProcessMemory(idle, libraries, held, SCRATCH_BYTES + _loading(sizes, shape))


def _loading(sizes: Sizes, shape: Shape) -> float:
    """Return what reading a base takes for a moment beside what stays: a tensor at a time, as it is stored and as it is held."""
    number = COMPUTE_BYTES[shape.precision]
    largest = max(sizes.vocab * sizes.hidden, max(inputs * outputs for inputs, outputs in sizes.linears.values()))
    return float(number * largest)


def peak_bytes(sizes: Sizes, spec: AdapterSpec, shape: Shape, *, rows: int = 0, tokens: int = 0, idle: float = IDLE_BYTES) -> float:
    """Return the most that one process of a run takes: resident on a CPU, allocated on a GPU, as a result's `actual.peak_bytes`."""
    process = process_memory(sizes, spec, shape, rows=rows, tokens=tokens, idle=idle)
    if shape.device == "cuda":
        return step_memory(sizes, spec, shape).peak
    whole = _staying(sizes, spec, replace(shape, packed=False)).weights
    opening = OPENING * (whole + whole / shape.processes) if shape.zero_stage == 3 else whole
    return process.rest + max(step_memory(sizes, spec, shape).peak, opening + process.loading)


IDLE = """
import kivnun.pipeline
from kivnun.model.kernels import choose
choose("auto", "cpu")
print(open("/proc/self/statm").read().split()[1])
"""


def idle_bytes() -> float:
    """Return what a process takes on this machine before it has a base, by starting one; IDLE_BYTES where the kernel does not
    tell."""
    found = subprocess.run([sys.executable, "-c", IDLE], capture_output=True, text=True, timeout=120, check=False)
    return float(found.stdout) * os.sysconf("SC_PAGE_SIZE") if found.returncode == 0 else IDLE_BYTES


def held_layer(sizes: Sizes, spec: AdapterSpec, pass_tokens: int, number: int = 2) -> float:
    """Return how many numbers of `number` bytes one layer keeps for its backward pass, per token."""
    wide = 4 / number  # of what PEFT computes in float32
    attention = sizes.queries + 2 * sizes.keys
    # Queries, keys and values, what attention says, gate and up, and the residual stream before and after attention.
    kept = float(attention + sizes.queries + 2 * sizes.mlp + 2 * sizes.hidden)
    if not sizes.own:  # transformers' own: rotated queries and keys, both norms' inputs in float32, the activation and the product
        kept += sizes.queries + sizes.keys + 2 * wide * sizes.hidden + 2 * sizes.mlp
    inputs = 2 * sizes.hidden + sizes.queries + sizes.mlp
    outputs = attention + 2 * sizes.hidden + 2 * sizes.mlp
    match spec.kind:
        case "full":  # normed inputs and gated products are kept rather than made again
            return kept + 2 * sizes.hidden + sizes.mlp
        case "dora":  # outputs of the frozen layers, for the gradient of magnitudes
            return kept + outputs
        case "adalora":  # in float32 both ways
            return kept + wide * (inputs + outputs)
        case "ia3":
            return kept + outputs + sizes.mlp + sizes.hidden
        case "vera":
            return kept + wide * inputs + outputs + (2 * wide * spec.rank if isinstance(spec, VeraSpec) else 0)
        case "loha" | "lokr":  # the update as a whole matrix, in float32
            return kept + outputs + wide * sizes.linear_numbers / sizes.layers / pass_tokens
        case _:
            return kept


def _kept(sizes: Sizes, spec: AdapterSpec, shape: Shape) -> float:
    """Return how many numbers a pass keeps, per token; the last layer's second half sees the scored tokens alone."""
    number = COMPUTE_BYTES[shape.precision]
    kept = sizes.layers * held_layer(sizes, spec, shape.pass_tokens, number)
    if isinstance(spec, Targeted):
        bare = held_layer(sizes, FullSpec(), shape.pass_tokens, number) - 2 * sizes.hidden - sizes.mlp
        covered = len(chosen_linears(sizes, spec)) / len(sizes.linears)
        kept = sizes.layers * bare + (kept - sizes.layers * bare) * covered
    if isinstance(spec, PromptSpec):
        kept *= 1 + spec.num_virtual_tokens / shape.pass_tokens
    if isinstance(spec, PrefixSpec):
        kept += 2 * sizes.layers * sizes.keys * spec.num_virtual_tokens / shape.pass_tokens
    return kept
