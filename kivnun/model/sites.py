"""What may be lent to a base for a pass beside the sites of linear layers: other norms, and virtual tokens before each row.

Virtual tokens are tokens of the pack like any other, so that attention, packing and generation need to know nothing of them: rows
go on from one branch of them (`data/prefixes.py`), or each has its own where a cache or a rotation by row asks for that.
Shapes: P virtual tokens, T tokens of a pack, S selected ones, D model width, G key heads, K width of a head.
Next: `prompts.py`, `norms.py` (how these are trained), `load.py` (who is lent them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from kivnun.model.attention import Rows
from kivnun.model.linear import AdapterSite


@dataclass(slots=True)
class NormSite:
    """A norm's own tensors (weight and, where it has one, bias) in the place of the base's, float32 by name."""

    tensors: dict[str, nn.Parameter]

    def lend(self, norm: nn.Module) -> dict[str, nn.Parameter | None]:
        """Put the tensors, in the norm's type, into its place; return what was there."""
        before = {name: norm._parameters[name] for name in self.tensors}
        for name, tensor in self.tensors.items():
            kept = before[name]
            assert kept is not None
            norm._parameters[name] = tensor if tensor.dtype == kept.dtype else tensor.to(kept.dtype)  # type: ignore[assignment]
        return before


@dataclass(slots=True)
class PromptSite:
    """Embeddings [P, D] of virtual tokens that every row begins with (Lester et al. 2021, arXiv:2104.08691)."""

    embeddings_PD: nn.Parameter

    @property
    def count(self) -> int:
        return len(self.embeddings_PD)


@dataclass(slots=True)
class PrefixSite:
    """Keys and values of virtual tokens before every row, in every layer (Li and Liang 2021, arXiv:2101.00190).

    `vectors_PE` holds for each virtual token, layer after layer, its keys [G * K] and then its values [G * K], as PEFT does.
    Keys are what queries meet: no position turns them.
    """

    vectors_PE: nn.Parameter
    num_layers: int

    @property
    def count(self) -> int:
        return len(self.vectors_PE)

    def keys_and_values(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, [P, G * K] each."""
        keys, values = self.vectors_PE.view(self.count, self.num_layers, 2, -1)[:, layer].unbind(1)
        return keys.to(dtype), values.to(dtype)


Virtual: TypeAlias = PromptSite | PrefixSite
Site: TypeAlias = AdapterSite | NormSite | PromptSite | PrefixSite


@dataclass(frozen=True, slots=True)
class Opened:
    """A pass with its virtual tokens in it. `places_T` says where each token of the pass as it was given lies now."""

    ids_T: Tensor
    positions_T: Tensor
    rows: Rows
    places_T: Tensor


def with_virtual_tokens(
    site: Virtual, vocabulary: int, ids_T: Tensor, positions_T: Tensor, rows: Rows, *, one_branch: bool
) -> Opened:
    """Return the pass with virtual tokens before each row that begins in it; the positions of all other tokens move on by P.

    Virtual token p of a prompt has the id `vocabulary` + p. Those of a prefix are any token at position 0, where nothing is turned:
    their keys and values are put in their place. `one_branch`: the rows go on from one branch of virtual tokens; it needs a pass
    without a cache.
    """
    count, device = site.count, ids_T.device
    positions_P = torch.arange(count, device=device) * isinstance(site, PromptSite)
    ids_P = positions_P + vocabulary * isinstance(site, PromptSite)
    if one_branch:
        parents = [-1] * len(rows.lengths) if rows.parents is None else rows.parents
        before = [0]
        opened_rows = Rows([count, *rows.lengths], parents=[-1, *(parent + 1 for parent in parents)])
    else:
        starts = _starts(rows)
        begins = [int(first) == 0 and _is_root(rows, at) for at, first in enumerate(positions_T[starts].tolist())]
        before = [start for start, begun in zip(starts.tolist(), begins, strict=True) if begun]
        lengths = [length + count * begun for length, begun in zip(rows.lengths, begins, strict=True)]
        opened_rows = Rows(lengths, rows.cache, rows.slots, parents=rows.parents)
    ids_T, new_positions_T = (
        _inserted(values_T, virtual, before) for values_T, virtual in ((ids_T, ids_P), (positions_T + count, positions_P))
    )
    kept = torch.ones(len(ids_T), dtype=torch.bool, device=device)
    places = [start + number * count for number, start in enumerate(before)]
    for place in places:
        kept[place : place + count] = False
    if isinstance(site, PrefixSite):
        opened_rows.prefix, opened_rows.prefix_at = site, places
    return Opened(ids_T, new_positions_T, opened_rows, torch.nonzero(kept)[:, 0])


def _starts(rows: Rows) -> Tensor:
    return torch.tensor([0, *rows.lengths[:-1]]).cumsum(0)


def _is_root(rows: Rows, at: int) -> bool:
    return rows.parents is None or rows.parents[at] < 0


def _inserted(values_T: Tensor, new_P: Tensor, before: Sequence[int]) -> Tensor:
    """Return values with the new ones put in before each of these places."""
    pieces, at = [], 0
    for place in before:
        pieces += [values_T[at:place], new_P]
        at = place
    return torch.cat([*pieces, values_T[at:]])
