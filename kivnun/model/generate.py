"""The one generator: prompts in, tokens out. Sampling, evaluation and chat all come through here.

Rows are prefilled together as one pack and then decoded together, a token each per pass, every row with its own cache and its
own stream of draws, so that what a row says does not depend on which rows it was asked with.
Shapes: N rows being decoded, D model width, V vocabulary. Next: `attention.py` (the cache).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kivnun.model.attention import KVCache, Rows
from kivnun.model.load import Base
from kivnun.model.loss import padded
from kivnun.model.sampling import ROWS_AT_ONCE, SamplingParams
from kivnun.randomness import generator

__all__ = ["ROWS_AT_ONCE", "OnToken", "SamplingParams", "generate"]

OnToken = Callable[[int, int], bool | None]
"""Hears (place of the prompt, id) as each token is chosen; True ends that row with this token."""


@dataclass(slots=True)
class _Row:
    place: int
    ids: list[int]
    prompt_length: int
    draws: np.random.Generator | None
    slot: int = 0
    done: bool = False
    produced: list[int] = field(default_factory=list)


@torch.no_grad()
def generate(
    base: Base,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    on_token: OnToken | None = None,
    streams: Sequence[int] | None = None,
) -> list[list[int]]:
    """Return the new token ids of each prompt, in the prompts' order, stop ids left out.

    `on_token(row, id)` hears each token as it is chosen, and may end the row; what it raises ends all. `streams` numbers each
    prompt's draws, so that a row drawn by its own number says the same in any company (None: by its place). Runs with whatever
    adapter the base has been lent. Prompts must not be empty: there would be nothing to predict the first token from.
    """
    rows = [_row(place, prompt, params, place if streams is None else streams[place]) for place, prompt in enumerate(prompts)]
    for at in range(0, len(rows), ROWS_AT_ONCE):
        _answer(base, rows[at : at + ROWS_AT_ONCE], params, on_token)
    return [row.produced for row in rows]


def _row(place: int, prompt: Sequence[int], params: SamplingParams, stream: int) -> _Row:
    assert len(prompt) > 0
    draws = generator(params.seed, "sample", stream) if params.temperature > 0 else None
    return _Row(place, list(prompt), len(prompt), draws, slot=place)


def _answer(base: Base, rows: list[_Row], params: SamplingParams, on_token: OnToken | None) -> None:
    cache = KVCache()
    logits_NV = prefill(base, cache, rows)
    active = rows
    for count in range(1, params.max_new_tokens + 1):
        for row, logits_V in zip(active, logits_NV, strict=True):
            _take(row, _choose(logits_V, params, row.draws), params, on_token)
        for row in active:
            if row.done:
                cache.drop(row.slot)
        active = [row for row in active if not row.done]
        if not active or count == params.max_new_tokens:
            return
        logits_NV = decode_step(base, cache, active)


def _take(row: _Row, token: int, params: SamplingParams, on_token: OnToken | None) -> None:
    if token in params.stop_ids:
        row.done = True
        return
    row.ids.append(token)
    row.produced.append(token)
    if on_token is not None and on_token(row.place, token):
        row.done = True


def prefill(base: Base, cache: KVCache, rows: Sequence[_Row]) -> Tensor:
    """Fill the cache with all tokens of the rows; return the logits [N, V] after each row's last token."""
    return _pass(base, cache, rows, [row.ids for row in rows], [0] * len(rows))


def decode_step(base: Base, cache: KVCache, rows: Sequence[_Row]) -> Tensor:
    """Run each row's newest token; return the logits [N, V] after it.

    A row that has just crossed LongRoPE's original length is filled again from its start: its cached keys were rotated with the
    short factors.
    """
    crossing = [row for row in rows if base.is_long(len(row.ids)) != base.is_long(len(row.ids) - 1)]
    for row in crossing:
        cache.drop(row.slot)
    new = [row.ids if row in crossing else row.ids[-1:] for row in rows]
    return _pass(base, cache, rows, new, [len(row.ids) - len(ids) for row, ids in zip(rows, new, strict=True)])


def _pass(base: Base, cache: KVCache, rows: Sequence[_Row], new: Sequence[list[int]], starts: Sequence[int]) -> Tensor:
    lengths = [len(ids) for ids in new]
    ids_T = torch.tensor([token for ids in new for token in ids], device=base.device)
    positions_T = torch.cat([torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]).to(
        base.device
    )
    last_N = torch.tensor(np.cumsum(lengths) - 1, device=base.device)
    last_ND = base.hidden(ids_T, positions_T, Rows(lengths, cache, [row.slot for row in rows]), last_N)
    return base.head(padded(last_ND, base.kernels))[: len(rows)].float()


def _choose(logits_V: Tensor, params: SamplingParams, draws: np.random.Generator | None) -> int:
    if draws is None:
        return int(logits_V.argmax())
    p_V = torch.softmax(logits_V.double() / params.temperature, dim=0).cpu().numpy()
    order = np.argsort(-p_V, kind="stable")
    cumulative = np.cumsum(p_V[order])
    # Nucleus sampling (Holtzman et al. 2020): the fewest tokens whose mass reaches top_p.
    kept = int(np.searchsorted(cumulative, params.top_p * cumulative[-1])) + 1 if params.top_p < 1.0 else len(order)
    drawn = int(np.searchsorted(cumulative[:kept], draws.random() * cumulative[kept - 1], side="right"))
    return int(order[min(drawn, kept - 1)])
