"""What a trainee trains: an adapter's tensors, or the base's own weights. Two types, one shape.

Either way the optimizer sees float32 tensors by name. An adapter's are its own; a bfloat16 base keeps float32 masters beside
it, since a bfloat16 weight swallows small updates. Next: `engine.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from kivnun.model.adapters import Adapter
from kivnun.model.load import Base
from kivnun.model.sites import Site


class Weights(Protocol):
    """The trained tensors of one trainee and how they meet the base."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the float32 tensors the optimizer updates, by name."""
        ...

    def sites(self) -> Mapping[str, Site]:
        """Return what is lent to the base for a pass."""
        ...

    def head_parameters(self) -> list[Tensor]:
        """Return the trained tensors that the language head uses."""
        ...

    def draw_dropout(self, step: int, rows_T: Tensor, positions_T: Tensor) -> None: ...

    def stop_dropout(self) -> None: ...

    def collect_gradients(self) -> None:
        """Add the gradients of the pass just run to those of `parameters()`."""
        ...

    def drop_gradients(self) -> None:
        """Forget the gradients of a pass that was broken off, where they are not those of `parameters()`."""
        ...

    def publish(self) -> None:
        """Make the base compute with the updated `parameters()`."""
        ...

    def rate_shares(self) -> Mapping[str, float]:
        """Return by what the learning rate is multiplied for some of `parameters()`; 1 for those not named."""
        ...

    def before_update(self) -> None:
        """Add, once per step, the gradient of what is made small beside the loss."""
        ...

    def after_update(self, step: int) -> None:
        """Change, once per step (counted from 1), what the optimizer does not: gradients are still there."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return what an exact resume needs beside `parameters()` and their moments."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave."""
        ...

    def export(self, folder: Path, base_name: str) -> None:
        """Write what others load: a PEFT adapter folder, or a transformers model folder."""
        ...


class AdapterWeights:
    """An adapter's tensors; the base stays as it is. `loraplus_lr_ratio` multiplies the rate of each B (Hayou et al. 2024,
    arXiv:2402.12354)."""

    def __init__(self, base: Base, adapter: Adapter, loraplus_lr_ratio: float = 1.0) -> None:
        self._base = base
        self.adapter = adapter
        self._ratio = loraplus_lr_ratio

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.adapter.parameters()

    def sites(self) -> Mapping[str, Site]:
        return self.adapter.sites

    def head_parameters(self) -> list[Tensor]:
        return [p for name, p in self.adapter.parameters().items() if name.rpartition(".")[0] == self._base.head_name]

    def draw_dropout(self, step: int, rows_T: Tensor, positions_T: Tensor) -> None:
        self.adapter.draw_dropout(step, rows_T, positions_T)

    def stop_dropout(self) -> None:
        self.adapter.stop_dropout()

    def collect_gradients(self) -> None:
        """The sites' tensors are the optimizer's: their gradients are in place already."""

    def drop_gradients(self) -> None:
        """The sites' tensors are the optimizer's: no other gradients are kept."""

    def publish(self) -> None:
        """The sites' tensors are the optimizer's: nothing to copy."""

    def rate_shares(self) -> Mapping[str, float]:
        if self._ratio == 1.0:
            return {}
        return {name: self._ratio for name in self.adapter.parameters() if name.endswith("lora_B")}

    def before_update(self) -> None:
        self.adapter.before_update()

    def after_update(self, step: int) -> None:
        self.adapter.after_update(step)

    def state(self) -> dict[str, Tensor]:
        return self.adapter.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.adapter.load_state(state)

    def export(self, folder: Path, base_name: str) -> None:
        self.adapter.save(folder, base_name)


class FullWeights:
    """All weights of the base. The trainee takes the base over: nothing else may use it as the pretrained model any more."""

    def __init__(self, base: Base) -> None:
        self._base = base
        assert all(linear.weight is not None for linear in base.linears.values())  # packed or in codes, they could not be trained
        self._live = dict(base.model.named_parameters())
        for parameter in self._live.values():
            parameter.requires_grad_(True)
        self._masters = {name: _master(p) for name, p in self._live.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        return self._masters

    def sites(self) -> Mapping[str, Site]:
        return {}

    def head_parameters(self) -> list[Tensor]:
        head = self._base.linears[self._base.head_name]
        return [head.dense()] if head.bias is None else [head.dense(), head.bias]

    def draw_dropout(self, step: int, rows_T: Tensor, positions_T: Tensor) -> None:
        """Full tuning has no adapter dropout."""

    def stop_dropout(self) -> None:
        """Full tuning has no adapter dropout."""

    def collect_gradients(self) -> None:
        for name, live in self._live.items():
            master = self._masters[name]
            if live is master or live.grad is None:
                continue
            gradient = live.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            live.grad = None

    def drop_gradients(self) -> None:
        for live in self._live.values():
            live.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        for name, live in self._live.items():
            if live is not self._masters[name]:
                live.copy_(self._masters[name])

    def rate_shares(self) -> Mapping[str, float]:
        return {}

    def before_update(self) -> None:
        """Nothing but the loss gives the weights a gradient."""

    def after_update(self, step: int) -> None:
        """The optimizer's update is all."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """There is none beside the weights."""

    def export(self, folder: Path, base_name: str) -> None:
        self._base.save(folder)


class LiveWeights:
    """All weights of the base, as they are: the engine that divides them keeps what masters they need."""

    def __init__(self, base: Base) -> None:
        self._base = base
        assert all(linear.weight is not None for linear in base.linears.values())  # packed or in codes, they could not be trained
        self._live = dict(base.model.named_parameters())
        for parameter in self._live.values():
            parameter.requires_grad_(True)

    def parameters(self) -> dict[str, nn.Parameter]:
        return self._live

    def sites(self) -> Mapping[str, Site]:
        return {}

    def head_parameters(self) -> list[Tensor]:
        head = self._base.linears[self._base.head_name]
        return [head.dense()] if head.bias is None else [head.dense(), head.bias]

    def draw_dropout(self, step: int, rows_T: Tensor, positions_T: Tensor) -> None:
        """Full tuning has no adapter dropout."""

    def stop_dropout(self) -> None:
        """Full tuning has no adapter dropout."""

    def collect_gradients(self) -> None:
        """Gradients are the engine's."""

    def drop_gradients(self) -> None:
        """Gradients are the engine's."""

    def publish(self) -> None:
        """The base computes with these very tensors."""

    def rate_shares(self) -> Mapping[str, float]:
        return {}

    def before_update(self) -> None:
        """Nothing but the loss gives the weights a gradient."""

    def after_update(self, step: int) -> None:
        """The optimizer's update is all."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """There is none beside the weights."""

    def export(self, folder: Path, base_name: str) -> None:
        self._base.save(folder)


def _master(parameter: nn.Parameter) -> nn.Parameter:
    return parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
