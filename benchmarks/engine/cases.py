"""Which configurations are run, and how often: a case is one process that trains for some steps and says what they cost.

The group "extras" is one process instead, in which one step of each of its cases follows the other: their differences of a few
percent would drown in those between processes. Every process is given its cases as JSON, and a result file holds them all.
Next: `ours.py` and `peers.py` (the two sides), `runner.py` (who starts them).
"""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

# What `keep_freed_memory` sets from within; glibc reads these from outside. Any program's user could set them.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1), "MALLOC_TOP_PAD_": str(64 << 20)}

# Rows per pass at which TRL's padding-free mode was fastest, of 1, 2, 4, 8 and 16 (the group "trl_batches" measures them again).
# Its attention mask covers the whole pass, so that fewer rows cost less until the matrices get too small. 8 is its default.
TRL_BEST = {"71m": 1, "wide": 2, "small": 2}
TRL_BEST_TWO_THREADS = 2
TRL_DEFAULT = 8

ONE_PROCESS = "extras"
GROUPS = ("main", "two_threads", "wide", "accuracy", "accuracy_71m", "extras", "trl_batches")


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration of one side, and the group of the table it belongs to.

    `rows` make one step; the first of `steps` is not measured. `device_batch` rows per pass (and
    `rows / device_batch` accumulated passes), `padding_free` and `out_of_the_box` are TRL's; `packed`, ours, keeps weights as
    products read them.
    """

    group: str
    name: str
    side: Literal["ours", "trl"]
    model: str
    precision: str
    steps: int
    rows: int
    rounds: int
    threads: int = 1
    variant: str = "lora"
    objective: Literal["likelihood", "dpo"] = "likelihood"
    device_batch: int = TRL_DEFAULT
    padding_free: bool = True
    out_of_the_box: bool = False
    malloc_tuned: bool = False
    learning_rate: float = 1e-3
    max_grad_norm: float = 1.0
    packed: bool = True

    @property
    def environment(self) -> dict[str, str]:
        """Return what the process must find in its environment, since libraries read it when they load."""
        threads = str(self.threads)
        fixed = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        return fixed | (MALLOC if self.malloc_tuned else {})

    @property
    def same_mathematics(self) -> bool:
        """Return whether its losses must be those of every other such case on the same model and rows."""
        return self.objective == "likelihood" and self.variant == "lora" and self.precision != "nf4" and not self.out_of_the_box


def to_json(cases: Sequence[Case], work: str) -> str:
    return json.dumps({"work": work, "cases": [asdict(case) for case in cases]})


def from_json(text: str) -> tuple[list[Case], str]:
    """Return the cases of a process and the work folder."""
    told = json.loads(text)
    return [Case(**fields) for fields in told["cases"]], told["work"]


def quick_cases() -> list[Case]:
    """Return what fits in ten minutes on two cores: fewer steps and rounds, without the slowest peers."""
    return [
        *_compared("main", "71m", steps=3, rows=16, rounds=2, fp32_rounds=1),
        *_eight_rows("main", "71m", steps=3, rows=16, rounds=1)[:2],
        *_compared("two_threads", "71m", steps=3, rows=16, rounds=1, threads=2),
        *_compared("wide", "wide", steps=2, rows=8, rounds=1),
        *_trajectories("accuracy", "small", steps=20, rows=4),
        *_extras("extras", "71m", steps=5, rows=16, rounds=1),
    ]


def full_cases() -> list[Case]:
    """Return everything: all peers, five rounds of the headline."""
    return [
        *_compared("main", "71m", steps=6, rows=16, rounds=5),
        Case("main", "ours-dora", "ours", "71m", "bf16", 6, 16, 3, variant="dora"),
        Case("main", "ours-nf4", "ours", "71m", "nf4", 6, 16, 3),
        *_eight_rows("main", "71m", steps=6, rows=16, rounds=3),
        Case("main", "trl-bf16-padded", "trl", "71m", "bf16", 6, 16, 1, padding_free=False),
        Case("main", "trl-out-of-the-box", "trl", "71m", "fp32", 6, 16, 1, padding_free=False, out_of_the_box=True),
        *_compared("two_threads", "71m", steps=6, rows=16, rounds=3, threads=2),
        *_compared("wide", "wide", steps=4, rows=8, rounds=3),
        Case("wide", "ours-nf4", "ours", "wide", "nf4", 4, 8, 3),
        *(Case("wide", f"ours-{name}-unpacked", "ours", "wide", name, 4, 8, 3, packed=False) for name in ("bf16", "fp32")),
        *_trajectories("accuracy", "small", steps=20, rows=16),
        *_trajectories("accuracy_71m", "71m", steps=20, rows=16),
        *_extras("extras", "71m", steps=9, rows=16, rounds=3),
        *(
            Case("trl_batches", f"trl-{precision}-{batch}", "trl", "71m", precision, 3, 16, 1, device_batch=batch)
            for precision in ("bf16", "fp32")
            for batch in (1, 2, 4, 8, 16)
        ),
    ]


def chosen(cases: list[Case], groups: Container[str]) -> list[Case]:
    return [case for case in cases if case.group in groups]


def _compared(
    group: str, model: str, steps: int, rows: int, rounds: int, fp32_rounds: int | None = None, threads: int = 1
) -> list[Case]:
    """Return ours and TRL's best, in turns."""
    best = TRL_BEST[model] if threads == 1 else TRL_BEST_TWO_THREADS
    size = (steps, rows, rounds, threads)
    fp32_size = (steps, rows, fp32_rounds or rounds, threads)
    return [
        Case(group, "ours-bf16", "ours", model, "bf16", *size),
        Case(group, "trl-bf16", "trl", model, "bf16", *size, device_batch=best),
        Case(group, "trl-bf16-malloc", "trl", model, "bf16", *size, device_batch=best, malloc_tuned=True),
        Case(group, "ours-fp32", "ours", model, "fp32", *fp32_size),
        Case(group, "trl-fp32", "trl", model, "fp32", *fp32_size, device_batch=best),
    ]


def _eight_rows(group: str, model: str, steps: int, rows: int, rounds: int) -> list[Case]:
    """Return TRL padding-free with its default number of rows per pass."""
    size = (steps, rows, rounds)
    return [
        Case(group, "trl-bf16-8x2", "trl", model, "bf16", *size),
        Case(group, "trl-bf16-8x2-malloc", "trl", model, "bf16", *size, malloc_tuned=True),
        Case(group, "trl-fp32-8x2", "trl", model, "fp32", *size),
    ]


def _extras(group: str, model: str, steps: int, rows: int, rounds: int) -> list[Case]:
    """Return plain LoRA and what rides on the same path."""
    size = (steps, rows, rounds)
    return [
        Case(group, "ours-bf16", "ours", model, "bf16", *size),
        Case(group, "ours-nf4", "ours", model, "nf4", *size),
        *(Case(group, f"ours-{v}", "ours", model, "bf16", *size, variant=v) for v in ("dora", "dropout", "rslora", "head")),
        Case(group, "ours-dpo", "ours", model, "bf16", *size, objective="dpo"),
    ]


def _trajectories(group: str, model: str, steps: int, rows: int) -> list[Case]:
    best = TRL_BEST[model]
    return [
        Case(group, f"{side}-{precision}", side, model, precision, steps, rows, 1, device_batch=best)
        for precision in ("fp32", "bf16")
        for side in ("trl", "ours")
    ]
