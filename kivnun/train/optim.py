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
from torch.optim.adamw import adamw


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
    parameters: Mapping[str, nn.Parameter],
    settings: AdamWSettings | MuonSettings,
    not_matrices: frozenset[str],
    rate_shares: Mapping[str, float] | None = None,
) -> Optimizer:
    """Return the optimizer for these float32 parameters. `not_matrices` names those Muon must leave to AdamW although 2-D,
    `rate_shares` by what AdamW multiplies the learning rate for some (1 for those not named)."""
    if isinstance(settings, AdamWSettings):
        shares = {name: (rate_shares or {}).get(name, 1.0) for name in parameters}
        groups = {share: {name: p for name, p in parameters.items() if shares[name] == share} for share in shares.values()}
        return _Rules([_AdamW(members, settings, share) for share, members in groups.items()])
    assert not rate_shares, "the spec refuses rates of their own under Muon"
    matrices = {name: p for name, p in parameters.items() if p.ndim == 2 and name not in not_matrices}
    others = {name: p for name, p in parameters.items() if name not in matrices}
    rules: list[Optimizer] = [_Muon(matrices, settings)] if matrices else []
    rules += [_AdamW(others, settings.adamw, settings.adamw_share)] if others else []
    return _Rules(rules)


class _Rules:
    """Rules for tensors of different kinds, as one."""

    def __init__(self, rules: Sequence[Optimizer]) -> None:
        self._rules = rules

    def step(self, learning_rate: float) -> None:
        for rule in self._rules:
            rule.step(learning_rate)

    def state(self) -> dict[str, Tensor]:
        return {key: value for rule in self._rules for key, value in rule.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for rule in self._rules:
            rule.load(state)


class _AdamW:
    """AdamW that decays matrices alone: norms, biases and magnitudes have nothing to shrink to.

    The update is torch's function; torch's class of the same name would import its compiler, a second and 80 MB of it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: AdamWSettings, share: float) -> None:
        self._parameters, self._settings, self._share = dict(parameters), settings, share
        self._moments: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        trained = {name: p for name, p in self._parameters.items() if p.grad is not None}
        for name, p in trained.items():
            if not self._moments.get(name):  # its first gradient
                # The step counter stays where torch keeps it (CPU, float32); moments live beside their parameter.
                self._moments[name] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        for decayed in (True, False):
            names = [name for name, p in trained.items() if (p.ndim >= 2) == decayed]
            if names:
                self._update(names, learning_rate * self._share, self._settings.weight_decay if decayed else 0.0)

    def _update(self, names: Sequence[str], learning_rate: float, weight_decay: float) -> None:
        moments = [self._moments[name] for name in names]
        adamw(
            [self._parameters[name] for name in names],
            [self._parameters[name].grad for name in names],  # type: ignore[misc]
            [its["exp_avg"] for its in moments],
            [its["exp_avg_sq"] for its in moments],
            [],
            [its["step"] for its in moments],
            amsgrad=False,
            beta1=self._settings.beta1,
            beta2=self._settings.beta2,
            lr=learning_rate,
            weight_decay=weight_decay,
            eps=self._settings.eps,
            maximize=False,
        )

    def state(self) -> dict[str, Tensor]:
        return _flat(self._moments)

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._moments = {name: _moments_of(name, p, state) for name, p in self._parameters.items()}


class _Muon:
    """Muon by torch's class."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: MuonSettings) -> None:
        self._parameters = dict(parameters)
        self._rule = torch.optim.Muon(
            list(self._parameters.values()),
            lr=0.0,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )

    def step(self, learning_rate: float) -> None:
        for settings in self._rule.param_groups:
            settings["lr"] = learning_rate
        self._rule.step()

    def state(self) -> dict[str, Tensor]:
        return _flat({name: self._rule.state[p] for name, p in self._parameters.items()})

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, p in self._parameters.items():
            self._rule.state[p] = _moments_of(name, p, state)


def _flat(moments: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{moment}/{name}": value for name, its in moments.items() for moment, value in its.items()}


def _moments_of(name: str, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a parameter's own moments out of a saved state, each where it belongs."""
    its = {key.split("/", 1)[0]: value for key, value in state.items() if key.split("/", 1)[1] == name}
    return {moment: value.clone() if moment == "step" else value.to(parameter.device, copy=True) for moment, value in its.items()}
