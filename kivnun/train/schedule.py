"""The learning rate: a pure function of the step and the horizon, so that a resumed run cannot lose its place. Next: `loop.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Schedule:
    """A warm-up, a plateau, a decay.

    The rate rises linearly over the first `warmup_share` of the steps, stays until `decay_start_share` of them, then falls to
    `final_share` of the peak. `steps` is the horizon: the number of updates of the whole run.
    """

    steps: int
    peak: float
    warmup_share: float
    decay: Literal["linear", "cosine", "constant"]
    decay_start_share: float
    final_share: float

    def learning_rate(self, step: int) -> float:
        """Return the rate of a step, counted from 1. No step has rate 0: the first would teach nothing."""
        warmup = math.ceil(self.warmup_share * self.steps)
        if step <= warmup:
            return self.peak * step / (warmup + 1)
        start = max(warmup, round(self.decay_start_share * self.steps))
        if self.decay == "constant" or step <= start:
            return self.peak
        progress = (step - 1 - start) / (self.steps - start)
        fallen = progress if self.decay == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.peak * (1 - (1 - self.final_share) * fallen)
