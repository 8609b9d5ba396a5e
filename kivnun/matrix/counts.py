"""Row 8 of the table: what each technique trains, counted: numbers, moments, bytes of the file, and the modules it matched.

Counted twice over: on a base with its weights (what the optimizer holds, what is really written), and from a configuration alone by
each method's own formula, for bases that need not fit here. Next: `plan/trained.py` (the formulas), `memory_charts.py`.
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
from kivnun.model.families import find_base
from kivnun.model.load import DTYPES, load_base
from kivnun.plan.sizes import Sizes
from kivnun.plan.techniques import TECHNIQUES, adapter_of
from kivnun.plan.trained import trained_of
from kivnun.spec.adapters import AdapterSpec, FullSpec
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

    `precision` is what a whole model would be written in. Only families that Kivnun computes itself have known sizes.
    """
    spec = adapter_of(technique) if adapter is None else adapter
    sizes = Sizes.of(config.to_dict(), "the base")
    found = trained_of(sizes, spec)
    written = DTYPES[precision].itemsize * found.numbers if isinstance(spec, FullSpec) else 4 * (found.numbers + found.fixed)
    return Count(technique, sizes.numbers, found.numbers, 8 * found.numbers, written, None, found.modules)


def _modules_of(parameters: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in parameters))


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
