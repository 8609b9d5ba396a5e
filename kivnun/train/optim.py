"""Optimizers over named float32 tensors, with their moments open to saving by name.

The update rules are torch's; what is ours is which tensor gets which rule, and that state is a flat mapping of names to
tensors, the one form in which every engine saves it. Next: `engine.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class Optimizer(Protocol):
    """An update rule with state."""

    def step(self, learning_rate: float) -> None:
        """Update every parameter in place from its `.grad`."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return the moments by `MOMENT/PARAMETER`; empty before the first step."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the moments of `state()`, to the bit."""
        ...


@dataclass(frozen=True, slots=True)
class AdamWSettings:
    """Decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2)."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclass(frozen=True, slots=True)
class MuonSettings:
    """Muon (Jordan et al. 2024) for matrices of the trunk, its update scaled to AdamW's usual size (Liu et al. 2025, section 2.2);
    AdamW at `adamw_share` of the learning rate for embeddings, heads and vectors."""

    momentum: float
    weight_decay: float
    adamw_share: float
    adamw: AdamWSettings


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], settings: AdamWSettings | MuonSettings, not_matrices: frozenset[str]
) -> Optimizer:
    """Return the optimizer for these float32 parameters. `not_matrices` names those Muon must leave to AdamW although 2-D."""
    if isinstance(settings, AdamWSettings):
        return _Named([_Group(dict(parameters), _adamw(parameters, settings), 1.0)])
    matrices = {name: p for name, p in parameters.items() if p.ndim == 2 and name not in not_matrices}
    others = {name: p for name, p in parameters.items() if name not in matrices}
    groups = []
    if matrices:
        groups.append(_Group(matrices, _muon(list(matrices.values()), settings), 1.0))
    if others:
        groups.append(_Group(others, _adamw(others, settings.adamw), settings.adamw_share))
    return _Named(groups)


@dataclass(frozen=True, slots=True)
class _Group:
    parameters: dict[str, nn.Parameter]
    rule: torch.optim.Optimizer
    learning_rate_share: float


class _Named:
    def __init__(self, groups: Sequence[_Group]) -> None:
        self._groups = groups

    def step(self, learning_rate: float) -> None:
        for group in self._groups:
            for settings in group.rule.param_groups:
                settings["lr"] = learning_rate * group.learning_rate_share
            group.rule.step()

    def state(self) -> dict[str, Tensor]:
        return {
            f"{moment}/{name}": value
            for group in self._groups
            for name, parameter in group.parameters.items()
            for moment, value in group.rule.state[parameter].items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        for group in self._groups:
            for name, parameter in group.parameters.items():
                moments = {key.split("/", 1)[0]: value for key, value in state.items() if key.split("/", 1)[1] == name}
                # Step counters stay where torch keeps them (CPU, float32); moments live beside their parameter.
                group.rule.state[parameter] = {
                    moment: value.clone() if moment == "step" else value.to(parameter.device, copy=True)
                    for moment, value in moments.items()
                }


def _adamw(parameters: Mapping[str, nn.Parameter], settings: AdamWSettings) -> torch.optim.Optimizer:
    """AdamW that decays matrices alone: norms, biases and magnitudes have nothing to shrink to."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=0.0, betas=(settings.beta1, settings.beta2), eps=settings.eps
    )


def _muon(parameters: list[nn.Parameter], settings: MuonSettings) -> torch.optim.Optimizer:
    return torch.optim.Muon(
        parameters, lr=0.0, momentum=settings.momentum, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
