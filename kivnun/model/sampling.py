"""How tokens are chosen, in numbers alone: what a request may ask of `generate.py`, for those who load no model.

Next: `generate.py` (who obeys it), `kivnun/serve/question.py` (who reads it from a request).
"""

from __future__ import annotations

from dataclasses import dataclass

# Rows decoded together. More rows make better use of matrix products, and hold more cache.
ROWS_AT_ONCE = 64

# Of an answer that was not limited: what it is taken to need before it is known.
LIKELY_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. Temperature 0 is greedy: the most likely token, the lowest id among equals.

    `stop_ids` end a row and are not part of its answer. Stream i draws from (seed, "sample", i), one number per token.
    `logit_bias` (id, number) is added to logits; a token that the answer holds c times already loses
    `presence_penalty` + c `frequency_penalty`.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
