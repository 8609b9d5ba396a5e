"""The one generator: prompts in, tokens out. Sampling, evaluation, chat and the service all come through here.

Rows are prefilled together as one pack and then decoded together, a token each per pass, every row with its own cache and its
own stream of draws, so that what a row says does not depend on which rows it was asked with.
Shapes: N rows being decoded, D model width, V vocabulary. Next: `attention.py` (the cache), `sampling.py` (how
tokens are chosen), `kivnun/serve/scheduler.py` (rows that come and go).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kivnun.model.attention import KVCache, Rows
from kivnun.model.load import Base
from kivnun.model.loss import padded
from kivnun.model.sampling import ROWS_AT_ONCE, SamplingParams
from kivnun.randomness import generator

__all__ = ["ROWS_AT_ONCE", "OnToken", "SamplingParams", "generate"]

SCORED_AT_ONCE = 256  # positions whose logits are held together

OnToken = Callable[[int, int], bool | None]
"""Hears (place of the prompt, id) as each token is chosen; True ends that row with this token."""


class Form(Protocol):
    """What an answer is held to, token by token."""

    def allowed_V(self, size: int) -> np.ndarray:
        """Return which tokens may come next (bool [V])."""
        ...

    def take(self, token: int) -> bool:
        """Hear which one came; return whether none may follow."""
        ...


@dataclass(slots=True, eq=False)
class Row:
    """A row while it is written: its place in the cache, all its ids, and how to choose the next. Made by `new_row`."""

    slot: int
    ids: list[int]
    prompt_length: int
    params: SamplingParams
    draws: np.random.Generator | None
    form: Form | None = None
    done: bool = False
    ended: bool = False  # by a stop id or its form, not by its length
    counts: dict[int, int] = field(default_factory=dict[int, int])

    @property
    def produced(self) -> list[int]:
        return self.ids[self.prompt_length :]


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
    rows = [new_row(place, prompt, params, place if streams is None else streams[place]) for place, prompt in enumerate(prompts)]
    for at in range(0, len(rows), ROWS_AT_ONCE):
        _answer(base, rows[at : at + ROWS_AT_ONCE], on_token)
    return [row.produced for row in rows]


def new_row(slot: int, prompt: Sequence[int], params: SamplingParams, stream: int, form: Form | None = None) -> Row:
    """Return a row that nothing is written of yet; no other row of its cache has its `slot`."""
    assert len(prompt) > 0
    draws = generator(params.seed, "sample", stream) if params.temperature > 0 else None
    return Row(slot, list(prompt), len(prompt), params, draws, form)


def _answer(base: Base, rows: list[Row], on_token: OnToken | None) -> None:
    cache = KVCache()
    logits_NV = prefill(base, cache, rows)
    while True:
        for row, logits_V in zip(rows, logits_NV, strict=True):
            token = take_next(row, logits_V)
            if token is not None and on_token is not None and on_token(row.slot, token):
                row.done = True
        for row in rows:
            if row.done:
                cache.drop(row.slot)
        rows = [row for row in rows if not row.done]
        if not rows:
            return
        logits_NV = decode_step(base, cache, rows)


def take_next(row: Row, logits_V: Tensor) -> int | None:
    """Choose a row's next token from the logits after its last, and add it; None where the row ends without one.

    `done` says whether the row has ended, `ended` whether that was not for its length."""
    token = _choose(_adjusted(row, logits_V), row.params, row.draws)
    if token in row.params.stop_ids:
        row.done = row.ended = True
        return None
    row.ids.append(token)
    row.counts[token] = row.counts.get(token, 0) + 1
    row.ended = row.form is not None and row.form.take(token)
    row.done = row.ended or len(row.ids) - row.prompt_length == row.params.max_new_tokens
    return token


def prefill(base: Base, cache: KVCache, rows: Sequence[Row]) -> Tensor:
    """Fill the cache with all tokens of the rows; return the logits [N, V] after each row's last token."""
    return _pass(base, cache, rows, [row.ids for row in rows], [0] * len(rows))


def decode_step(base: Base, cache: KVCache, rows: Sequence[Row]) -> Tensor:
    """Run each row's newest token; return the logits [N, V] after it.

    A row that has just crossed LongRoPE's original length is filled again from its start: its cached keys were rotated with the
    short factors.
    """
    crossing = [row for row in rows if base.is_long(len(row.ids)) != base.is_long(len(row.ids) - 1)]
    for row in crossing:
        cache.drop(row.slot)
    new = [row.ids if row in crossing else row.ids[-1:] for row in rows]
    return _pass(base, cache, rows, new, [len(row.ids) - len(ids) for row, ids in zip(rows, new, strict=True)])


def _pass(base: Base, cache: KVCache, rows: Sequence[Row], new: Sequence[list[int]], starts: Sequence[int]) -> Tensor:
    lengths = [len(ids) for ids in new]
    ids_T = torch.tensor([token for ids in new for token in ids], device=base.device)
    positions_T = torch.cat([torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]).to(
        base.device
    )
    last_N = torch.tensor(np.cumsum(lengths) - 1, device=base.device)
    last_ND = base.hidden(ids_T, positions_T, Rows(lengths, cache, [row.slot for row in rows]), last_N)
    return base.head(padded(last_ND, base.kernels))[: len(rows)].float()


def _adjusted(row: Row, logits_V: Tensor) -> Tensor:
    """Return the logits with what the request adds to them and takes off, float32; those its form forbids are -inf."""
    params = row.params
    changes = dict(params.logit_bias)
    if params.presence_penalty or params.frequency_penalty:
        for token, count in row.counts.items():
            changes[token] = changes.get(token, 0.0) - params.presence_penalty - count * params.frequency_penalty
    if not changes and row.form is None:
        return logits_V
    logits_V = logits_V.clone()
    if changes:
        logits_V[list(changes)] += torch.tensor(list(changes.values()), device=logits_V.device)
    if row.form is not None:
        logits_V[torch.from_numpy(~row.form.allowed_V(len(logits_V))).to(logits_V.device)] = -math.inf
    return logits_V


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


def likeliest(logits_V: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Return the model's own log-probability of a token, in nats, and the `count` likeliest tokens with theirs: before
    temperature, nucleus, penalties and forms."""
    logprobs_V = torch.log_softmax(logits_V, dim=0)
    top = torch.topk(logprobs_V, count) if count else None
    pairs = [] if top is None else list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return float(logprobs_V[token]), pairs


@torch.no_grad()
def prompt_log_probs(base: Base, ids: Sequence[int], count: int) -> list[tuple[float, list[tuple[int, float]]]]:
    """Return what `likeliest` does for each of a prompt's tokens but the first, which nothing comes before."""
    ids_T = torch.tensor(list(ids), device=base.device)
    h_TD = base.hidden(ids_T, torch.arange(len(ids), device=base.device), Rows([len(ids)]))
    found: list[tuple[float, list[tuple[int, float]]]] = []
    for at in range(0, len(ids) - 1, SCORED_AT_ONCE):
        h_CD = h_TD[at : min(at + SCORED_AT_ONCE, len(ids) - 1)]
        logits_CV = base.head(padded(h_CD, base.kernels))[: len(h_CD)].float()
        found += [likeliest(logits_V, token, count) for logits_V, token in zip(logits_CV, ids[at + 1 :], strict=False)]
    return found
