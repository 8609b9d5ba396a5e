"""How many numbers a technique trains of a base, by each method's own formula. Next: `memory.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kivnun.model.families import FEEDFORWARD
from kivnun.plan.sizes import Sizes
from kivnun.spec.adapters import (
    AdaloraSpec,
    AdapterSpec,
    FullSpec,
    Ia3Spec,
    LnTuningSpec,
    LohaSpec,
    LokrSpec,
    LowRank,
    PrefixSpec,
    PromptSpec,
    Targeted,
    VeraSpec,
)


@dataclass(frozen=True, slots=True)
class Trained:
    """What is trained: `numbers` of them, in `modules` (by name), with `fixed` ones that are written beside them untrained."""

    numbers: int
    modules: tuple[str, ...]
    fixed: int = 0


def trained_of(sizes: Sizes, spec: AdapterSpec) -> Trained:
    """Return what an adapter trains of a base of these sizes."""
    match spec:
        case FullSpec():
            return Trained(sizes.numbers, sizes.modules)
        case LnTuningSpec():
            return Trained(sum(sizes.norms.values()), tuple(sizes.norms))
        case PromptSpec():
            return Trained(spec.num_virtual_tokens * sizes.hidden, ("virtual_tokens",))
        case PrefixSpec():
            return Trained(spec.num_virtual_tokens * 2 * sizes.layers * sizes.keys, ("virtual_tokens",))
        case _:
            chosen = chosen_linears(sizes, spec)
            return Trained(sum(_numbers(spec, name, *chosen[name]) for name in chosen), tuple(chosen), _fixed(spec, chosen))


def chosen_linears(sizes: Sizes, spec: Targeted) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of the linear layers that an adapter is for."""
    if spec.target_modules == "all-linear":
        return dict(sizes.linears)
    wanted = spec.target_modules
    return {name: size for name, size in sizes.linears.items() if any(name == w or name.endswith("." + w) for w in wanted)}


def _numbers(spec: Targeted, name: str, inputs: int, outputs: int) -> int:
    """Return how many numbers a method trains for one linear layer."""
    match spec:
        case LowRank():
            return spec.rank * (inputs + outputs) + (outputs if spec.kind == "dora" else 0)
        case LohaSpec():
            return 2 * spec.rank * (inputs + outputs)
        case LokrSpec():
            return kronecker_numbers(spec, inputs, outputs)
        case VeraSpec():
            return spec.rank + outputs
        case AdaloraSpec():
            return spec.rank * (inputs + outputs + 1)
        case Ia3Spec():
            return inputs if name.endswith(FEEDFORWARD) else outputs
    raise AssertionError(f"no formula for {spec.kind}")  # type: ignore[attr-defined]


def kronecker_numbers(spec: LokrSpec, inputs: int, outputs: int) -> int:
    """Return the numbers of W = w1 (x) w2, w1 of the smaller factors of both sides, w2 of the larger ones and of low rank where
    that is smaller (PEFT 0.21, tuners/lokr/layer.py)."""
    (in_small, in_large), (out_small, out_large) = (_factors(size, spec.decompose_factor) for size in (inputs, outputs))
    small, large = out_small * in_small, out_large * in_large
    if spec.decompose_both and spec.rank < max(out_small, in_small) / 2:
        small = spec.rank * (out_small + in_small)
    if spec.rank < max(out_large, in_large) / 2:
        large = spec.rank * (out_large + in_large)
    return small + large


def _factors(size: int, most: int) -> tuple[int, int]:
    """Return two factors of a number, the smaller first: as alike as can be, the smaller one at most `most` (-1: no limit)."""
    if most > 0 and size % most == 0:
        return most, size // most
    limit = size if most == -1 else most
    small = max(f for f in range(1, int(size**0.5) + 1) if size % f == 0 and f <= limit)
    return small, size // small


def _fixed(spec: Targeted, chosen: Mapping[str, tuple[int, int]]) -> int:
    """Return the numbers that are written but not trained: VeRA's two random matrices, as large as the largest layer needs."""
    if not isinstance(spec, VeraSpec):
        return 0
    return spec.rank * (max(inputs for inputs, _ in chosen.values()) + max(outputs for _, outputs in chosen.values()))
