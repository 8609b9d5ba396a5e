"""What `auto` stands for: the published rules, as numbers that a job shows before it is queued.

Pure. Next: `planning.py`, which asks with the number of examples that were found good.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kivnun.spec.resolve import TINY_BASE, default_rate

MethodType = Literal["supervised", "dpo"]

EPOCHS, FEWEST_SEEN, MOST_SEEN, MOST_EPOCHS = 3, 100, 25_000, 25
BATCH_SHARE, MOST_IN_BATCH = 0.002, 256
BETA = 0.1


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """Resolved numbers. `beta` is None for supervised jobs; `learning_rate` is the multiplier times the base's own rate."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    learning_rate: float
    beta: float | None = None

    def shown(self) -> dict[str, Any]:
        """Return them as a job object has them."""
        beta = {} if self.beta is None else {"beta": self.beta}
        return {
            "n_epochs": self.n_epochs,
            "batch_size": self.batch_size,
            "learning_rate_multiplier": self.learning_rate_multiplier,
            **beta,
        }


def resolve(method: MethodType, asked: Mapping[str, Any], examples: int, parameters: int | None) -> Hyperparameters:
    """Return the numbers of a job: those asked for, and by rule where `auto` or nothing was.

    `parameters` counts the base's numbers (None: not known, taken for a large one)."""
    multiplier = float(_given(asked, "learning_rate_multiplier", 1.0))
    tiny = parameters is not None and parameters < TINY_BASE
    rate = default_rate(method, "lora", tiny=tiny)
    return Hyperparameters(
        n_epochs=int(_given(asked, "n_epochs", auto_epochs(examples))),
        batch_size=int(_given(asked, "batch_size", auto_batch_size(examples))),
        learning_rate_multiplier=multiplier,
        learning_rate=float(f"{rate * multiplier:.9g}"),
        beta=float(_given(asked, "beta", BETA)) if method == "dpo" else None,
    )


def auto_epochs(examples: int) -> int:
    """Return the epochs of the published rule: three, but at least 100 examples seen in all, and at most 25,000.

    Source: openai-cookbook, Chat_finetuning_data_prep.ipynb."""
    if EPOCHS * examples < FEWEST_SEEN:
        return min(MOST_EPOCHS, FEWEST_SEEN // examples)
    if EPOCHS * examples > MOST_SEEN:
        return max(1, MOST_SEEN // examples)
    return EPOCHS


def auto_batch_size(examples: int) -> int:
    """Return about 0.2 % of the examples, from 1 to 256."""
    return max(1, min(MOST_IN_BATCH, round(BATCH_SHARE * examples)))


def _given(asked: Mapping[str, Any], name: str, otherwise: float) -> Any:
    value = asked.get(name)
    return otherwise if value is None or value == "auto" else value
