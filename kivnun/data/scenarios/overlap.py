"""How far training and held-out rows overlap, in numbers: topics, equal rows, and near duplicates by character n-grams.

Two rows are as near as the Jaccard index of their sets of 8 letters in sequence; n-grams that more than a third of the training
rows share are left out, since they are the template's and not the row's.

Source of the measure: Broder 1997, "On the resemblance and containment of documents" (shingles).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from kivnun.data.near import nearest_by_runs, runs_of

LENGTH = 8
COMMON = 1 / 3
NEAR = 0.8
Labelled: TypeAlias = tuple[dict[str, Any], tuple[tuple[str, str], ...]]
"""A row with its topics."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """What the two sides share. `topics` maps a kind to (in training, held out, in both); `nearest_*` are Jaccard indices of each
    held-out row and the training row nearest to it; `equal_prompts` counts held-out prompts that training has too."""

    train_rows: int
    validation_rows: int
    topics: dict[str, tuple[int, int, int]]
    equal_rows: int
    equal_prompts: int
    near_rows: int
    nearest_median: float
    nearest_highest: float

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "near_from": NEAR, "ngram": LENGTH}

    @property
    def topics_in_both(self) -> int:
        return sum(both for _, _, both in self.topics.values())


def overlap(train: Sequence[Labelled], validation: Sequence[Labelled]) -> Overlap:
    """Return the overlap of two sets of rows; `validation` must not be empty."""
    texts = [text_of(row) for row, _ in train]
    held = [text_of(row) for row, _ in validation]
    prompts = {_prompt(row) for row, _ in train} - {""}
    nearest = sorted(nearest_of(texts, held))
    return Overlap(
        len(texts),
        len(held),
        _topics(train, validation),
        sum(text in set(texts) for text in held),
        sum(_prompt(row) in prompts for row, _ in validation),
        sum(value >= NEAR for value in nearest),
        round(nearest[len(nearest) // 2], 3),
        round(nearest[-1], 3),
    )


def nearest_of(train: Sequence[str], held: Sequence[str]) -> list[float]:
    """Return, for each held-out text, its Jaccard index with the nearest training text."""
    runs = [runs_of(text, LENGTH) for text in train]
    counts = Counter(run for row in runs for run in row)
    common = {run for run, count in counts.items() if count > COMMON * len(train)}
    own = [row - common for row in runs]
    return [pair.likeness for pair in nearest_by_runs(own, [runs_of(text, LENGTH) - common for text in held])]


def text_of(row: dict[str, Any]) -> str:
    """Return all that a row says, one turn a line."""
    return row["text"] if "text" in row else "\n".join(message["content"] for message in row["messages"])


def _prompt(row: dict[str, Any]) -> str:
    return "" if "text" in row else "\n".join(message["content"] for message in row["messages"][:-1])


def _topics(train: Sequence[Labelled], validation: Sequence[Labelled]) -> dict[str, tuple[int, int, int]]:
    sides = [_by_kind(train), _by_kind(validation)]
    kinds = sorted({kind for side in sides for kind in side})
    return {kind: (len(sides[0][kind]), len(sides[1][kind]), len(sides[0][kind] & sides[1][kind])) for kind in kinds}


def _by_kind(rows: Sequence[Labelled]) -> defaultdict[str, set[str]]:
    found: defaultdict[str, set[str]] = defaultdict(set)
    for _, topics in rows:
        for kind, name in topics:
            found[kind].add(name)
    return found
