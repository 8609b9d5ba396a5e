"""The engine of one process: a base, and trainees on it with the verbs that everything else is built from.

`engine.open(...)` gives a trainee: forward, forward_backward, optim_step, sample, save, load. A verb knows rows and weights, not
epochs, schedules or files. Shapes: T tokens of a pack, S supervised positions, D model width.
Next: `model/linear.py` (the mathematics of adapters), `loop.py` (who calls the verbs).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kivnun.data.packing import PackedBatch, micro_batches, pack
from kivnun.data.rows import Trainable, Where
from kivnun.errors import IntegrityError, NonFiniteLossError
from kivnun.model.adapters import Adapter
from kivnun.model.attention import Rows
from kivnun.model.generate import OnToken, SamplingParams, generate
from kivnun.model.load import Base
from kivnun.model.loss import Head, are_likeliest, token_log_probs, weighted_nll
from kivnun.model.sites import Site
from kivnun.train.objectives import Objective
from kivnun.train.optim import AdamWSettings, MuonSettings, Optimizer, build_optimizer
from kivnun.train.weights import Weights


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an update was: the gradient's norm before clipping, the factor it was scaled by (1.0: not clipped), and for which share
    of the tokens with weight no other was likelier (nan: not measured)."""

    grad_norm: float
    clip_factor: float
    accuracy: float = math.nan


class FixedModel:
    """A base with an adapter, or with none, and the two verbs that need no training."""

    def __init__(self, base: Base, sites: Mapping[str, Site]) -> None:
        self._base = base
        self._sites = sites

    def forward(self, batch: PackedBatch) -> np.ndarray:
        """Return the log-probability (nats, float32 [S]) of each target token of the pack."""
        with self._base.using(self._sites):
            return _forward(self._base, batch)

    def forward_and_choice(self, batch: PackedBatch) -> tuple[np.ndarray, np.ndarray]:
        """Return what `forward` does, and for each target whether no token is likelier there (bool [S])."""
        with self._base.using(self._sites):
            return _forward_and_choice(self._base, batch)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        on_token: OnToken | None = None,
        streams: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Return the new token ids of each prompt; see `generate`."""
        with self._base.using(self._sites):
            return generate(self._base, prompts, params, on_token, streams)


class Trainee:
    """One adapter (or the whole model) with its own optimizer and counters."""

    def __init__(
        self,
        base: Base,
        weights: Weights,
        objective: Objective,
        optimizer: AdamWSettings | MuonSettings,
        max_grad_norm: float | None,
    ) -> None:
        self._base = base
        self.weights = weights
        self.objective = objective
        self._max_grad_norm = max_grad_norm
        self._parameters = weights.parameters()
        self._optimizer: Optimizer = build_optimizer(self._parameters, optimizer, _not_matrices(base), weights.rate_shares())
        self._rows_of_step: list[Where] = []
        self.hits: tuple[int, int] = (0, 0)  # of this step's tokens with weight: those that no other was likelier than, and all
        self.steps = 0

    @property
    def base(self) -> Base:
        return self._base

    @property
    def trainable_parameters(self) -> int:
        return sum(p.numel() for p in self._parameters.values())

    @property
    def moments(self) -> dict[str, Tensor]:
        """Return the optimizer's state by `MOMENT/PARAMETER`; empty before the first step."""
        return self._optimizer.state()

    def forward(self, batch: PackedBatch) -> np.ndarray:
        """Return the log-probability (nats, float32 [S]) of each target token of the pack; no gradient, no dropout."""
        with self._base.using(self.weights.sites()):
            return _forward(self._base, batch)

    def forward_and_choice(self, batch: PackedBatch) -> tuple[np.ndarray, np.ndarray]:
        """Return what `forward` does, and for each target whether no token is likelier there (bool [S])."""
        with self._base.using(self.weights.sites()):
            return _forward_and_choice(self._base, batch)

    def packs_of(self, items: Sequence[Trainable], micro_batch_tokens: int, share_prefixes: bool) -> tuple[list[PackedBatch], int]:
        """Return a step's items as packs, and the tokens of all packs."""
        packs = [pack(part, share_prefixes) for part in micro_batches(items, micro_batch_tokens, share_prefixes)]
        return packs, sum(batch.num_tokens for batch in packs)

    def forward_backward(self, batch: PackedBatch, total_weight: float) -> float:
        """Add the pack's share of the step's gradient; return its share of the step's loss (nats per unit of weight).

        `total_weight` is the weight of the whole step, over all its packs and processes: shares add up to the step's mean
        whatever the split. Raises NonFiniteLossError, naming the rows, before anything is updated.
        """
        self._rows_of_step.extend(batch.where)
        with self._base.using(self.weights.sites()):
            self.weights.draw_dropout(self.steps + 1, *token_places(self._base, batch))
            try:
                head = self._base.language_head(self.weights.head_parameters())
                h_SD = hidden(self._base, batch)
                likeliest_S = torch.zeros(len(h_SD), dtype=torch.bool, device=h_SD.device)
                surrogate, loss, nll_S = loss_of(head, h_SD, batch, self.objective, total_weight, likeliest_S)
                share = float(loss)
                self._refuse_non_finite(batch, share, nll_S)
                surrogate.backward()
                self._count_hits(batch, likeliest_S)
            finally:
                self.weights.stop_dropout()
        self.weights.collect_gradients()
        return share

    def discard_step(self) -> None:
        """Drop the gradients gathered since the last update, and what a pass that was broken off left of its own."""
        self.weights.drop_gradients()
        self._clear()

    def optim_step(self, learning_rate: float) -> StepResult:
        """Clip the gathered gradient, update, clear. Raises NonFiniteLossError before the update if the gradient is not finite."""
        self.weights.before_update()
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))
        if not np.isfinite(norm):
            raise non_finite(f"the gradient of step {self.steps + 1} is {norm}", self._rows_of_step)
        factor = 1.0
        if self._max_grad_norm is not None and norm > self._max_grad_norm:
            factor = self._max_grad_norm / (norm + 1e-6)
            for gradient in gradients:
                gradient.mul_(factor)
        self._optimizer.step(learning_rate)
        self.weights.after_update(self.steps + 1)
        self.weights.publish()
        accuracy = share_of(*self.hits)
        self._clear()
        self.steps += 1
        return StepResult(norm, factor, accuracy)

    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams, on_token: OnToken | None = None) -> list[list[int]]:
        """Return the new token ids of each prompt, written with this trainee's weights."""
        with self._base.using(self.weights.sites()):
            return generate(self._base, prompts, params, on_token)

    def save(self, folder: Path) -> None:
        """Write the complete state into an existing folder: tensors, moments, counters. `load` restores it to the bit."""
        save_file(_contiguous(self._parameters), folder / "state.safetensors")
        save_file(_contiguous(self._optimizer.state()), folder / "optimizer.safetensors")
        rest = self.weights.state()
        if rest:
            save_file(_contiguous(rest), folder / "rest.safetensors")
        (folder / "trainee.json").write_text(json.dumps({"steps": self.steps}) + "\n", encoding="utf-8")

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take the state of `save`. Raises IntegrityError when its tensors are not this trainee's."""
        tensors = load_file(folder / "state.safetensors")
        needed = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        check_fit(folder, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, needed)
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])
        self._optimizer.load(load_file(folder / "optimizer.safetensors"))
        if (folder / "rest.safetensors").is_file():
            self.weights.load_state(load_file(folder / "rest.safetensors"))
        self.weights.publish()
        self._clear()
        self.steps = int(json.loads((folder / "trainee.json").read_text(encoding="utf-8"))["steps"])

    def export(self, folder: Path, base_name: str) -> None:
        """Write what others load: a PEFT adapter folder, or a transformers model folder (full)."""
        self.weights.export(folder, base_name)

    def _clear(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None
        self._rows_of_step.clear()
        self.hits = (0, 0)

    def _count_hits(self, batch: PackedBatch, likeliest_S: Tensor) -> None:
        weighted_S = batch.weights_S != 0
        hits = np.count_nonzero(likeliest_S.cpu().numpy() & weighted_S)
        self.hits = (self.hits[0] + int(hits), self.hits[1] + int(np.count_nonzero(weighted_S)))

    def _refuse_non_finite(self, batch: PackedBatch, share: float, nll_S: Tensor) -> None:
        if np.isfinite(share):
            return
        raise non_finite(f"the loss of step {self.steps + 1} is {share}", broken_rows(batch, nll_S))


class Engine(Protocol):
    """What gives trainees: the verbs of `Trainee`, in one process or in many."""

    def open(
        self, weights: Weights, objective: Objective, optimizer: AdamWSettings | MuonSettings, max_grad_norm: float | None = None
    ) -> Any: ...


class TorchEngine:
    """The engine of one process. `open` gives trainees; `base_model` and `with_adapter` what is only used."""

    def __init__(self, base: Base) -> None:
        self.base = base

    def base_model(self) -> FixedModel:
        """Return the base as it is."""
        return FixedModel(self.base, {})

    def with_adapter(self, adapter: Adapter) -> FixedModel:
        """Return the base with a finished adapter."""
        return FixedModel(self.base, adapter.sites)

    def open(
        self, weights: Weights, objective: Objective, optimizer: AdamWSettings | MuonSettings, max_grad_norm: float | None = None
    ) -> Trainee:
        """Return a trainee of these weights (`AdapterWeights` or `FullWeights`), at step 0."""
        return Trainee(self.base, weights, objective, optimizer, max_grad_norm)


def loss_of(
    head: Head, h_SD: Tensor, batch: PackedBatch, objective: Objective, total_weight: float, likeliest_S: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what to take the gradient of, the pack's share of the loss (detached), and the NLL of each position [S].
    `likeliest_S`: see `weighted_nll`."""
    targets_S = torch.from_numpy(batch.targets_S).to(h_SD.device)
    weights_S, loss = objective.token_weights(batch, total_weight, lambda: token_log_probs(head, h_SD.detach(), targets_S))
    surrogate, nll_S = weighted_nll(head, h_SD, targets_S, weights_S, likeliest_S)
    return surrogate, surrogate.detach() if loss is None else loss, nll_S


def share_of(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def broken_rows(batch: PackedBatch, nll_S: Tensor) -> list[Where]:
    """Return the origins of the rows whose NLL is not finite, or of all where none is."""
    segments = sorted({int(batch.segment_S[s]) for s in torch.nonzero(~torch.isfinite(nll_S))[:, 0].tolist()})
    return [batch.where[segment] for segment in segments] or list(batch.where)


def hidden(base: Base, batch: PackedBatch) -> Tensor:
    """Return the final hidden states [S, D] at the supervised positions."""
    ids_T, positions_T, select_S = (_on(base, array) for array in (batch.ids_T, batch.positions_T, batch.select_S))
    parents = list(batch.parents) if max(batch.parents) >= 0 else None
    return base.hidden(ids_T, positions_T, Rows(list(batch.lengths), parents=parents), select_S)


@torch.no_grad()
def _forward(base: Base, batch: PackedBatch) -> np.ndarray:
    return token_log_probs(base.language_head(()), hidden(base, batch), _on(base, batch.targets_S)).cpu().numpy()


@torch.no_grad()
def _forward_and_choice(base: Base, batch: PackedBatch) -> tuple[np.ndarray, np.ndarray]:
    found, chosen = log_probs_and_choice(base.language_head(()), hidden(base, batch), _on(base, batch.targets_S))
    return found.cpu().numpy(), chosen.cpu().numpy()


def log_probs_and_choice(head: Head, h_SD: Tensor, targets_S: Tensor) -> tuple[Tensor, Tensor]:
    """Return each target's log-probability (float32 [S]) and whether no token is likelier (bool [S])."""
    log_probs_S = token_log_probs(head, h_SD, targets_S)
    likeliest_S = log_probs_S > math.log(0.5)  # nothing else can be as likely
    open_S = torch.nonzero(~likeliest_S)[:, 0]
    likeliest_S[open_S] = are_likeliest(head, h_SD[open_S], targets_S[open_S])
    return log_probs_S, likeliest_S


def _on(base: Base, array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).to(base.device)


def token_places(base: Base, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Return each token's row number and position (int64 [T] each), padded as the pass pads: what dropout is keyed by."""
    rows_T = np.repeat(np.asarray(batch.owners, dtype=np.int64), batch.lengths)
    return _on(base, base.padded(rows_T)), _on(base, base.padded(batch.positions_T))


def check_fit(folder: Path, found: Mapping[str, tuple[int, ...]], needed: Mapping[str, tuple[int, ...]]) -> None:
    """Raise IntegrityError where a checkpoint's tensors, by name and shape, are not those of the trainee."""
    if found != needed:
        odd = sorted(name for name, _ in found.items() ^ needed.items())
        raise IntegrityError(
            f"{folder} does not fit: {len(set(odd))} tensors differ, first {odd[0]}", hint="resume with the spec it was made by"
        )


def _not_matrices(base: Base) -> frozenset[str]:
    """Return the 2-D weights that are tables rather than maps: embedding and head."""
    names = {f"{base.head_name}.weight"}
    embedding = base.model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    return frozenset(names | {name for name, p in base.model.named_parameters() if p is embedding})


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def non_finite(what: str, rows: Sequence[Where]) -> NonFiniteLossError:
    shown = ", ".join(dict.fromkeys(str(where) for where in rows[:8]))
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    return NonFiniteLossError(
        f"{what}; rows in it: {shown}{more}",
        hint="nothing was updated: lower schedule.learning_rate, or look at these rows",
        pages=("19-nan-loss",),
    )
