"""Which bases are loaded on demand: those that are asked for, as far as memory goes beside the residents.

A base that is loaded stays while it is asked for. One that is asked for and does not fit takes the place of bases that nobody has
asked for in a while, the longest first; where that is not enough it is refused, and whoever asks is told at once what it needs.
Sizes are the planner's (`../plan/serving.py`); nothing is loaded to find them. Next: `supervisor.py` (who starts them),
`answering.py` (who tells those that ask).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from kivnun.errors import KivnunError
from kivnun.jobs.config import ServiceConfig
from kivnun.jobs.wanted import Wishes
from kivnun.plan.bases import base_files
from kivnun.plan.devices import GIB, Device, find_device, has_gpu
from kivnun.plan.serving import Serving, serving_of_files

RECENT_S = 10.0  # who waits for a base asks again more often than this
SPARE_S = 60.0  # a base that nobody has asked for so long gives way; while one answers it is asked for more often
TRAINING_SHARE = 0.5  # of what residents leave
TOY_BYTES = 100e6  # a process without a model
GUIDE = "docs/guides/service-operate.md"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wish:
    """A base that is asked for. `idle_s` is how long ago that was the last time; `runs`: it is loaded, or being loaded."""

    base: str
    num_bytes: float
    idle_s: float
    runs: bool


@dataclass(frozen=True, slots=True)
class Fitting:
    """The bases to be kept or loaded, and for each that has to wait how many bytes are, or could be made, free."""

    kept: frozenset[str]
    refused: Mapping[str, float]


def fitting(wishes: Sequence[Wish], available: float) -> Fitting:
    """Return which of the bases fit into so many bytes. Those that run stay unless another takes the place of an idle one; of the
    others the first has the first choice."""
    kept = {wish.base: wish for wish in wishes if wish.runs}
    refused: dict[str, float] = {}
    for wish in wishes:
        if wish.runs:
            continue
        free = available - sum(one.num_bytes for one in kept.values())
        spare = sorted((one for one in kept.values() if one.runs and one.idle_s >= SPARE_S), key=lambda one: -one.idle_s)
        gone: list[Wish] = []
        while free < wish.num_bytes and spare:
            gone.append(spare.pop(0))
            free += gone[-1].num_bytes
        if free < wish.num_bytes:
            refused[wish.base] = max(0.0, free)
            continue
        for one in gone:
            del kept[one.base]
        kept[wish.base] = wish
    return Fitting(frozenset(kept), refused)


def device_here() -> Device:
    """Return what inference workers of this machine compute on."""
    return find_device("cuda" if has_gpu() else "cpu")


class Room:
    """The memory that bases may take which are loaded on demand, and those that have it."""

    def __init__(
        self, config: ServiceConfig, trains: bool, clock: Callable[[], float], device: Callable[[], Device] = device_here
    ) -> None:
        """`trains`: jobs are trained beside them. `clock` gives seconds and never goes back."""
        self._config, self._trains, self._device_here = config, trains, device
        self._residents = [base for base, entry in config.bases.items() if entry.resident]
        self._wishes = Wishes(clock)
        self._running: frozenset[str] = frozenset()
        self._ever_refused: set[str] | None = None
        self._served: dict[str, Serving | None] = {}

    @cached_property
    def num_bytes(self) -> float:
        """Return what all bases that are loaded on demand may take together."""
        given = self._config.on_demand_gib
        return self._left() if given is None else given * GIB

    @cached_property
    def _device(self) -> Device:
        return self._device_here()

    def look(self, asks: Mapping[str, int]) -> tuple[list[str], dict[str, str]]:
        """Return the bases that are to run, by how often each was ever asked for; and why others that are asked for are not."""
        idle_s = self._wishes.look(asks)
        wishes = [
            Wish(base, self._size(base), idle_s[base], base in self._running)
            for base in sorted(set(idle_s) & set(self._config.bases) - set(self._residents))
            if base in self._running or idle_s[base] < RECENT_S
        ]
        found = fitting(wishes, self.num_bytes if wishes else 0.0)
        self._running = found.kept
        needed = {wish.base: wish.num_bytes for wish in wishes}
        return sorted(found.kept), {base: self._why(base, needed[base], free) for base, free in found.refused.items()}

    def to_tell(self, recorded: Mapping[str, str], refused: Mapping[str, str]) -> dict[str, str | None]:
        """Return what is to be changed in the records of why bases are not loaded; None takes a record away. What was recorded
        before the first look is past, and afterwards only what this room has refused is its own."""
        if self._ever_refused is None:
            self._ever_refused = set(recorded)
        new = {base: why for base, why in refused.items() if base not in recorded}
        for base in new:
            logger.warning("a base is asked for that does not fit", extra={"action": "base_refused", "base": base})
        over = [base for base in recorded if base in self._ever_refused and base not in refused]
        self._ever_refused |= new.keys()
        return {**dict.fromkeys(over), **new}

    def allowances(self) -> dict[str, float]:
        """Return the bytes that each resident base may take with all that is beside it; what is not known is left out."""
        known = {base: served for base in self._residents if (served := self._serving(base)) is not None}
        left = self._device.memory_bytes - sum(served.base_bytes for served in known.values())
        return {base: served.base_bytes + max(0.0, left) / len(self._residents) for base, served in known.items()}

    def _left(self) -> float:
        """Return what residents leave of this machine, without the share of training."""
        taken = (served.total_bytes(given) for base, given in self.allowances().items() if (served := self._serving(base)))
        left = max(0.0, self._device.memory_bytes - sum(taken))
        return left * (1 - TRAINING_SHARE) if self._trains else left

    def _size(self, base: str) -> float:
        """Return what a base takes; of one of which nothing is known, all there is: it runs alone."""
        if self._config.bases[base].trainer == "toy":
            return TOY_BYTES
        served = self._serving(base)
        return max(self.num_bytes, TOY_BYTES) if served is None else served.total_bytes(self.num_bytes)

    def _serving(self, base: str) -> Serving | None:
        entry = self._config.bases[base]
        if base not in self._served and entry.trainer != "toy":
            try:
                files = base_files(self._config.model_of(base), entry.revision)
                self._served[base] = serving_of_files(files, entry.precision, self._device)
            except (KivnunError, OSError):  # its worker will say what is wrong with it
                self._served[base] = None
        return self._served.get(base)

    def _why(self, base: str, needed: float, free: float) -> str:
        """Return what a caller is told of a base that is not loaded."""
        takes = f"it takes {_gib(needed)}" if self._knows(base) else "how much it takes is not known, so that it is loaded alone"
        operator = f"the operator can raise on_demand_gib, or choose a smaller precision for it ({GUIDE})"
        if needed > self.num_bytes:
            return f"{base} is not loaded: {takes}, and bases on demand have {_gib(self.num_bytes)} together; {operator}"
        room = f"{_gib(free)} of the {_gib(self.num_bytes)} for bases on demand can be had while others are in use"
        return f"{base} is not loaded: {takes}, and {room}; try again in a minute; {operator}"

    def _knows(self, base: str) -> bool:
        return self._config.bases[base].trainer == "toy" or self._serving(base) is not None


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"
