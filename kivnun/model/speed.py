"""How many operations a second this machine does in a product of the size that layers have: `python -m kivnun.model.speed fp32`.

Prints one number; with `cpu` after the precision, by the seconds that its cores spent, however busy they are otherwise. A process
of its own, so that who only plans loads no torch (`plan/time.py`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from kivnun.model.load import DTYPES

TOKENS, INPUTS, OUTPUTS = 1024, 512, 2048
SECONDS = 0.5


def products_per_second(precision: str, clock: Callable[[], float] = time.perf_counter, seconds: float = SECONDS) -> float:
    """Return the operations a second of a product in the precision that a base is computed in, the median of those that `seconds`
    allow, and of five at least."""
    x_TI = torch.ones(TOKENS, INPUTS, dtype=DTYPES[precision])
    w_OI = torch.ones(OUTPUTS, INPUTS, dtype=DTYPES[precision])
    spent: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(spent) < 5:
        began = clock()
        torch.mm(x_TI, w_OI.T)
        spent.append(clock() - began)
    return 2.0 * TOKENS * INPUTS * OUTPUTS / sorted(spent)[len(spent) // 2]


def core_clock() -> float:
    """Return the seconds that each of the cores has spent for this process."""
    return time.process_time() / torch.get_num_threads()


if __name__ == "__main__":
    print(products_per_second(sys.argv[1], core_clock if sys.argv[2:] == ["cpu"] else time.perf_counter))
