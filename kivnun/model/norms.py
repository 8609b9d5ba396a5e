"""LN tuning: the base's own norms are trained, and nothing else (Zhao et al. 2023, arXiv:2312.11420). Next: `sites.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kivnun.errors import BaseModelError, IntegrityError
from kivnun.model.adapters import MODULE_PREFIX, read_peft_tensors, write_peft
from kivnun.model.load import Base
from kivnun.model.sites import NormSite

_MIDDLE = ".ln_tuning_layers."


@dataclass(slots=True)
class NormAdapter:
    """Norms of a base, copied in float32 and trained: at the start they are the base's."""

    sites: dict[str, NormSite]
    no_merge: None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"{name}.{tensor}": p for name, site in self.sites.items() for tensor, p in site.tensors.items()}

    def draw_dropout(self, step: int, rows_T: Tensor, positions_T: Tensor) -> None:
        """Norms have no dropout."""

    def stop_dropout(self) -> None:
        """Norms have no dropout."""

    def before_update(self) -> None:
        """Nothing but the loss gives norms a gradient."""

    def after_update(self, step: int) -> None:
        """The optimizer's update is all."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """There is none beside the trained tensors."""

    def save(self, folder: Path, base_name: str) -> None:
        tensors = {
            f"{MODULE_PREFIX}{name}{_MIDDLE}{tensor}": p.detach()
            for name, site in self.sites.items()
            for tensor, p in site.tensors.items()
        }
        config = {"peft_type": "LN_TUNING", "target_modules": list(self.sites), "modules_to_save": None}
        write_peft(folder, config, base_name, tensors)


def new_norms(base: Base) -> NormAdapter:
    """Return the norms of a base, ready to be trained. Raises BaseModelError for a base that has none."""
    found = {name: module for name, module in base.model.named_modules() if _is_norm(module)}
    if not found:
        raise BaseModelError(f"{base.name} has no norms with weights of their own", hint="choose another adapter, such as lora")
    return NormAdapter({name: NormSite(_copied(module, base.device)) for name, module in found.items()})


def load_norms(base: Base, folder: Path) -> NormAdapter:
    """Return the norms in PEFT's folder. Raises IntegrityError where they do not fit the base."""
    adapter = new_norms(base)
    tensors = {key.removeprefix(MODULE_PREFIX).replace(_MIDDLE, "."): tensor for key, tensor in read_peft_tensors(folder).items()}
    named = {key.rpartition(".")[0] for key in tensors}
    adapter.sites = {name: site for name, site in adapter.sites.items() if name in named}
    parameters = adapter.parameters()
    shapes, needed = ({name: t.shape for name, t in group.items()} for group in (tensors, parameters))
    if shapes != needed or not shapes:
        odd = sorted({name for name, _ in shapes.items() ^ needed.items()})
        raise IntegrityError(
            f"{folder}: {odd[0] if odd else 'no tensor'} does not fit the norms of the base",
            hint="load the adapter on the base it was trained on",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return adapter


def _is_norm(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return "norm" in type(module).__name__.lower() and bool(own) and all(p.ndim == 1 for p in own) and not list(module.children())


def _copied(norm: nn.Module, device: torch.device) -> dict[str, nn.Parameter]:
    own = norm.named_parameters(recurse=False)
    return {name: nn.Parameter(p.detach().to(device, torch.float32, copy=True)) for name, p in own}
