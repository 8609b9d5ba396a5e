"""How long a run takes, predicted: what it computes, counted by kind, each kind at a rate of its own.

Counted are the operations of products, of attention and of what PEFT computes in float32; numbers that layers keep, that are
decoded, laid out for products, or updated; passes through layers, which cost something however short they are. A backward pass
takes twice what a forward one does, or once for products with frozen weights. The rates are those of one core of the reference
machine, scaled by a short product on this one. On a GPU: a share of its peak.

The rates were fitted to the points of benchmarks/results/plan_calibration_2026-11-27.json by `python -m benchmarks.plan.fit`, and
`tests/unit/test_plan_laws.py` holds them to these. How they do on models, lengths and combinations that they were not fitted to is
what `python -m benchmarks.plan` shows.
T tokens of a pass, L layers, V vocabulary. Next: `advise.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kivnun.plan.memory import CHUNK, CODE_BYTES, COMPUTE_BYTES, PeftSpec, Shape, held_layer, step_memory
from kivnun.plan.sizes import Sizes
from kivnun.plan.trained import chosen_linears, trained_of
from kivnun.spec.adapters import (
    AdaloraSpec,
    AdapterSpec,
    DoraSpec,
    FullSpec,
    LohaSpec,
    LokrSpec,
    LoraSpec,
    LowRank,
    PrefixSpec,
    PromptSpec,
    VeraSpec,
)

# Seconds of each on one core of the reference machine, by the bytes of a number that is computed with.
SECONDS: dict[str, dict[int, float]] = {
    "products": {2: 4.89e-12, 4: 9.62e-12},
    "low rank": {2: 1.05e-11, 4: 2.03e-11},
    "wide": {2: 1.14e-11, 4: 1.14e-11},
    "attention": {2: 5.35e-12, 4: 1.05e-11},
    "kept": {2: 5.07e-10, 4: 7.68e-10},
    "laid out": {2: 4.05e-10, 4: 5.4e-10},
    "nf4": {2: 6.23e-11, 4: 0},
    "int8": {2: 1.41e-10, 4: 0},
    "deltas": {2: 1.02e-09, 4: 1.02e-09},
    "loha": {2: 2.42e-09, 4: 2.42e-09},
    "lokr": {2: 4.79e-10, 4: 4.79e-10},
    "head sums": {2: 5.22e-09, 4: 1.31e-08},
    "words": {2: 4.24e-10, 4: 0},
    "layers": {2: 0.000716, 4: 0.000716},
    "sites": {2: 0.000132, 4: 0.000132},
    "steps": {2: 0.00842, 4: 0.00842},
    "updates": {2: 1.93e-09, 4: 1.93e-09},
    "summed": {2: 1.18e-08, 4: 1.18e-08},
    "flattened": {2: 1.56e-09, 4: 1.56e-09},
    "gathered": {2: 1.39e-08, 4: 1.39e-08},
    "read": {2: 1.93e-10, 4: 1.46e-10},
    "cached": {2: 1.28e-09, 4: 1.53e-09},
    "said": {2: 0.000188, 4: 0.000188},
}
# The same in both precisions.
SHARED = (
    "layers", "sites", "steps", "updates", "wide", "loha", "lokr", "deltas", "said", "summed", "flattened", "gathered",
)  # fmt: skip
REFERENCE_FLOPS = {2: 197e9, 4: 85e9}  # what `model/speed.py` finds on one core of the reference machine
AGAIN = 1.33  # of a step whose layers are computed twice
ROWS_AT_ONCE = 64  # rows that are answered together (`model/generate.py`)
FIRST_S = 4.2e-10  # seconds for each byte that a run grows by, in its first step
COMPILER_S = 1.05  # of importing torch's compiler, in the first step that computes layers again
# Before the first step: imports and what each run sets up, bytes of files read and hashed, bytes held, numbers that are encoded,
# rows and tokens of data.
IMPORT_S, PEFT_S, DEEPSPEED_S = 2.45, 2.5, 2.5
READ_S, HELD_S, ENCODE_S, ROW_S, TOKEN_S = 1.12e-9, 2.8e-10, 3.5e-9, 1.2e-4, 2.8e-6
# The share of a GPU's dense bfloat16 peak that a step's operations come to: an H100 on eight layers of Phi-4-mini's width, 8,192
# tokens a pass (benchmarks/results/gpu_2026-11-27.json).
GPU_SHARE = {
    "full": 0.27, "lora": 0.44, "qlora": 0.43, "dora": 0.36, "adalora": 0.21, "loha": 0.04, "lokr": 0.04, "vera": 0.19, "ia3": 0.32,
    "ln_tuning": 0.47, "prompt": 0.37, "prefix": 0.41,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be computed: tokens and steps in all, tokens of a pass.

    `passes` are those of all steps (None: as few as hold the tokens), `scored` the tokens that the head is for (None: all),
    `row_tokens` the mean length of the row that a token is in, sum(l^2) / sum(l), which attention goes by (0: it is left out).
    """

    tokens: int
    steps: int
    pass_tokens: int
    passes: int | None = None
    scored: int | None = None
    row_tokens: float = 0.0

    @property
    def num_passes(self) -> int:
        return max(self.steps, -(-self.tokens // self.pass_tokens)) if self.passes is None else self.passes

    @property
    def num_scored(self) -> int:
        return self.tokens if self.scored is None else self.scored


def work_of(steps: Iterable[Sequence[int]], pass_tokens: int, scored_share: float = 1.0) -> Work:
    """Return the work of steps of rows of these lengths, packed as `data/packing.py` packs them: in their order, a new pass where
    the next row does not fit."""
    tokens = squares = passes = count = longest = 0
    for lengths in steps:
        count, room = count + 1, 0
        for length in lengths:
            if length > room:
                passes, room = passes + 1, pass_tokens
            room -= length
            tokens, squares = tokens + length, squares + length * length
            longest = max(longest, pass_tokens - room)
    return Work(tokens, count, longest, passes, round(scored_share * tokens), squares / tokens if tokens else 0.0)


def training_amounts(sizes: Sizes, spec: AdapterSpec, shape: Shape, work: Work) -> dict[str, float]:
    """Return how much of each kind training takes of one process that has this work."""
    forward = _layers_forward(sizes, spec, shape, work)
    head = _head(sizes, spec, work, 3.0 if isinstance(spec, FullSpec) else 2.0)
    times = 2.0 if shape.recompute else 1.0
    found = {name: times * amount for name, amount in forward.items()}
    for name, amount in _layers_backward(sizes, spec, forward).items():
        found[name] = found.get(name, 0.0) + amount
    found["products"] += head.pop("products")
    trained = trained_of(sizes, spec).numbers
    found |= {"updates": float(trained * work.steps), "steps": work.steps, **head}
    if shape.processes > 1:
        found["summed"] = float(trained * work.steps)
    if shape.zero_stage:
        found["flattened"] = float(trained * work.steps)
    if shape.zero_stage == 3:
        found["gathered"] = float(sizes.numbers * work.num_passes)
    return found


def scoring_amounts(sizes: Sizes, spec: AdapterSpec, shape: Shape, work: Work) -> dict[str, float]:
    """Return how much of each kind a forward pass over held-out rows takes."""
    found = _layers_forward(sizes, spec, shape, work)
    found["products"] += _head(sizes, spec, work, 1.0)["products"]
    return found


def _layers_forward(sizes: Sizes, spec: AdapterSpec, shape: Shape, work: Work) -> dict[str, float]:
    tokens, passes, layer = work.tokens, work.num_passes, sizes.linear_numbers / sizes.layers
    if isinstance(spec, PromptSpec):  # once in each pass
        tokens += spec.num_virtual_tokens * passes
    inputs_of_attention = sizes.hidden * (sizes.queries + 2 * sizes.keys)
    # The last layer's second half sees the scored tokens alone.
    whole = sizes.linear_numbers * tokens - (layer - inputs_of_attention) * max(0, tokens - work.num_scored) * sizes.own
    row = work.row_tokens + (spec.num_virtual_tokens if isinstance(spec, PrefixSpec) else 0)
    found = {
        "products": 2.0 * whole,
        "attention": 2.0 * sizes.layers * sizes.queries * row * tokens,
        "kept": sizes.layers * held_layer(sizes, spec, work.pass_tokens, COMPUTE_BYTES[shape.precision]) * tokens,
        "layers": float(sizes.layers * passes),
    }
    if shape.precision in ("nf4", "int8"):
        found[shape.precision] = float(sizes.linear_numbers * passes)
    if not shape.packed:
        found["laid out"] = float((sizes.linear_numbers + sizes.vocab * sizes.hidden) * passes)
    return found | _of_technique(sizes, spec, tokens, passes)


def _of_technique(sizes: Sizes, spec: AdapterSpec, tokens: int, passes: int) -> dict[str, float]:
    """Return what a technique computes beside the base in a forward pass."""
    if isinstance(spec, LowRank):
        return {"low rank": 2.0 * trained_of(sizes, spec).numbers * tokens} | (
            {"deltas": float(sizes.linear_numbers * passes)} if isinstance(spec, DoraSpec) else {}
        )
    if not isinstance(spec, PeftSpec):
        return {}
    chosen = chosen_linears(sizes, spec)
    found = {"sites": float(len(chosen) * passes)}
    sides = sum(inputs + outputs for inputs, outputs in chosen.values())
    if isinstance(spec, VeraSpec | AdaloraSpec):
        return found | {"wide": 2.0 * spec.rank * sides * tokens}
    if isinstance(spec, LohaSpec | LokrSpec):  # the update is made whole, in float32
        numbers = sum(inputs * outputs for inputs, outputs in chosen.values())
        return found | {"wide": 2.0 * numbers * tokens, spec.kind: float(numbers * passes)}
    return found


BACKWARD = {
    "attention": 2.5,
    "kept": 2.0,
    "low rank": 2.0,
    "layers": 1.5,
    "sites": 1.5,
    "nf4": 1.0,
    "int8": 1.0,
    "laid out": 1.0,
    "deltas": 0.0,
    "loha": 1.0,
    "lokr": 1.0,
}


def _layers_backward(sizes: Sizes, spec: AdapterSpec, forward: Mapping[str, float]) -> dict[str, float]:
    times = {
        **BACKWARD,
        "products": 2.0 if isinstance(spec, FullSpec) else 1.0,
        "wide": 1.0 if isinstance(spec, VeraSpec) else 2.0,
    }
    return {name: times[name] * amount for name, amount in forward.items()}


def _head(sizes: Sizes, spec: AdapterSpec, work: Work, times: float) -> dict[str, float]:
    table = sizes.vocab * sizes.hidden
    found = {"products": times * 2.0 * table * work.num_scored, "words": float(sizes.vocab * work.num_scored)}
    if isinstance(spec, FullSpec):  # its gradient is added up chunk by chunk
        found["head sums"] = table * max(work.num_scored / CHUNK, work.num_passes)
    return found


def training_seconds(sizes: Sizes, spec: AdapterSpec, shape: Shape, work: Work, *, speed: float = 1.0) -> float:
    """Return the CPU seconds of all steps of one process that has this work: `Work` of its own rows where several divide them."""
    amounts = training_amounts(sizes, spec, shape, work)
    memory = step_memory(sizes, spec, shape)
    grown = FIRST_S * (memory.peak - memory.weights * (0.5 if shape.packed else 1.0))
    return (seconds_of(amounts, shape.precision) + grown + COMPILER_S * shape.recompute) / speed


def scoring_seconds(sizes: Sizes, spec: AdapterSpec, shape: Shape, work: Work, *, speed: float = 1.0) -> float:
    """Return the CPU seconds of one evaluation of held-out rows, without replies."""
    return seconds_of(scoring_amounts(sizes, spec, shape, work), shape.precision) / speed


def generation_seconds(
    sizes: Sizes, spec: AdapterSpec, shape: Shape, *, prompts: Sequence[int], new_tokens: int, speed: float = 1.0
) -> float:
    """Return the CPU seconds of replies of `new_tokens` tokens each to prompts of these lengths."""
    return seconds_of(generation_amounts(sizes, spec, shape, prompts, new_tokens), shape.precision) / speed


def generation_amounts(sizes: Sizes, spec: AdapterSpec, shape: Shape, prompts: Sequence[int], new_tokens: int) -> dict[str, float]:
    """Return how much of each kind replies take: a pass over the prompts, then one for each token of as many rows as are answered
    together, which reads all weights for a few tokens and all keys and values that there are so far."""
    found: dict[str, float] = {}
    for at in range(0, len(prompts), ROWS_AT_ONCE):
        some = prompts[at : at + ROWS_AT_ONCE]
        count, passes = len(some), new_tokens - 1
        read = replace(work_of([some], sum(some)), scored=count)
        told = Work(count * passes, 1, count, passes=passes)
        context = sum(some) + count * new_tokens / 2
        more = {
            "read": float((sizes.linear_numbers + sizes.vocab * sizes.hidden) * passes * shape.packed),
            "cached": 2.0 * sizes.layers * sizes.keys * context * passes,
            "said": float(count * new_tokens),
        }
        for amounts in (scoring_amounts(sizes, spec, shape, read), scoring_amounts(sizes, spec, shape, told), more):
            for name, amount in amounts.items():
                found[name] = found.get(name, 0.0) + amount
    return found


def start_seconds(
    sizes: Sizes,
    spec: AdapterSpec,
    shape: Shape,
    *,
    stored_bytes: float | None = None,
    rows: int = 0,
    tokens: int = 0,
    speed: float = 1.0,
) -> float:
    """Return the CPU seconds of one process before its first pass: imports, reading and hashing a base of `stored_bytes` (None: its
    numbers in 16 bits), encoding it, reading `rows` of so many `tokens` in all."""
    stored = 2.0 * sizes.numbers if stored_bytes is None else stored_bytes
    seconds = IMPORT_S + READ_S * stored + HELD_S * step_memory(sizes, spec, shape).weights
    seconds += ENCODE_S * sizes.linear_numbers if shape.precision in CODE_BYTES else 0.0
    seconds += PEFT_S if isinstance(spec, PeftSpec) else DEEPSPEED_S if shape.zero_stage else 0.0
    return (seconds + ROW_S * rows + TOKEN_S * tokens) / speed


def seconds_of(amounts: Mapping[str, float], precision: str) -> float:
    """Return the CPU seconds of amounts by kind on one core of the reference machine."""
    number = COMPUTE_BYTES[precision]
    return sum(SECONDS[name][number] * amount for name, amount in amounts.items())


def operations(sizes: Sizes, spec: AdapterSpec) -> float:
    """Return the operations of training on one token."""
    matrices = sizes.linear_numbers + sizes.vocab * sizes.hidden
    return (6.0 if isinstance(spec, FullSpec) else 4.0) * matrices


def gpu_seconds(sizes: Sizes, spec: AdapterSpec, work: Work, flops: float) -> float:
    """Return the seconds of all steps on a GPU that does so many operations a second at such work."""
    return operations(sizes, spec) * work.tokens / flops


def cpu_seconds(
    sizes: Sizes, spec: AdapterSpec, precision: str, work: Work, *, slower: float | None = None, speed: float = 1.0
) -> float:
    """Return the seconds of all steps, activations kept. `slower`, where it is given: a step of the method beside LoRA's, whose law
    is taken then; `speed`: this machine beside one core of the reference."""
    shape = Shape(precision, work.pass_tokens)
    if slower is None or isinstance(spec, FullSpec):
        return training_seconds(sizes, spec, shape, work, speed=speed)
    return slower * training_seconds(sizes, LoraSpec(), shape, work, speed=speed)


def machine_speed(precision: str, clock: Literal["wall", "cpu"] = "wall", threads: int | None = None) -> float:
    """Return how fast this machine, with all its cores or so many threads, is beside one core of the reference machine, by products
    in a precision: as fast as they come to an end, or (cpu) by the seconds that cores spent, however busy they are otherwise."""
    command = [sys.executable, "-m", "kivnun.model.speed", precision, clock]
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)})
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    return float(found.stdout) / REFERENCE_FLOPS[COMPUTE_BYTES[precision]]
