"""Rotations by position: fixed frequencies, and LongRoPE's (Ding et al. 2024), chosen by each row's own length.

Models with LongRoPE have two sets of frequency factors, one for contexts up to the original length and one for longer ones.
transformers chooses by the longest row in a pass, so that a short row's values depend on its neighbours; here each row chooses
for itself, or the spec fixes one set for all. Shapes: T tokens of the pack, R half the rotated width of a head.
Next: `decoder.py` (who turns heads by these), `foreign.py` (where they take the place of transformers' own).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kivnun.errors import BaseModelError
from kivnun.model.kernels import Angles


class Rotary(nn.Module):
    """Rotation by one set of frequencies, whatever the row."""

    def __init__(self, frequencies_R: Tensor, scaling: float) -> None:
        super().__init__()
        self.frequencies_R = nn.Buffer(frequencies_R, persistent=False)
        self.scaling = scaling

    @torch.no_grad()
    def forward(self, positions_T: Tensor, lengths: Sequence[int], dtype: torch.dtype) -> Angles:
        """Return the rotation of tokens at these positions, its cosines and sines rounded to `dtype`."""
        return _angles(positions_T[:, None].float() * self.frequencies_R, self.scaling, dtype)


class RowRotary(nn.Module):
    """Rotation by LongRoPE's short or long frequencies, row by row."""

    def __init__(self, short_R: Tensor, long_R: Tensor, scaling: float, original_length: int, factors: str) -> None:
        super().__init__()
        self.short_R, self.long_R = nn.Buffer(short_R, persistent=False), nn.Buffer(long_R, persistent=False)
        self.scaling, self.original_length, self.factors = scaling, original_length, factors

    @classmethod
    def from_config(cls, config: Any, factors: str, device: torch.device) -> RowRotary:
        """Return the rotation that a configuration of transformers' asks for, whose `rope_type` is "longrope"."""
        original = int(config.rope_parameters["original_max_position_embeddings"])
        init = ROPE_INIT_FUNCTIONS["longrope"]
        short_R, scaling = init(config, device, seq_len=original)
        long_R, _ = init(config, device, seq_len=original + 1)
        return cls(short_R, long_R, float(scaling), original, factors)

    def is_long(self, length: int) -> bool:
        """Return whether a row of this many tokens, cached ones included, takes the long factors."""
        return self.factors == "long" or (self.factors == "per_row" and length > self.original_length)

    def turns_by_length(self, longest: int) -> bool:
        """Return whether rows of up to this many tokens may be rotated by different factors."""
        return self.is_long(longest) and not self.is_long(1)

    @torch.no_grad()
    def forward(self, positions_T: Tensor, lengths: Sequence[int], dtype: torch.dtype) -> Angles:
        """Return the rotation of rows of these lengths, its cosines and sines rounded to `dtype`."""
        turns = [
            positions[:, None].float() * (self.long_R if self.is_long(int(positions[-1]) + 1) else self.short_R)
            for positions in positions_T.split(list(lengths))
        ]
        return _angles(torch.cat(turns), self.scaling, dtype)


def rotary_of(config: Any, model: str, factors: str) -> Rotary | RowRotary:
    """Return the rotation that a configuration asks for, on the CPU.

    Raises BaseModelError for one that does not go row by row, and where `factors` would choose among factors there are not.
    """
    kind = config.rope_parameters["rope_type"]
    refuse_rotation_by_batch(model, kind)
    if kind == "longrope":
        return RowRotary.from_config(config, factors, torch.device("cpu"))
    refuse_factors_without_longrope(model, factors)
    if kind == "default":
        return Rotary(_frequencies(config), 1.0)
    frequencies_R, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return Rotary(frequencies_R, float(scaling))


def rows_turn_from(config: Any) -> int | None:
    """Return the length above which a row takes LongRoPE's long factors; None where a configuration has one set."""
    rope = getattr(config, "rope_parameters", None) or {}
    return int(rope["original_max_position_embeddings"]) if rope.get("rope_type") == "longrope" else None


def refuse_rotation_by_batch(model: str, kind: object) -> None:
    """Raise BaseModelError for frequencies that follow the longest row of a batch."""
    if kind == "dynamic" or (isinstance(kind, dict) and {"dynamic", "longrope"}.intersection(kind.values())):
        raise BaseModelError(
            f"{model} rotates positions by the longest row of a batch (rope_type {kind!r}), not row by row",
            hint="use a base with fixed frequencies, or with one LongRoPE",
        )


@torch.no_grad()
def refuse_another_longrope(model: str, theirs: nn.Module, ours: RowRotary) -> None:
    """Raise BaseModelError where a model's own rotation is not LongRoPE's on either side of the original length.

    Phi-3.5-MoE's is not: it scales by factors of its own. The probe of logits cannot see it, since ours takes its place in both.
    """
    for length in (ours.original_length, ours.original_length + 1):
        positions_T = torch.arange(length, device=ours.short_R.device)
        angles = ours(positions_T, [length], torch.float32)
        expected = theirs(torch.zeros(1, device=positions_T.device), positions_T[None])
        if not all(
            torch.allclose(e[0, :, : m.shape[1]], m, atol=1e-3)
            for e, m in zip(expected, (angles.cos_TR, angles.sin_TR), strict=True)
        ):
            raise BaseModelError(
                f"{model} calls its rotation LongRoPE, but turns a row of {length:,} tokens otherwise",
                hint="use Phi-3-mini, Phi-3.5-mini, Phi-4-mini or another base",
            )


def refuse_factors_without_longrope(model: str, factors: str) -> None:
    """Raise BaseModelError when factors were chosen for a model that has none."""
    if factors != "per_row":
        raise BaseModelError(
            f"base.rope_factors is {factors}, but {model} has no LongRoPE: it would change nothing",
            hint="leave base.rope_factors out",
        )


def _frequencies(config: Any) -> Tensor:
    """Return theta^(-2i / K) (Su et al. 2021, RoFormer, equation 15) of the rotated part of a head, float32 [R]."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(head * config.rope_parameters.get("partial_rotary_factor", 1.0))
    return 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)


def _angles(turns_TR: Tensor, scaling: float, dtype: torch.dtype) -> Angles:
    cos_TR, sin_TR = ((x * scaling).to(dtype).float() for x in (turns_TR.cos(), turns_TR.sin()))
    return Angles(cos_TR, sin_TR)
