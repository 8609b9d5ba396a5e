"""Row 8 of the table: what each technique trains, counted: numbers, moments, bytes of the file, and the modules it matched.

Counted twice over: on a base with its weights (what the optimizer holds, what is really written), and from a configuration alone by
each method's own formula, for bases that need not fit here. Next: `shapes.py` (bases without weights), `charts.py`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kivnun.data.packing import pack
from kivnun.data.rows import TokenRow, Where
from kivnun.matrix.shapes import outline_of
from kivnun.matrix.techniques import TECHNIQUES, adapter_of
from kivnun.model.decoder import BlankLinear, Decoder
from kivnun.model.families import find_base
from kivnun.model.load import DTYPES, load_base
from kivnun.model.peft_layers import FEEDFORWARD
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
from kivnun.train.engine import TorchEngine
from kivnun.train.new_weights import new_weights
from kivnun.train.objectives import LikelihoodObjective
from kivnun.train.optim import AdamWSettings
from kivnun.train.weights import AdapterWeights

BUILT_IN = "kivnun/tiny-phi"
RUN_STEPS = 100  # that AdaLoRA is told its run has


@dataclass(frozen=True, slots=True)
class Count:
    """What a technique trains of a base.

    `modules` are the names of those matched, in the model's order. `tensor_bytes` is what the result's tensors take in its file,
    `file_bytes` the whole file as it was written (None: counted from a configuration).
    """

    technique: str
    base_numbers: int
    trained: int
    moment_bytes: int
    tensor_bytes: int
    file_bytes: int | None
    modules: tuple[str, ...] = field(repr=False)

    @property
    def share(self) -> float:
        """Return the trained numbers over the base's."""
        return self.trained / self.base_numbers

    @property
    def text(self) -> str:
        """Return a cell of row 8 in words."""
        size = self.tensor_bytes if self.file_bytes is None else self.file_bytes
        where = ", ".join(f"{number} {ending}" for ending, number in self.matched.items())
        held = f"{self.moment_bytes / 1e6:,.2f} MB of moments, a file of {size / 1e6:,.2f} MB"
        return f"{self.trained:,} of {self.base_numbers:,} numbers ({100 * self.share:.3g} %); {held}; {where}"

    @property
    def matched(self) -> dict[str, int]:
        """Return how many modules were matched of each last name."""
        endings = [name.rpartition(".")[2] for name in self.modules]
        return {ending: endings.count(ending) for ending in dict.fromkeys(endings)}


def count_all(base_name: str = BUILT_IN) -> dict[str, Count]:
    """Return every technique's count on a base, by making it, stepping it once and writing its result to a temporary folder."""
    return {technique: count(technique, find_base(base_name)) for technique in TECHNIQUES}


def count(technique: str, folder: Path) -> Count:
    """Return a technique's count on the base in a folder, as the optimizer and the file have it."""
    precision = "nf4" if TECHNIQUES[technique].coded else "fp32"
    base = load_base(folder, precision)
    spec = adapter_of(technique)
    weights = new_weights(spec, base, [], RUN_STEPS, 0)
    trainee = TorchEngine(base).open(weights, LikelihoodObjective(), AdamWSettings(0.9, 0.999, 1e-8, 0.0))
    numbers = base.num_parameters
    batch = pack([_row()])
    trainee.forward_backward(batch, batch.total_weight)
    trainee.optim_step(0.0)
    moments = sum(t.numel() * t.element_size() for name, t in trainee.moments.items() if not name.startswith("step/"))
    modules = (
        tuple(weights.adapter.sites) if isinstance(weights, AdapterWeights) else _modules_of(dict(base.model.named_parameters()))
    )
    with tempfile.TemporaryDirectory() as temporary:
        trainee.export(Path(temporary), str(folder))
        (file,) = Path(temporary).glob("*.safetensors")
        tensor_bytes, file_bytes = file.stat().st_size - _header_bytes(file), file.stat().st_size
    return Count(technique, numbers, trainee.trainable_parameters, moments, tensor_bytes, file_bytes, modules)


def _row() -> TokenRow:
    weights = np.ones(16, dtype=np.float32)
    weights[0] = 0.0
    return TokenRow(np.arange(3, 19, dtype=np.int32), weights, 0, Where("made", 1), 1)


def _header_bytes(file: Path) -> int:
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def count_config(technique: str, config: Any, adapter: AdapterSpec | None = None, precision: str = "fp32") -> Count:
    """Return a technique's count on transformers' configuration, by its formula; `adapter` in the place of the default options.

    `precision` is what a whole model would be written in. Only families that Kivnun computes itself have an outline.
    """
    spec = adapter_of(technique) if adapter is None else adapter
    decoder = outline_of(config)
    linears = {
        name: (module.in_features, module.out_features)
        for name, module in decoder.named_modules()
        if type(module) is BlankLinear and name != "lm_head"
    }
    numbers = sum(p.numel() for p in decoder.parameters())  # a tied matrix is one parameter
    if isinstance(spec, FullSpec):
        modules = _modules_of(dict(decoder.named_parameters()))
        return Count(technique, numbers, numbers, 8 * numbers, DTYPES[precision].itemsize * numbers, None, modules)
    if isinstance(spec, Targeted):
        chosen = _chosen(linears, spec)
        trained = sum(_trained_of(spec, name, *chosen[name]) for name in chosen)
        fixed = _shared_numbers(spec, chosen)
        return Count(technique, numbers, trained, 8 * trained, 4 * (trained + fixed), None, tuple(chosen))
    trained, modules = _other(spec, config, decoder)
    return Count(technique, numbers, trained, 8 * trained, 4 * trained, None, modules)


def _modules_of(parameters: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in parameters))


def _chosen(linears: Mapping[str, tuple[int, int]], spec: Targeted) -> dict[str, tuple[int, int]]:
    if spec.target_modules == "all-linear":
        return dict(linears)
    return {
        name: size
        for name, size in linears.items()
        if any(name == target or name.endswith("." + target) for target in spec.target_modules)
    }


def _trained_of(spec: Targeted, name: str, inputs: int, outputs: int) -> int:
    """Return how many numbers a method trains for one linear layer."""
    match spec:
        case LowRank():
            return spec.rank * (inputs + outputs) + (outputs if spec.kind == "dora" else 0)
        case LohaSpec():
            return 2 * spec.rank * (inputs + outputs)
        case LokrSpec():
            return _kronecker_numbers(spec, inputs, outputs)
        case VeraSpec():
            return spec.rank + outputs
        case AdaloraSpec():
            return spec.rank * (inputs + outputs + 1)
        case Ia3Spec():
            return inputs if name.endswith(FEEDFORWARD) else outputs
    raise AssertionError(f"no formula for {spec.kind}")  # type: ignore[attr-defined]


def _kronecker_numbers(spec: LokrSpec, inputs: int, outputs: int) -> int:
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


def _shared_numbers(spec: Targeted, chosen: Mapping[str, tuple[int, int]]) -> int:
    """Return the numbers that are written but not trained: VeRA's two random matrices, as large as the largest layer needs."""
    if not isinstance(spec, VeraSpec):
        return 0
    return spec.rank * (max(inputs for inputs, _ in chosen.values()) + max(outputs for _, outputs in chosen.values()))


def _other(spec: AdapterSpec, config: Any, decoder: Decoder) -> tuple[int, tuple[str, ...]]:
    """Return what a method trains that covers no linear layer, and the modules it belongs to."""
    if isinstance(spec, LnTuningSpec):
        norms = {name: p.numel() for name, p in decoder.named_parameters() if p.ndim == 1 and "norm" in name}
        return sum(norms.values()), _modules_of(norms)
    if isinstance(spec, PromptSpec):
        return spec.num_virtual_tokens * config.hidden_size, ("virtual_tokens",)
    assert isinstance(spec, PrefixSpec)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * width
    return spec.num_virtual_tokens * 2 * config.num_hidden_layers * keys, ("virtual_tokens",)


def as_json(counts: Mapping[str, Count]) -> str:
    """Return counts as text for a file: every figure, and the matched modules by their last names."""
    tree = {
        name: {
            "trained": it.trained, "base_numbers": it.base_numbers, "share": it.share, "moment_bytes": it.moment_bytes,
            "tensor_bytes": it.tensor_bytes, "file_bytes": it.file_bytes, "matched": it.matched, "modules": len(it.modules),
        }
        for name, it in counts.items()
    }  # fmt: skip
    return json.dumps(tree, indent=1) + "\n"
