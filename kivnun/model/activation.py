"""Activations whose value for one element does not depend on where in the pack the element stands.

On CPU torch runs SiLU, sigmoid and GELU in vectors and the last few elements of each thread's share one by one, with other last
bits. Here every share is whole vectors. Shapes: T tokens, F features. Next: `foreign.py` (who installs this).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Two vectors of 512 bits in bfloat16, torch's widest step; narrower steps divide it.
STEP = 64
# torch gives a thread no less than this many elements (at::internal::GRAIN_SIZE), but for GELU, which it divides among all
# threads from UNDIVIDED elements on.
GRAIN = 32768
UNDIVIDED = 16384


class WholeVectors(nn.Module):
    """An elementwise activation, applied to whole vectors only. Equal elements of one memory layout have equal results."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x_TF: Tensor) -> Tensor:
        if x_TF.device.type != "cpu":
            return self.activation(x_TF)
        features = x_TF.shape[-1]
        missing = -features % STEP
        if missing:
            return self._shares(F.pad(x_TF, (0, missing)))[..., :features]
        return self._shares(x_TF)

    def _shares(self, x_TF: Tensor) -> Tensor:
        if _shares_are_whole(x_TF.numel(), torch.get_num_threads()):
            return self.activation(x_TF)
        blocks = x_TF.split(max(1, UNDIVIDED // x_TF.shape[-1]), dim=-2)
        return torch.cat([self.activation(block) for block in blocks], dim=-2)


def _shares_are_whole(elements: int, threads: int) -> bool:
    """Return whether torch's division of this many elements among threads (at::parallel_for) falls between vectors."""
    if threads == 1 or elements <= UNDIVIDED:
        return True
    return all(-(-elements // workers) % STEP == 0 for workers in (threads, min(threads, -(-elements // GRAIN))))
