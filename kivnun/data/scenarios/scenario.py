"""What a scenario is: a task with the recipe of its data, the spec that tunes on it, and the metric that decides.

Each lies in a folder of its own beside this file: `recipe.py` (the rows), `spec.yaml` (the run), `README.md` (the page).
Next: `overlap.py`, what `write` tells of the two files it makes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

from kivnun.artifacts import atomic_write
from kivnun.data.scenarios.overlap import Overlap, overlap

SEED = 7
Row: TypeAlias = dict[str, Any]
"""One line of a data file, in a shape that `data/formats.py` reads."""
Topic: TypeAlias = tuple[str, str]
"""A kind of `data/splits.py` and a name."""
FILES = ("train.jsonl", "validation.jsonl", "spec.yaml", "overlap.json")


@dataclass(frozen=True, slots=True)
class Example:
    """One row and the topics that it is about, all of them on one side of the split."""

    row: Row
    topics: tuple[Topic, ...]


class Recipe(Protocol):
    """What the `recipe` module of a scenario's folder holds."""

    @staticmethod
    def examples(split: str, count: int, seed: int) -> list[Example]:
        """Return `count` rows of one side, "train" or "test": a pure function of its arguments."""
        ...

    @staticmethod
    def convert(record: Row) -> Row:
        """Return the row that a published data set's record gives in this task's template. Raises DataError."""
        ...


@dataclass(frozen=True, slots=True)
class Scenario:
    """A task that a model can be tuned on and scored on.

    `table_row` is the row of the technique table that it stands for: 1 domain, 2 classification, entities and translation,
    3 questions, 4 chat, 5 creative. `main_metric` is the figure that decides, `metrics` are all that its spec asks for; the counts
    are those of the built-in recipe. `replies` is false for running text, which has none.
    """

    name: str
    table_row: int
    title: str
    main_metric: str
    higher_is_better: bool
    metrics: tuple[str, ...]
    train_rows: int
    validation_rows: int
    replies: bool = True

    @property
    def folder(self) -> Path:
        """Return where the scenario's spec and page are."""
        return Path(__file__).parent / self.name

    @property
    def recipe(self) -> Recipe:
        """Return the recipe, loaded when it is asked for: some read CLDR, which takes longer than a command's help."""
        return cast(Recipe, import_module(f"{__package__}.{self.name}.recipe"))

    def examples(self, split: str, count: int | None = None, seed: int = SEED) -> list[Example]:
        """Return the rows of one side with their topics; `count` defaults to the scenario's own."""
        default = self.train_rows if split == "train" else self.validation_rows
        return self.recipe.examples(split, default if count is None else count, seed)

    def write(self, folder: Path, seed: int = SEED, change: Callable[[list[Row]], list[Row]] | None = None) -> Overlap:
        """Write FILES into `folder`, ready for `kivnun tune FOLDER/spec.yaml`; return how far the two sides overlap.

        `change` is laid over the training rows: a positive control shuffles them. The files are the same bytes each time.
        """
        train, validation = self.examples("train", seed=seed), self.examples("test", seed=seed)
        rows = [example.row for example in train]
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "train.jsonl", change(rows) if change else rows)
        write_rows(folder / "validation.jsonl", [example.row for example in validation])
        atomic_write(folder / "spec.yaml", (self.folder / "spec.yaml").read_text(encoding="utf-8"))
        found = overlap([(e.row, e.topics) for e in train], [(e.row, e.topics) for e in validation])
        atomic_write(folder / "overlap.json", json.dumps(found.as_json(), ensure_ascii=False, indent=1) + "\n")
        return found


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def chat(*contents: str, system: str | None = None, weigh_last_only: bool = False) -> Row:
    """Return a row of the `messages` format: user and assistant in turn, the first being the user.

    With `weigh_last_only` the earlier replies are context and only the last is trained and scored.
    """
    messages: list[Row] = [{"role": "system", "content": system}] if system else []
    for place, content in enumerate(contents):
        message: Row = {"role": "assistant" if place % 2 else "user", "content": content}
        if weigh_last_only and place % 2 and place < len(contents) - 1:
            message["weight"] = 0
        messages.append(message)
    return {"messages": messages}
