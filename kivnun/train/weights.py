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

from kivnun.model.adapters import Adapter, save_peft
from kivnun.model.linear import AdapterSite
from kivnun.model.load import Base


class Weights(Protocol):
    """The trained tensors of one trainee and how they meet the base."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the float32 tensors the optimizer updates, by name."""
        ...

    def sites(self) -> Mapping[str, AdapterSite]:
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

    def publish(self) -> None:
        """Make the base compute with the updated `parameters()`."""
        ...

    def export(self, folder: Path, base_name: str) -> None:
        """Write what others load: a PEFT adapter folder, or a transformers model folder."""
        ...


class AdapterWeights:
    """LoRA or DoRA tensors; the base stays as it is."""

    def __init__(self, base: Base, adapter: Adapter) -> None:
        self._base = base
        self.adapter = adapter

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.adapter.parameters()

    def sites(self) -> Mapping[str, AdapterSite]:
        return self.adapter.sites

    def head_parameters(self) -> list[Tensor]:
        return [p for name, p in self.adapter.parameters().items() if name.rpartition(".")[0] == self._base.head_name]

    def draw_dropout(self, step: int, rows_T: Tensor, positions_T: Tensor) -> None:
        self.adapter.draw_dropout(step, rows_T, positions_T)

    def stop_dropout(self) -> None:
        self.adapter.stop_dropout()

    def collect_gradients(self) -> None:
        """The sites' tensors are the optimizer's: their gradients are in place already."""

    def publish(self) -> None:
        """The sites' tensors are the optimizer's: nothing to copy."""

    def export(self, folder: Path, base_name: str) -> None:
        save_peft(self.adapter, folder, base_name)


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

    def sites(self) -> Mapping[str, AdapterSite]:
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

    @torch.no_grad()
    def publish(self) -> None:
        for name, live in self._live.items():
            if live is not self._masters[name]:
                live.copy_(self._masters[name])

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

    def sites(self) -> Mapping[str, AdapterSite]:
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

    def publish(self) -> None:
        """The base computes with these very tensors."""

    def export(self, folder: Path, base_name: str) -> None:
        self._base.save(folder)


def _master(parameter: nn.Parameter) -> nn.Parameter:
    return parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
