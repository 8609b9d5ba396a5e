"""What is measured: models of Phi-3's shape with random weights, and runs of one to four processes on them. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

TOKENS = 64  # of the one row that a process computes with in a step
STEPS = 2


@dataclass(frozen=True, slots=True)
class Model:
    """The shape of a Phi-3 model with untied head."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int

    @property
    def parameters(self) -> int:
        head = self.hidden // self.heads
        qkv = (self.heads + 2 * self.kv_heads) * head
        layer = self.hidden * (qkv + self.hidden + 3 * self.mlp + 2)
        return self.layers * layer + 2 * self.vocab * self.hidden + self.hidden


MODELS = {
    "95m": Model(hidden=768, layers=12, heads=12, kv_heads=4, mlp=2048, vocab=12288),
    "28m": Model(hidden=384, layers=14, heads=6, kv_heads=2, mlp=1024, vocab=8192),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One launch: so many processes on a model."""

    model: str
    kind: Literal["full", "lora", "dora"]
    precision: Literal["fp32", "nf4"]
    zero_stage: int
    processes: int
    offload: str = "none"

    @property
    def group(self) -> str:
        """Return what is the same over the numbers of processes."""
        what = {"full": "full", "lora": "LoRA", "dora": "DoRA"}[self.kind]
        stage = f"ZeRO-{self.zero_stage}" if self.zero_stage else "rows alone"
        return f"{stage}, {what}, {self.precision}" + (f", {self.offload} left on the CPU" if self.offload != "none" else "")


def cases(model: str, counts: Sequence[int], *, quick: bool) -> list[Case]:
    """Return the launches of a table."""
    kinds: list[tuple[Literal["full", "lora"], Literal["fp32", "nf4"], int]] = [("full", "fp32", 2), ("full", "fp32", 3)]
    if not quick:
        kinds = [("full", "fp32", 0), ("full", "fp32", 1), *kinds, ("lora", "fp32", 3), ("lora", "nf4", 3)]
    found = [Case(model, kind, precision, stage, count) for kind, precision, stage in kinds for count in counts]
    return found if quick else [*found, Case(model, "full", "fp32", 3, 2, "optimizer")]
