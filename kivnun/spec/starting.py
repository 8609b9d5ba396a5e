"""Choices and rules of a run that goes on with an adapter. Next: `resolve.py`, which asks; `train/continued.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kivnun.spec.adapters import AdapterSpec, LowRank
from kivnun.spec.problems import Problem
from kivnun.spec.yaml_text import write_scalar


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """What makes an adapter on disk what it is. `target_modules` names its layers, by their ends where these say it all."""

    kind: str
    rank: int
    alpha: float
    rslora: bool
    target_modules: tuple[str, ...]


def start_mismatches(adapter: AdapterSpec, start: StoredAdapter | None) -> Iterator[Problem]:
    """Yield what the spec says otherwise than the adapter it starts from. Which layers are meant only the base can say."""
    if start is None or not isinstance(adapter, LowRank):
        return
    if adapter.kind != start.kind:
        text = f"adapter.kind is {adapter.kind}, but the adapter in {adapter.start_from} is {start.kind}"
        yield Problem("adapter.kind", text, f"set adapter.kind to {start.kind}")
    given: list[tuple[str, object, object]] = [
        ("rank", adapter.rank, start.rank), ("alpha", adapter.alpha, start.alpha), ("rslora", adapter.rslora, start.rslora),
    ]  # fmt: skip
    for name, said, stored in given:
        if name in adapter.model_fields_set and said is not None and said != stored:
            text = f"adapter.{name} is {write_scalar(said)}, but the adapter in {adapter.start_from} has {write_scalar(stored)}"
            yield Problem(f"adapter.{name}", text, "leave it out to take the adapter's over, or leave start_from out to start anew")


def start_choices(adapter: AdapterSpec, start: StoredAdapter | None) -> Iterator[tuple[str, object, str]]:
    """Yield (path, value, reason) of what is taken over."""
    if start is None or not isinstance(adapter, LowRank):
        return
    taken: list[tuple[str, object]] = [
        ("rank", start.rank),
        ("rslora", start.rslora),
        ("target_modules", list(start.target_modules)),
    ]
    for name, value in taken:
        if name not in adapter.model_fields_set:
            yield f"adapter.{name}", value, "as the adapter in start_from has it"
    if adapter.alpha is None:
        yield "adapter.alpha", start.alpha, "as the adapter in start_from has it"
