"""How many tokens a pass may have, step by step, and what a step does when memory does not hold one of its passes.

Nothing of the step is kept then: its gradients are dropped, its rows are packed anew for passes of half as many tokens, and it
begins again. The sums are those of the same rows in another order, so that only last bits differ. The smaller number holds from
that step on, for the rest of the run and for whoever resumes it: each step's passes are those of a run that was never stopped.
Next: `loop.py` (who asks), `engine.py` (whose passes they are).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from kivnun.data.packing import PackedBatch
from kivnun.data.rows import Trainable
from kivnun.errors import WontFitError
from kivnun.events import Event, PassesShortened, Warned

# What torch says in a plain RuntimeError when the system gives no memory: its allocator on a CPU, operators in C++, cuBLAS.
SAID = ("not enough memory", "can't allocate memory", "bad_alloc", "ALLOC_FAILED")
SMALLER = (
    "set compute.activation_checkpointing to true, lower data.max_seq_len, hold the base in nf4 (base.precision), or divide the "
    "run among processes (compute.kind: multi_process)"
)


class PassTooLarge(MemoryError):
    """Memory did not hold a pass of this process or of another one of the run: all of them raise it."""


def is_short_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out."""
    if isinstance(error, WontFitError):  # said already what to change
        return False
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)


def told_shortage(what: str, error: BaseException) -> WontFitError:
    """Return the error of a run that cannot go on, for `what` found no memory."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return WontFitError(f"memory ran out in {what}: {said}", hint=f"what was saved stands; {SMALLER}")


@contextmanager
def telling_shortage(what: str) -> Iterator[None]:
    """Turn memory that runs out in `what` into the error that says so, and what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_short_of_memory(error):
            raise
        raise told_shortage(what, error) from error


@dataclass
class PassBudget:
    """Tokens of a pass: `tokens`, and fewer from the steps of `shortened` on, (step, tokens) each."""

    tokens: int
    shortened: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    def at(self, step: int) -> int:
        """Return the most tokens that a pass of this step may have."""
        return min([self.tokens, *(tokens for since, tokens in self.shortened if since <= step)])

    @classmethod
    def recorded(cls, tokens: int, events: Iterable[Event]) -> PassBudget:
        """Return the budget of a run whose record so far holds these events."""
        return cls(tokens, [(e.step, e.micro_batch_tokens) for e in events if isinstance(e, PassesShortened)])


class Learner(Protocol):
    """What of a trainee's verbs a step's passes need."""

    def packs_of(self, items: Sequence[Trainable], micro_batch_tokens: int, share_prefixes: bool) -> tuple[list[PackedBatch], int]:
        """Return this process's packs of a step's items, and the tokens of all processes' packs."""
        ...

    def forward_backward(self, batch: PackedBatch, total_weight: float) -> float:
        """Add a pack's share of the step's gradient; return its share of the step's loss."""
        ...

    def discard_step(self) -> None:
        """Drop what was gathered since the last update."""
        ...


@dataclass(frozen=True)
class StepPacks:
    """A step's packs for this process, the tokens of all packs, and the most tokens that one was allowed."""

    packs: list[PackedBatch]
    computed_tokens: int
    budget: int


class Passes:
    """Computes the passes of steps, with fewer tokens each where memory runs out. `longest` is the longest row of the run."""

    def __init__(
        self,
        trainee: Learner,
        budget: PassBudget,
        longest: int,
        *,
        share_prefixes: bool,
        emit: Callable[[Event], object],
    ) -> None:
        self._trainee, self._budget, self._longest = trainee, budget, longest
        self._share_prefixes, self._emit = share_prefixes, emit

    def of(self, step: int, items: Sequence[Trainable]) -> StepPacks:
        """Return a step's items as packs."""
        budget = self._budget.at(step)
        return StepPacks(*self._trainee.packs_of(items, budget, self._share_prefixes), budget)

    def computed(self, step: int, items: Sequence[Trainable], work: StepPacks, total_weight: float) -> tuple[float, StepPacks]:
        """Compute a step's passes; return its loss, and the packs that it was computed in.

        Raises WontFitError where memory does not even hold a pass of the longest row."""
        while True:
            if work.budget != self._budget.at(step):  # packed before memory ran out in another step
                work = self.of(step, items)
            loss = self._attempted(step, work, total_weight)
            if loss is not None:
                return loss, work

    def _attempted(self, step: int, work: StepPacks, total_weight: float) -> float | None:
        """Return the step's loss; None: memory ran out, and passes are shorter from here on."""
        try:
            return sum(self._trainee.forward_backward(batch, total_weight) for batch in work.packs)
        except (MemoryError, RuntimeError) as error:
            if not is_short_of_memory(error):
                raise
            if work.budget <= self._longest:
                rows = f"a pass of {self._longest:,} tokens, as many as the longest row has"
                raise told_shortage(f"step {step}, in {rows}", error) from error
        # The error is gone by here, and with it the frames that held what the pass had made so far.
        self._trainee.discard_step()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        self._shorten(step, work.budget)
        return None

    def _shorten(self, step: int, tokens: int) -> None:
        fewer = max(tokens // 2, self._longest)
        self._budget.shortened.append((step, fewer))
        self._emit(PassesShortened(step=step, micro_batch_tokens=fewer))
        self._emit(
            Warned(
                message=f"memory ran out in step {step}: it is repeated in passes of {fewer:,} tokens in place of {tokens:,}, and "
                "all later steps have such passes; the rows of a step stay the same, last bits may differ"
            )
        )
