"""The techniques as runs: the spec section of each, and the learning rates that a sweep tries.

Next: `jobs.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kivnun.plan.techniques import TECHNIQUES
from kivnun.spec.resolve import default_rate


@dataclass(frozen=True, slots=True)
class Method:
    """What is trained, on a base in what precision. `spread` are the factors of the default learning rate that a sweep tries."""

    name: str
    adapter: dict[str, Any]
    precision: str = "fp32"
    spread: tuple[float, ...] = (1.0,)

    def rates(self, kind: str) -> tuple[float, ...]:
        """Return the rates of a sweep for an objective ("supervised", "pretraining"), smallest first."""
        usual = default_rate(kind, str(self.adapter["kind"]), tiny=True)  # type: ignore[arg-type]
        return tuple(float(f"{usual * factor:.3g}") for factor in self.spread)

    def usual_rate(self, kind: str) -> float:
        return default_rate(kind, str(self.adapter["kind"]), tiny=True)  # type: ignore[arg-type]


NARROW, WIDE = (1.0, 2.5, 5.0), (0.4, 1.0, 2.5)
METHODS = {
    name: Method(name, {"kind": it.kind}, "nf4" if it.coded else "fp32", NARROW if it.kind in ("full", "lora", "dora") else WIDE)
    for name, it in TECHNIQUES.items()
}
SHARDED = {"DeepSpeed": (2,), "ZeRO": (1, 2, 3)}
"""The ZeRO stages of each column that says where it lies."""
