"""The methods that fill the table's columns: the spec section of each, and the learning rates that a sweep tries.

Next: `jobs.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kivnun.spec.resolve import default_rate


@dataclass(frozen=True, slots=True)
class Method:
    """What is trained, on a base in what precision. `spread` are the factors of the default learning rate that a sweep tries."""

    name: str
    adapter: dict[str, Any]
    precision: str = "fp32"
    spread: tuple[float, ...] = (0.4, 1.0, 2.5)

    def rates(self, kind: str) -> tuple[float, ...]:
        """Return the rates of a sweep for an objective ("supervised", "pretraining"), smallest first."""
        usual = default_rate(kind, str(self.adapter["kind"]), tiny=True)  # type: ignore[arg-type]
        return tuple(float(f"{usual * factor:.3g}") for factor in self.spread)

    def usual_rate(self, kind: str) -> float:
        return default_rate(kind, str(self.adapter["kind"]), tiny=True)  # type: ignore[arg-type]


METHODS = {
    method.name: method
    for method in (
        Method("full", {"kind": "full"}, spread=(1.0, 2.5, 5.0)),
        Method("lora", {"kind": "lora"}, spread=(1.0, 2.5, 5.0)),
        Method("qlora", {"kind": "lora"}, "nf4", spread=(1.0, 2.5, 5.0)),
        Method("dora", {"kind": "dora"}, spread=(1.0, 2.5, 5.0)),
        Method("adalora", {"kind": "adalora"}),
        Method("loha", {"kind": "loha"}),
        Method("lokr", {"kind": "lokr"}),
        Method("vera", {"kind": "vera"}),
        Method("ia3", {"kind": "ia3"}),
        Method("ln_tuning", {"kind": "ln_tuning"}),
        Method("prompt", {"kind": "prompt"}),
        Method("prefix", {"kind": "prefix"}),
    )
}
OF_COLUMN = {
    "LoRA": ("lora",),
    "QLoRA": ("qlora",),
    "DoRA": ("dora",),
    "PEFT": ("lora", "qlora", "dora", "adalora", "loha", "lokr", "vera", "ia3", "ln_tuning", "prompt", "prefix"),
}
"""The methods of each column that says what is trained. PEFT is a family: LoRA, QLoRA and DoRA belong to it."""
SHARDED = {"DeepSpeed": (2,), "ZeRO": (1, 2, 3)}
"""The ZeRO stages of each column that says where it lies."""
