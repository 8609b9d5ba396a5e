"""From the spec's adapter section to the tensors that are trained, at their start. Next: `weights.py`, `model/adapters.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from kivnun.data.packing import PackedBatch, micro_batches, pack
from kivnun.data.rows import Trainable
from kivnun.errors import SpecError
from kivnun.model.adapters import Adapter, AdapterShape, new_adapter, resolve_targets
from kivnun.model.families import FEEDFORWARD
from kivnun.model.load import Base
from kivnun.randomness import key_128, permutation
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
from kivnun.train.continued import check_start, open_start
from kivnun.train.weights import AdapterWeights, FullWeights, Weights

EVA_TOKENS = 16_384  # of training rows that EVA looks at
EVA_PASS = 512  # of them in one pass: directions are found anew after each


def check_targets(spec: AdapterSpec, base: Base) -> None:
    """Raise where the spec names layers that the base does not have, or an adapter to start from that does not fit it."""
    if isinstance(spec, LowRank) and spec.start_from is not None:
        check_start(spec, base)
    elif isinstance(spec, Targeted):
        resolve_targets(base, spec.target_modules)


def new_weights(spec: AdapterSpec, base: Base, rows: Sequence[Trainable], steps: int, seed: int) -> Weights:
    """Return what the spec trains, at its start. `rows` are looked at by EVA alone, `steps` of the run counted by AdaLoRA."""
    if isinstance(spec, FullSpec):
        return FullWeights(base)
    ratio = spec.loraplus_lr_ratio if isinstance(spec, LowRank) else 1.0
    return AdapterWeights(base, _new_adapter(spec, base, rows, steps, seed), ratio)


def _new_adapter(spec: AdapterSpec, base: Base, rows: Sequence[Trainable], steps: int, seed: int) -> Adapter:
    if isinstance(spec, LowRank) and spec.start_from is not None:
        return open_start(spec, base, seed)
    if isinstance(spec, LowRank):
        sites = resolve_targets(base, spec.target_modules)
        shape = AdapterShape(spec.kind, spec.rank, cast(float, spec.alpha), spec.dropout, spec.rslora, sites)
        return new_adapter(base, shape, spec.init, seed, _looked_at(rows, seed))
    if isinstance(spec, LnTuningSpec):
        from kivnun.model.norms import new_norms

        return new_norms(base)
    if isinstance(spec, PromptSpec | PrefixSpec):
        from kivnun.model.prompts import new_prefix, new_prompt

        new = new_prompt if isinstance(spec, PromptSpec) else new_prefix
        return new(base, spec.num_virtual_tokens, seed)
    assert isinstance(spec, Targeted)
    from kivnun.model.peft_layers import new_layers

    sites = resolve_targets(base, spec.target_modules)
    return new_layers(base, _peft_config(spec, sites, steps, seed), sites, seed)


def _looked_at(rows: Sequence[Trainable], seed: int) -> Iterator[PackedBatch]:
    """Yield packs of rows drawn by the seed, up to EVA_TOKENS."""
    drawn, tokens = [], 0
    for place in permutation(len(rows), seed, "eva").tolist():
        if tokens >= EVA_TOKENS:
            break
        drawn.append(rows[place])
        tokens += rows[place].length
    longest = max(row.length for row in drawn)
    for part in micro_batches(drawn, max(EVA_PASS, longest)):
        yield pack(part)


def _peft_config(spec: Targeted, sites: Sequence[str], steps: int, seed: int) -> Any:
    """Return PEFT's configuration of a method whose layers are PEFT's."""
    from kivnun.model.peft_layers import peft

    configs = peft()
    if isinstance(spec, LohaSpec):
        return configs.LoHaConfig(r=spec.rank, alpha=cast(int, spec.alpha))
    if isinstance(spec, LokrSpec):
        return configs.LoKrConfig(
            r=spec.rank, alpha=cast(int, spec.alpha), decompose_factor=spec.decompose_factor, decompose_both=spec.decompose_both
        )
    if isinstance(spec, VeraSpec):
        return configs.VeraConfig(r=spec.rank, d_initial=spec.d_initial, projection_prng_key=key_128(seed, "vera") % 2**31)
    if isinstance(spec, Ia3Spec):
        return configs.IA3Config(target_modules=list(sites), feedforward_modules=[s for s in sites if s.endswith(FEEDFORWARD)])
    assert isinstance(spec, AdaloraSpec)
    first, last = int(spec.initial_share * steps), int(spec.final_share * steps)
    if first >= steps - last:
        count = f"{steps} step{'s' * (steps != 1)}"
        raise SpecError(
            f"adapter is adalora, whose ranks are given up between two parts of the run, but it has {count}",
            hint="train for more steps, or choose lora",
        )
    return configs.AdaLoraConfig(
        init_r=spec.rank,
        target_r=spec.target_rank,
        lora_alpha=cast(int, spec.alpha),
        tinit=first,
        tfinal=last,
        deltaT=spec.allocate_every_steps,
        orth_reg_weight=spec.orth_reg_weight,
        total_step=steps,
    )
