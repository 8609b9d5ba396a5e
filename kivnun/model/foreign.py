"""A model of a family that Kivnun has no decoder for, run row by row: transformers' own forward with our products and attention.

Modules are replaced on the instance: activations by ones that work in whole vectors, a LongRoPE by one that chooses its factors
per row. No class is patched. Shapes: T tokens of a pack, S selected ones, D model width, R half the rotated width of a head.
Next: `read_model.py` (where such a model comes from), `attention.py`, `probe.py` (the question it must answer).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kivnun.model.activation import WholeVectors
from kivnun.model.attention import Rows
from kivnun.model.decoder import recomputed
from kivnun.model.rope import RowRotary, refuse_another_longrope, refuse_factors_without_longrope, refuse_rotation_by_batch


class ForeignTrunk:
    """The trunk of transformers' model, called as our own decoder is."""

    def __init__(self, model: nn.Module, rope_factors: str, recompute: bool) -> None:
        """Change the model. Raises BaseModelError for rotations that do not go row by row."""
        self._trunk: nn.Module = model.base_model  # type: ignore[assignment]
        self.packed = _install_rotary(model, rope_factors)
        _install_activations(model)
        layers = list(layers_of(model))
        for layer in layers if recompute else ():
            layer.forward = _Recomputed(layer.forward)
        kinds = Counter(type(layer).__name__ for layer in layers)
        self.slow = [
            f"{count} {name} compute by transformers' own forward: products and attention are fast, the rest is not"
            for name, count in kinds.items()
        ]

    def __call__(self, ids_T: Tensor, positions_T: Tensor, rows: Rows, select_S: Tensor | None) -> Tensor:
        """Return the final hidden states [T, D], or those of the selected tokens [S, D]."""
        if self.packed is not None:
            self.packed.lengths = rows.lengths
        out = self._trunk(input_ids=ids_T[None], position_ids=positions_T[None], use_cache=False, rows=rows)
        h_TD = out.last_hidden_state[0]
        return h_TD if select_S is None else h_TD.index_select(0, select_S)


class PackedRotary(nn.Module):
    """A rotation by row in the place of transformers' own. Set `lengths` (tokens of each row, in order) before each pass."""

    def __init__(self, by_row: RowRotary) -> None:
        super().__init__()
        self.by_row = by_row
        self.lengths: Sequence[int] = ()

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [1, T, 2 R] in the dtype of x for positions [1, T] of rows of `self.lengths` tokens."""
        angles = self.by_row(position_ids[0], self.lengths, x.dtype)
        cos, sin = (torch.cat([half_TR, half_TR], dim=-1)[None].to(x.dtype) for half_TR in (angles.cos_TR, angles.sin_TR))
        return cos, sin


class _Recomputed:
    """The forward of a layer that keeps its input alone."""

    def __init__(self, forward) -> None:
        self._forward = forward

    def __call__(self, hidden_states: Tensor, **rest: object) -> Tensor:
        return recomputed(self._forward, hidden_states, **rest)


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the trunk's list of layers, whatever the family calls it."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            yield from module
            return


def _install_activations(model: nn.Module) -> None:
    from transformers.activations import ACT2CLS

    known = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}
    for name, module in list(model.named_modules()):
        if type(module) in known and not any(True for _ in module.parameters()):
            replace_module(model, name, WholeVectors(module))


def _install_rotary(model: nn.Module, rope_factors: str) -> PackedRotary | None:
    """Put a rotary embedding that chooses LongRoPE's factors row by row in place of one that chooses by the whole pack."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        kind = getattr(module, "rope_type", "default")
        if kind == "longrope":
            found.append((name, module))
        else:
            refuse_rotation_by_batch(type(model).__name__, kind)
    if not found:
        refuse_factors_without_longrope(type(model).__name__, rope_factors)
        return None
    ((name, module),) = found
    device: torch.device = module.original_inv_freq.device  # type: ignore[assignment]
    refuse_another_longrope(type(model).__name__, module, RowRotary.from_config(module.config, "per_row", device))
    packed = PackedRotary(RowRotary.from_config(module.config, rope_factors, device))
    replace_module(model, name, packed)
    return packed


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the model's module of this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
