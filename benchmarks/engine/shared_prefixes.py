"""`python -m benchmarks.engine.shared_prefixes`: what computing common prompts once brings, beside the same rows side by side.

Rows of one system prompt, and preference pairs of which each has a prompt of its own: steps of both ways in turns in one process,
CPU seconds of each, and how far losses and gradients are from one another (no update is made, so that every step has both).
Next: `cases.py` (the comparison with others).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.engine.workload import MODELS, adapter_folder, draw_rows, model_folder, write_workload
from kivnun.cli.process import keep_freed_memory
from kivnun.data.packing import micro_batches, pack
from kivnun.data.rows import PreferencePair, TokenRow, Trainable, Where
from kivnun.model.adapter_folder import load_peft
from kivnun.model.load import load_base
from kivnun.spec.resolve import CPU_MICRO_BATCH, MIN_MICRO_BATCH
from kivnun.train.engine import TorchEngine, Trainee
from kivnun.train.objectives import DpoObjective, LikelihoodObjective
from kivnun.train.optim import AdamWSettings
from kivnun.train.weights import AdapterWeights

ROWS = 16
PROMPTS = (40, 80, 160, 400, 800)
REPLY = 100  # tokens of each reply of a preference pair


@dataclass(frozen=True, slots=True)
class Way:
    """What a step came to: CPU seconds, tokens that were computed, loss, and the whole gradient."""

    seconds: float
    tokens: int
    loss: float
    gradient: Tensor


def main() -> None:
    options, screen = _options(), Console()
    keep_freed_memory()
    torch.set_num_threads(1)
    write_workload(options.work, options.model)
    table = Table("rows", "prompt", "precision", "computed", "speed", "loss apart", "gradient apart", title=options.model)
    for column in table.columns:
        column.no_wrap = True
    for precision in options.precisions:
        base = load_base(model_folder(options.work, options.model), precision, packed=True)
        weights = AdapterWeights(base, load_peft(base, adapter_folder(options.work, options.model, "lora")))
        for kind, make in (("a system prompt", _of_one_prompt), ("preference pairs", _pairs)):
            for prompt in options.prompts:
                steps = [make(prompt, step) for step in range(options.steps + 1)]
                dpo = DpoObjective(0.1, {item.sides[0].row: (-10.4 * REPLY, -10.4 * REPLY) for step in steps for item in step})
                objective = LikelihoodObjective() if make is _of_one_prompt else dpo
                trainee = TorchEngine(base).open(weights, objective, AdamWSettings(0.9, 0.999, 1e-8, 0.0))
                told = f"{kind}, {prompt}, {precision}"
                table.add_row(kind, str(prompt), precision, *_compared(trainee, steps, precision, told, screen))
    screen.print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.shared_prefixes", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="71m")
    parser.add_argument("--precisions", nargs="+", choices=("bf16", "fp32"), default=("bf16", "fp32"))
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS, help="tokens that rows have in common")
    parser.add_argument("--steps", type=int, default=4, help="steps of each way, after one that is not measured")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "kivnun-bench-engine")
    return parser.parse_args()


def _compared(trainee: Trainee, steps: list[list[Trainable]], precision: str, told: str, screen: Console) -> Iterator[str]:
    """Yield the columns of a comparison."""
    pairs: list[tuple[Way, Way]] = []
    for number, items in enumerate(track(steps, told, console=screen, transient=True)):
        ways = [_step(trainee, items, precision, share) for share in ((False, True) if number % 2 else (True, False))]
        pairs.append((ways[0], ways[1]) if number % 2 else (ways[1], ways[0]))
    apart, shared = zip(*pairs[1:], strict=True)
    yield f"{sum(way.tokens for way in shared) / sum(way.tokens for way in apart):.2f}"
    yield f"{statistics.median(a.seconds / s.seconds for a, s in zip(apart, shared, strict=True)):.2f} x"
    yield f"{max(abs(s.loss - a.loss) / abs(a.loss) for a, s in zip(apart, shared, strict=True)):.1e}"
    distances = [float((s.gradient - a.gradient).norm() / a.gradient.norm()) for a, s in zip(apart, shared, strict=True)]
    yield f"{max(distances):.1e}"


def _step(trainee: Trainee, items: Sequence[Trainable], precision: str, share: bool) -> Way:
    budget = max(MIN_MICRO_BATCH if share else CPU_MICRO_BATCH[precision], *(item.length for item in items))
    total = sum(trainee.objective.weight_of(item) for item in items)
    parameters = trainee.weights.parameters().values()
    began = time.process_time()
    packs = [pack(part, share) for part in micro_batches(items, budget, share)]
    loss = sum(trainee.forward_backward(batch, total) for batch in packs)
    seconds = time.process_time() - began
    gradient = torch.cat([p.grad.flatten().clone() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return Way(seconds, sum(batch.num_tokens for batch in packs), loss, gradient)


def _of_one_prompt(length: int, step: int) -> list[Trainable]:
    """Return chats of realistic length after one system prompt."""
    prompt = _ids(length, 0)
    rows: list[Trainable] = []
    for number, row in enumerate(draw_rows(ROWS, seed=100 + step)):
        ids, weights = prompt + list(row.ids), [0.0] * length + [float(trained) for trained in row.supervised]
        rows.append(_row(ids, weights, number))
    return rows


def _pairs(length: int, step: int) -> list[Trainable]:
    """Return pairs of two replies to a prompt of their own."""
    pairs: list[Trainable] = []
    for number in range(ROWS // 2):
        prompt = _ids(length, 1, step, number)
        weights = [0.0] * length + [1.0] * REPLY
        sides = [_row(prompt + _ids(REPLY, 2, step, number, side), weights, 2 * number + side) for side in range(2)]
        pairs.append(PreferencePair(sides[0], sides[1], step * ROWS + number, sides[0].where))
    return pairs


def _ids(length: int, *key: int) -> list[int]:
    return (3 + np.random.default_rng([length, *key]).zipf(1.3, size=length) % 32000).tolist()


def _row(ids: list[int], weights: list[float], number: int) -> TokenRow:
    return TokenRow(np.asarray(ids, np.int32), np.asarray(weights, np.float32), number, Where("bench", number + 1), 1)


if __name__ == "__main__":
    main()
