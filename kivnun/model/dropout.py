"""Dropout whose mask is a pure function of (seed, step, site, row, position, channel).

Nothing is stored and no generator is advanced: the mask is the same on recompute, after a resume and in any pack. The hash is
SplitMix64's finaliser (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") on integers of 64 bits, equal
on every device. Shapes: T tokens of the pack, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kivnun.randomness import key_128

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as a signed 64-bit integer
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_BITS = 16
_SPAN = 1 << _BITS


@dataclass(frozen=True, slots=True)
class Mask:
    """Which elements of a matrix [T, D] are zeroed: one key per token (int64 [T]), the site's key and the rate. Dropping is a
    linear function, and its own transpose."""

    keys_T: Tensor
    site: int
    rate: float


def site_key(seed: int, name: str) -> int:
    """Return a signed 64-bit key for one adapted module."""
    return _signed(key_128(seed, "dropout", name))


def token_keys(seed: int, step: int, rows_T: Tensor, positions_T: Tensor) -> Tensor:
    """Return one int64 key per token [T] from its row's number and its position in the row (int64 [T] each)."""
    base = _signed(key_128(seed, "dropout-step", step))
    return _mix(_mix(rows_T + base) + positions_T * _GOLDEN)


def dropped(x_TD: Tensor, mask: Mask) -> Tensor:
    """Return x with each element zeroed with probability `mask.rate` and the others scaled up. One draw decides four channels."""
    width = x_TD.shape[-1]
    scale, limit = scale_and_limit(mask.rate)
    groups = torch.arange(-(-width // 4), device=x_TD.device) * _GOLDEN
    draws = _mix(_mix(mask.keys_T ^ mask.site)[:, None] + groups)
    shifts = torch.arange(0, 64, _BITS, device=x_TD.device)
    keep_TD = (((draws[..., None] >> shifts) & (_SPAN - 1)) >= limit).flatten(-2)[..., :width]
    return (x_TD * (keep_TD * scale)).to(x_TD.dtype)


def scale_and_limit(rate: float) -> tuple[float, int]:
    """Return the factor of what stays and the draw, of 65,536, below which an element is zeroed. The factor follows the draw, not
    the rate, so that the expectation is kept exactly."""
    limit = min(round(rate * _SPAN), _SPAN - 1)
    return _SPAN / (_SPAN - limit), limit


def _mix(z: Tensor) -> Tensor:
    # Shifts of signed integers drag the sign along; the masks make them logical.
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _MULTIPLIERS[0]
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _MULTIPLIERS[1]
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
