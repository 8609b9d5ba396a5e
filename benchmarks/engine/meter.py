"""What one process measures of itself: per step its tokens, CPU and wall seconds, loss and gradient norm; and its peak memory."""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import time
from collections.abc import Mapping, Sequence


class Meter:
    """Clocks around each step. CPU seconds are user and system time of all threads of the process."""

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = {"tokens": [], "cpu_s": [], "wall_s": [], "loss": [], "grad_norm": []}
        self.rss_before = 0
        self._began = (0.0, 0.0)

    def begin_step(self) -> None:
        self.rss_before = self.rss_before or _resident_bytes()
        self._began = (time.process_time(), time.perf_counter())

    def end_clock(self) -> None:
        """End a step whose loss and norm come later."""
        self.steps["cpu_s"].append(time.process_time() - self._began[0])
        self.steps["wall_s"].append(time.perf_counter() - self._began[1])

    def end_step(self, tokens: int, loss: float, grad_norm: float) -> None:
        self.end_clock()
        self.add(tokens, loss, grad_norm)

    def add(self, tokens: int, loss: float, grad_norm: float) -> None:
        for name, value in (("tokens", tokens), ("loss", loss), ("grad_norm", grad_norm)):
            self.steps[name].append(value)

    def run(self, facts: Mapping[str, object]) -> dict[str, object]:
        """Return what was measured. Peak memory is the most that was resident since the process began."""
        return {
            **self.steps,
            "rss_before_bytes": self.rss_before,
            "rss_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl")},
            **facts,
        }


def print_runs(runs: Sequence[Mapping[str, object]]) -> None:
    """Print what the process's cases came to as one line of JSON."""
    print(json.dumps(runs), flush=True)


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
