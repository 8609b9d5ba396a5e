"""What is measured: models of Phi-3's shape with random weights, and steps of every technique on them. Loads no torch.

`CALIBRATION` are the points that the laws in `kivnun/plan` were fitted to. `VALIDATION` are those that they are shown beside: other
models, other lengths, other combinations. Next: `worker.py` (what a process does), `__main__.py` (who starts it).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kivnun.data.order import RowOrder
from kivnun.matrix.law_cases import Model
from kivnun.plan.sizes import Sizes
from kivnun.randomness import generator

MODELS = {
    # fitted to
    "9m": Model(hidden=256, layers=8, heads=4, kv_heads=4, mlp=704, vocab=4096),
    "28m": Model(hidden=384, layers=12, heads=6, kv_heads=6, mlp=1024, vocab=8192),
    "57m": Model(hidden=768, layers=8, heads=12, kv_heads=4, mlp=2048, vocab=4096),
    "71m": Model(hidden=512, layers=12, heads=8, kv_heads=4, mlp=1536, vocab=32064),
    # shown beside
    "4m": Model(hidden=192, layers=6, heads=6, kv_heads=3, mlp=512, vocab=3000),
    "41m": Model(hidden=448, layers=13, heads=7, kv_heads=7, mlp=1216, vocab=8000),
    "77m": Model(hidden=640, layers=12, heads=10, kv_heads=5, mlp=1792, vocab=16000),
    "94m": Model(hidden=768, layers=12, heads=12, kv_heads=4, mlp=2048, vocab=12288),
    "113m": Model(hidden=896, layers=11, heads=14, kv_heads=7, mlp=2432, vocab=8192),
}
SCORED_SHARE = 0.5  # of a row's tokens that are trained
SCORED_ROWS, PROMPTS, NEW_TOKENS = 8, 4, 24  # scored and answered after training


@dataclass(frozen=True, slots=True)
class Case:
    """One run: steps of `rows` rows of about `length` tokens, in passes of at most `pass_tokens`.

    `mixed` rows are of many lengths, log-normal about `length`; the second half of each row is trained. `packed` says whether
    frozen weights are kept as the kernels read them, which `tune` does on a CPU where they fit.
    """

    model: str
    kind: str
    precision: str
    length: int
    rows: int
    pass_tokens: int
    steps: int = 3
    mixed: bool = False
    packed: bool = False
    recompute: bool = False
    processes: int = 1
    zero_stage: int = 0

    @property
    def name(self) -> str:
        """Return the case in words that tell it from every other."""
        parts = [self.model, self.technique, f"{self.rows} x {'~' * self.mixed}{self.length} / {self.pass_tokens}"]
        parts += ["packed"] * self.packed + ["layers again"] * self.recompute
        parts += [f"{self.processes} processes"] if self.processes > 1 else []
        return ", ".join(parts + [f"ZeRO {self.zero_stage}"] * (self.zero_stage > 0))

    @property
    def technique(self) -> str:
        return f"{self.kind} {self.precision}"

    @property
    def sizes(self) -> Sizes:
        it = MODELS[self.model]
        return Sizes("phi3", it.hidden, it.layers, it.heads, it.kv_heads, it.hidden // it.heads, it.mlp, it.vocab, 4096)

    def lengths(self) -> list[int]:
        """Return the lengths of all rows of all steps, the same every time."""
        count = self.rows * self.steps
        if not self.mixed:
            return [self.length] * count
        drawn = self.length * np.exp(0.6 * generator(0, "plan", self.length, self.rows).standard_normal(count))
        return [int(it) for it in np.clip(drawn, 8, min(self.pass_tokens, 4 * self.length))]

    def order(self) -> RowOrder:
        """Return which rows make which step."""
        lengths = np.array(self.lengths())
        return RowOrder(lengths, (len(lengths),), None, self.rows, None, None, self.steps, 0)

    def step_lengths(self) -> list[list[int]]:
        """Return the lengths of each step's rows, in their order."""
        order = self.order()
        return [order.lengths[order.rows_of(step)].tolist() for step in range(1, self.steps + 1)]


CALIBRATION = (
    *(Case(model, "lora", p, 128, 8, 1024, packed=True) for model in ("9m", "28m", "57m", "71m") for p in ("fp32", "bf16")),
    *(Case(model, "lora", p, 128, 8, 1024) for model in ("28m", "71m") for p in ("fp32", "bf16", "nf4", "int8")),
    *(Case(model, "full", p, 128, 8, 1024) for model in ("9m", "57m", "71m") for p in ("fp32", "bf16")),
    *(Case("57m", kind, "fp32", 64, 4, 128) for kind in ("full", "lora")),
    *(Case("57m", kind, "bf16", 1024, 2, 2048) for kind in ("full", "lora")),
    *(Case("28m", kind, "fp32", 2048, 1, 2048) for kind in ("full", "lora")),
    *(Case("28m", "lora", p, 64, 16, 64) for p in ("fp32", "nf4", "int8")),
    *(Case("57m", "lora", p, 96, 16, 512, mixed=True, packed=True) for p in ("fp32", "bf16")),
    *(Case("9m", kind, "fp32", 64, 16, 4096, steps=8) for kind in ("full", "lora", "dora")),
    *(Case("57m", kind, p, 128, 8, 1024, recompute=True) for kind, p in (("full", "fp32"), ("lora", "bf16"), ("lora", "nf4"))),
    *(Case("28m", kind, "fp32", 256, 8, 1024, recompute=True, packed=kind != "full") for kind in ("full", "lora")),
    *(
        Case(model, kind, p, 128, 8, 512)
        for kind in ("dora", "ia3", "vera", "adalora", "prompt", "prefix", "loha", "lokr")
        for model, p in (("57m", "bf16"), ("28m", "fp32"))
    ),
    *(Case("57m", "full", "fp32", 128, 8, 512, processes=2, zero_stage=stage) for stage in (0, 1, 2, 3)),
    Case("28m", "full", "fp32", 64, 4, 128, processes=2, zero_stage=2),
    Case("28m", "full", "fp32", 64, 4, 128, processes=2, zero_stage=3),
    Case("57m", "lora", "fp32", 128, 8, 512, processes=2),
    Case("57m", "lora", "fp32", 128, 8, 512, processes=2, zero_stage=3),
    Case("57m", "lora", "nf4", 128, 8, 512, processes=2, zero_stage=2),
)

VALIDATION = (
    Case("94m", "full", "fp32", 128, 4, 512, steps=2),
    Case("77m", "full", "fp32", 64, 8, 512, steps=2, recompute=True),
    Case("41m", "full", "fp32", 256, 4, 1024),
    Case("4m", "full", "fp32", 64, 16, 4096, steps=8),
    Case("77m", "full", "bf16", 256, 4, 1024, steps=2),
    Case("113m", "full", "bf16", 256, 2, 512, steps=2),
    Case("41m", "full", "bf16", 1024, 2, 1024),
    Case("94m", "lora", "fp32", 128, 8, 512, steps=2, packed=True),
    Case("77m", "lora", "fp32", 2048, 1, 2048, steps=2),
    Case("113m", "lora", "fp32", 64, 4, 256, packed=True),
    Case("41m", "lora", "fp32", 96, 16, 512, mixed=True, packed=True),
    Case("4m", "lora", "fp32", 64, 16, 4096, steps=8, packed=True),
    Case("94m", "lora", "bf16", 128, 8, 640, packed=True),
    Case("113m", "lora", "bf16", 512, 2, 1024),
    Case("77m", "lora", "bf16", 128, 12, 640, mixed=True, packed=True),
    Case("41m", "lora", "bf16", 256, 8, 2048, recompute=True),
    Case("94m", "lora", "nf4", 128, 8, 4096, steps=2),
    Case("77m", "lora", "nf4", 64, 4, 64),
    Case("41m", "lora", "nf4", 2048, 1, 2048),
    Case("113m", "lora", "nf4", 256, 4, 1024, steps=2, recompute=True),
    Case("94m", "lora", "int8", 256, 4, 1024, steps=2),
    Case("41m", "lora", "int8", 64, 8, 512),
    Case("77m", "lora", "int8", 512, 2, 1024, recompute=True),
    Case("77m", "dora", "fp32", 128, 4, 512, packed=True),
    Case("94m", "dora", "bf16", 128, 8, 1024, steps=2),
    Case("41m", "dora", "nf4", 256, 4, 512),
    Case("94m", "ia3", "bf16", 128, 4, 512),
    Case("41m", "ia3", "fp32", 256, 4, 1024),
    Case("77m", "vera", "fp32", 128, 4, 512, steps=2, packed=True),
    Case("41m", "vera", "bf16", 256, 4, 1024),
    Case("94m", "adalora", "fp32", 128, 4, 512, steps=2, packed=True),
    Case("77m", "adalora", "bf16", 256, 4, 1024, steps=2),
    Case("77m", "prompt", "fp32", 64, 8, 512, packed=True),
    Case("113m", "prompt", "bf16", 128, 4, 512),
    Case("94m", "prefix", "fp32", 128, 4, 512, packed=True),
    Case("41m", "prefix", "bf16", 256, 4, 1024),
    Case("41m", "loha", "bf16", 128, 4, 512),
    Case("77m", "loha", "fp32", 128, 2, 256, steps=2),
    Case("77m", "lokr", "bf16", 128, 4, 512, steps=2),
    Case("41m", "lokr", "fp32", 128, 4, 256),
    *(Case("41m", "full", "fp32", 64, 8, 256, processes=2, zero_stage=stage) for stage in (0, 1, 2, 3)),
    Case("77m", "full", "fp32", 128, 4, 256, steps=2, processes=2, zero_stage=2),
    Case("77m", "full", "fp32", 128, 4, 256, steps=2, processes=2, zero_stage=3),
    Case("77m", "lora", "fp32", 128, 4, 256, processes=2),
    Case("94m", "lora", "fp32", 128, 4, 256, processes=2, zero_stage=3),
)
