"""How A and B of a low-rank adapter start: drawn, or taken from the weight (PiSSA, OLoRA) or from what the layer sees (EVA).

Whatever the start, the tuned model starts as the base. Drawn starts and EVA's have B at zero; PiSSA and OLoRA start with a part of
the weight itself, which the site takes off again (`linear.Start`). Next: `adapters.py` (who asks for these), `linear.py`.
Shapes: T tokens, I inputs, O outputs, R rank, K directions kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kivnun.data.packing import PackedBatch
from kivnun.errors import BaseModelError, DataError
from kivnun.model.attention import Rows
from kivnun.model.linear import Again, TunableLinear
from kivnun.model.load import Base
from kivnun.randomness import generator


def kaiming(seed: int, name: str, rank: int, inputs: int) -> Tensor:
    """Return A [R, I] uniform within 1 / sqrt(I): Kaiming's with a = sqrt(5), the start of Hu et al.'s code."""
    draw = generator(seed, "init", name).random((rank, inputs), dtype=np.float32)
    return torch.from_numpy((draw * 2 - 1) * np.float32(1.0 / math.sqrt(inputs)))


def gaussian(seed: int, name: str, rank: int, inputs: int) -> Tensor:
    """Return A [R, I] normal with a standard deviation of 1 / rank, PEFT's "gaussian"."""
    return torch.from_numpy(generator(seed, "init", name).standard_normal((rank, inputs), dtype=np.float32) / np.float32(rank))


def pissa(weight_OI: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return (A [R, I], B [O, R]) with scaling * B A the nearest matrix of this rank to the weight (Meng et al. 2024,
    arXiv:2404.02948, equations 2 to 4)."""
    u_OK, s_K, v_KI = torch.linalg.svd(weight_OI.float(), full_matrices=False)
    root_R = (s_K[:rank] / scaling).sqrt()
    return root_R[:, None] * v_KI[:rank], u_OK[:, :rank] * root_R


def olora(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (A [R, I], B [O, R]): the first rows of R and columns of Q of the weight's QR (Buyukakyuz 2024, arXiv:2406.01775)."""
    q_OK, r_KI = torch.linalg.qr(weight_OI.float())
    return r_KI[:rank].contiguous(), q_OK[:, :rank].contiguous()


def eva(base: Base, sites: Sequence[str], batches: Iterable[PackedBatch], rank: int) -> dict[str, Tensor]:
    """Return A [R, I] of each site: the directions along which its inputs vary most on these rows (Paischer et al. 2024,
    arXiv:2410.07170, with rho 1: every site keeps its rank).

    Raises DataError where the rows span fewer directions than the rank.
    """
    looking = {name: _Looking(Directions(2 * rank)) for name in sites}
    for batch in batches:
        _look(base, looking, batch)
    return {name: _directions(name, it.seen, rank, base.device) for name, it in looking.items()}


@torch.no_grad()
def _look(base: Base, looking: Mapping[str, _Looking], batch: PackedBatch) -> None:
    ids_T, positions_T = (torch.from_numpy(array).to(base.device) for array in (batch.ids_T, batch.positions_T))
    for it in looking.values():
        it.tokens = len(ids_T)
    with base.using(looking):
        base.hidden(ids_T, positions_T, Rows(list(batch.lengths)))


def _directions(name: str, seen: Directions, rank: int, device: torch.device) -> Tensor:
    spread_K = seen.spread_K
    if len(spread_K) < rank or spread_K[rank - 1] <= 1e-6 * spread_K[0]:
        raise DataError(
            f"adapter.init is eva with rank {rank}, but what {name} sees of the rows looked at varies along fewer directions",
            hint="give more rows, lower adapter.rank, or leave adapter.init out",
        )
    return seen.directions_KI[:rank].float().to(device)


@dataclass(slots=True)
class _Looking:
    """A site that changes nothing and looks at its layer's input. `tokens` of a pass are real, those after them padding."""

    seen: Directions
    tokens: int = 0

    def __call__(self, x_TI: Tensor, linear: TunableLinear, again: Again = None, select_S: Tensor | None = None) -> Tensor:
        self.seen.add(x_TI[: self.tokens])
        return linear.plain(x_TI)

    def merged(self, weight_OI: Tensor) -> Tensor:
        return weight_OI.float()


@dataclass(slots=True)
class Directions:
    """The principal components of rows that come in portions (Ross et al. 2008, "Incremental learning for robust visual tracking",
    section 3.1): at most `keep` directions, their spreads, the mean and the count are all that is held."""

    keep: int
    count: int = 0
    mean_I: Tensor = field(default_factory=lambda: torch.empty(0))
    directions_KI: Tensor = field(default_factory=lambda: torch.empty(0))
    spread_K: Tensor = field(default_factory=lambda: torch.empty(0))

    def add(self, x_TI: Tensor) -> None:
        """Take rows into account. Sums are float64: the spreads are roots of eigenvalues."""
        x_TI = x_TI.detach().cpu().double()
        count, mean_I = len(x_TI), x_TI.mean(0)
        rows = x_TI - mean_I
        if self.count:
            between = math.sqrt(self.count * count / (self.count + count)) * (self.mean_I - mean_I)
            rows = torch.cat([self.spread_K[:, None] * self.directions_KI, rows, between[None]])
            mean_I = (self.count * self.mean_I + count * mean_I) / (self.count + count)
        self.count, self.mean_I = self.count + count, mean_I
        # Far fewer rows than inputs: their Gram matrix is the small one, and its eigenvectors give the directions.
        values_N, vectors_NN = torch.linalg.eigh(rows @ rows.t())
        kept = min(self.keep, len(values_N), rows.shape[1])
        spread_K = values_N.flip(0)[:kept].clamp_min(0.0).sqrt()
        self.spread_K = spread_K
        self.directions_KI = (vectors_NN.flip(1)[:, :kept].t() @ rows) / spread_K.clamp_min(1e-300)[:, None]


def refuse_higher_rank(name: str, weight_OI: Tensor, rank: int, init: str) -> None:
    """Raise BaseModelError where a weight has no part of this rank to start from."""
    if rank > min(weight_OI.shape):
        raise BaseModelError(
            f"adapter.init is {init} with rank {rank}, but {name} is a matrix of {weight_OI.shape[0]} by {weight_OI.shape[1]}",
            hint=f"set adapter.rank to {min(weight_OI.shape)} or less, or leave {name.rpartition('.')[2]} out of target_modules",
        )
