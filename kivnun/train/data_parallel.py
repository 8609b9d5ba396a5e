"""Several processes that divide a step's rows and nothing else: each holds everything, and gradients are summed before an update.

ZeRO's stage 0, without DeepSpeed: any weights, any optimizer. Also what all engines of several processes share: how a step's rows
are dealt out. Next: `processes.py`, `deepspeed_engine.py` (which divides state too).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from kivnun.data.packing import PackedBatch, micro_batches, pack
from kivnun.data.rows import Trainable
from kivnun.model.generate import OnToken, SamplingParams
from kivnun.model.load import Base
from kivnun.train.engine import StepResult, TorchEngine, Trainee, share_of
from kivnun.train.objectives import Objective
from kivnun.train.optim import AdamWSettings, MuonSettings
from kivnun.train.passes import PassTooLarge, is_short_of_memory
from kivnun.train.processes import Processes, lost_processes, tokens_apart
from kivnun.train.weights import Weights


def dealt_packs(
    items: Sequence[Trainable], micro_batch_tokens: int, share_prefixes: bool, processes: Processes
) -> tuple[list[PackedBatch], int]:
    """Return this process's packs of a step, as many as every other's, and the tokens of all processes' packs.

    Items are dealt out by their tokens. A process with fewer packs than another goes through the step's shortest item again with
    weights of zero: every process takes part in every exchange, and nothing is added.
    """
    hands = tokens_apart([item.length for item in items], processes.count)
    packs = [
        [pack(part, share_prefixes) for part in micro_batches([items[place] for place in hand], micro_batch_tokens, share_prefixes)]
        for hand in hands
    ]
    shortest = pack([min(items, key=lambda item: item.length)], share_prefixes)
    idle = replace(shortest, weights_S=np.zeros_like(shortest.weights_S))
    most = max(map(len, packs))
    filled = [its + [idle] * (most - len(its)) for its in packs]
    return filled[processes.rank], sum(batch.num_tokens for its in filled for batch in its)


def weight_of_pass(batch: PackedBatch, total_weight: float) -> float:
    """Return what a pass's weights are divided by: for one that is only there to take part, infinity makes every loss zero."""
    return total_weight if batch.weights_S.any() else math.inf


class DataParallelTrainee:
    """A trainee that every process holds whole. Verbs are called by all, with the same arguments but for `forward_backward`."""

    def __init__(self, whole: Trainee, processes: Processes) -> None:
        self._whole, self._processes = whole, processes
        self.weights, self.objective = whole.weights, whole.objective

    @property
    def steps(self) -> int:
        return self._whole.steps

    @property
    def trainable_parameters(self) -> int:
        return self._whole.trainable_parameters

    def packs_of(self, items: Sequence[Trainable], micro_batch_tokens: int, share_prefixes: bool) -> tuple[list[PackedBatch], int]:
        """Return this process's packs of a step, and the tokens of all processes' packs."""
        return dealt_packs(items, micro_batch_tokens, share_prefixes, self._processes)

    def forward(self, batch: PackedBatch) -> np.ndarray:
        """Return the log-probability (nats, float32 [S]) of each target token of the pack; no gradient, no dropout."""
        return self._whole.forward(batch)

    def forward_and_choice(self, batch: PackedBatch) -> tuple[np.ndarray, np.ndarray]:
        """Return what `forward` does, and for each target whether no token is likelier there (bool [S])."""
        return self._whole.forward_and_choice(batch)

    def forward_backward(self, batch: PackedBatch, total_weight: float) -> float:
        """Add the pack's share of the step's gradient; return all processes' share of the step's loss.

        Raises PassTooLarge in every process where memory ran out in one."""
        share = self._processes.total(self._own_share(batch, weight_of_pass(batch, total_weight)))
        if math.isinf(share):
            raise PassTooLarge("in one of the processes")
        return share

    def _own_share(self, batch: PackedBatch, total_weight: float) -> float:
        """Return this process's share of the loss; infinity, which no loss is, tells the others that memory ran out."""
        try:
            return self._whole.forward_backward(batch, total_weight)
        except (MemoryError, RuntimeError) as error:
            if not is_short_of_memory(error):
                raise
            return math.inf

    def discard_step(self) -> None:
        """Drop what was gathered since the last update, in this process."""
        self._whole.discard_step()

    def optim_step(self, learning_rate: float) -> StepResult:
        """Sum the gradients of all processes, then clip, update and clear, the same in each."""
        with lost_processes():
            for parameter in self.weights.parameters().values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
        hits, tokens = (self._processes.total(count) for count in self._whole.hits)
        return replace(self._whole.optim_step(learning_rate), accuracy=share_of(hits, tokens))

    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams, on_token: OnToken | None = None) -> list[list[int]]:
        """Return the new token ids of each prompt, written with this trainee's weights."""
        return self._whole.sample(prompts, params, on_token)

    def save(self, folder: Path) -> None:
        """Write the complete state: the first process does."""
        if self._processes.rank == 0:
            self._whole.save(folder)
        self._processes.any(False)  # nobody goes on, and may be killed with others, before it is written

    def load(self, folder: Path) -> None:
        """Take the state of `save`."""
        self._whole.load(folder)

    def export(self, folder: Path, base_name: str) -> None:
        """Write what others load: the first process does."""
        if self._processes.rank == 0:
            self._whole.export(folder, base_name)


class DataParallelEngine:
    """A base that every process holds; `open` gives trainees that divide a step's rows."""

    def __init__(self, base: Base, processes: Processes) -> None:
        self._engine, self._processes = TorchEngine(base), processes

    def open(
        self, weights: Weights, objective: Objective, optimizer: AdamWSettings | MuonSettings, max_grad_norm: float | None = None
    ) -> DataParallelTrainee:
        """Return a trainee of these weights, at step 0."""
        return DataParallelTrainee(self._engine.open(weights, objective, optimizer, max_grad_norm), self._processes)
