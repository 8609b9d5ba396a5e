"""How many rows and tokens a run will train on, counted with the base's tokenizer where it is here, else estimated from letters.

Next: `advise.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kivnun.data.checks import num_characters
from kivnun.data.formats import stream_records
from kivnun.data.problems import Problems
from kivnun.errors import DataError, RowProblem
from kivnun.plan.bases import KnownBase

# Letters of a token of Phi-3's vocabulary of 32,064 in English; other scripts have fewer, so that their rows are longer.
LETTERS_A_TOKEN = 3.5


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """Training rows: how many, their tokens in all and the longest's. `counted` is false for an estimate."""

    count: int
    tokens: int
    longest: int
    counted: bool


def training_rows(file: Path, base: KnownBase) -> TrainingRows:
    """Return the size of a data file's rows. Raises DataError with all that is wrong with them."""
    if base.folder is not None:
        from kivnun.data.loader import load_dataset
        from kivnun.data.template import load_tokenizer
        from kivnun.spec import DataSpec

        spec = DataSpec.model_validate({"train": str(file), "validation": None})
        data = load_dataset(spec, load_tokenizer(base.folder), 0, base.sizes.longest)
        return TrainingRows(len(data.train), data.report.train_tokens, data.report.longest_row, True)
    return _estimated(file)


def _estimated(file: Path) -> TrainingRows:
    problems = Problems()
    count = total = longest = 0
    for item in stream_records(file):
        if isinstance(item, RowProblem):
            problems.add(item)
            continue
        tokens = max(1, round(num_characters(item) / LETTERS_A_TOKEN))
        count, total, longest = count + 1, total + tokens, max(longest, tokens)
    if problems or not count:
        raise DataError(f"{file}: rows cannot be used", tuple(problems.kept), hint=f"kivnun data check {file} says more")
    return TrainingRows(count, total, longest, False)
