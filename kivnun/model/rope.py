"""LongRoPE (Ding et al. 2024) with its factors chosen by each row's own length.

Models with LongRoPE have two sets of frequency factors, one for contexts up to the original length and one for longer ones.
transformers chooses by the longest row in a pass, so that a short row's values depend on its neighbours; here each row chooses
for itself, or the spec fixes one set for all. Shapes: T tokens of the pack, K rotated width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class RowRotary(nn.Module):
    """Cosines and sines for packed rows. Set `lengths` (tokens of each row, in order) before each pass."""

    def __init__(self, short_K: Tensor, long_K: Tensor, scaling: float, original_length: int, factors: str) -> None:
        super().__init__()
        self.short_K, self.long_K = nn.Buffer(short_K, persistent=False), nn.Buffer(long_K, persistent=False)
        self.scaling, self.original_length, self.factors = scaling, original_length, factors
        self.lengths: Sequence[int] = ()

    @classmethod
    def from_transformers(cls, module: nn.Module, factors: str) -> RowRotary:
        """Return the equivalent of a transformers rotary module whose `rope_type` is "longrope"."""
        config = module.config
        original = int(config.rope_parameters["original_max_position_embeddings"])  # type: ignore[union-attr, index]
        init = ROPE_INIT_FUNCTIONS["longrope"]
        device = module.original_inv_freq.device
        short_K, scaling = init(config, device, seq_len=original)
        long_K, _ = init(config, device, seq_len=original + 1)
        return cls(short_K, long_K, float(scaling), original, factors)

    def is_long(self, length: int) -> bool:
        """Return whether a row of this many tokens, cached ones included, takes the long factors."""
        return self.factors == "long" or (self.factors == "per_row" and length > self.original_length)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [1, T, K] in the dtype of x for positions [1, T] of rows of `self.lengths` tokens."""
        positions_T = position_ids[0]
        angles = [
            positions[:, None].float() * (self.long_K if self.is_long(int(positions[-1]) + 1) else self.short_K)
            for positions in positions_T.split(list(self.lengths))
        ]
        half_TK = torch.cat(angles)
        full_TK = torch.cat([half_TK, half_TK], dim=-1)
        return (full_TK.cos() * self.scaling)[None].to(x.dtype), (full_TK.sin() * self.scaling)[None].to(x.dtype)
