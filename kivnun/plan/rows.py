"""How many rows and tokens a run will train on, counted with the base's tokenizer where it is here, else estimated from letters.

Next: `advise.py` (which asks of one file), `plan.py` (which asks of all that a spec names).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kivnun.data.checks import num_characters
from kivnun.data.formats import UNKNOWN, stream_records
from kivnun.data.loader import Dataset
from kivnun.data.problems import Problems
from kivnun.data.repeats import fingerprint
from kivnun.data.rows import PreferenceRecord, Record
from kivnun.errors import DataError, RowProblem
from kivnun.plan.bases import KnownBase
from kivnun.spec import DataSpec

# Letters of a token of Phi-3's vocabulary of 32,064 in English; other scripts have fewer, so that their rows are longer.
LETTERS_A_TOKEN = 3.5
PROMPTS_LOOKED_AT = 1000  # held-out rows that may be replied to


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

        spec = DataSpec.model_validate({"train": str(file), "validation": None})
        data = load_dataset(spec, load_tokenizer(base.folder), 0, base.sizes.longest)
        return TrainingRows(len(data.train), data.report.train_tokens, data.report.longest_row, True)
    return _estimated_file(file)


def _estimated_file(file: Path) -> TrainingRows:
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


@dataclass(frozen=True)
class RunRows:
    """The rows of a run. `lengths` and `held_out` are tokens of rows (of a pair: both sides), `sides` of each side of a training
    row, `prompts` of prompts of the first held-out rows that have one; `sizes` and `shares` split training rows into files.
    `trained_tokens` is None and `counted` false for an estimate."""

    format: str
    lengths: np.ndarray
    sides: np.ndarray
    held_out: np.ndarray
    prompts: np.ndarray
    sizes: tuple[int, ...]
    shares: tuple[float, ...] | None
    trained_tokens: int | None
    skipped: int = 0
    truncated: int = 0
    overlap: int = 0
    counted: bool = True

    @property
    def longest(self) -> int:
        """Return the tokens of the longest row."""
        return int(max(self.lengths.max(), self.held_out.max(initial=0)))

    @property
    def tokens(self) -> int:
        """Return the tokens of all training rows, once."""
        return int(self.lengths.sum())

    @property
    def all_tokens(self) -> int:
        """Return the tokens of all rows, held-out ones included."""
        return self.tokens + int(self.held_out.sum())

    def cut_to(self, length: int) -> RunRows:
        """Return about the rows that are left when none may have more than `length` tokens (of a pair: each side)."""
        most = 2 * length if self.format == "preference" else length
        kept = np.minimum(self.lengths, most)
        trained = None if self.trained_tokens is None else round(self.trained_tokens * float(kept.sum()) / self.tokens)
        return replace(
            self,
            lengths=kept,
            sides=np.minimum(self.sides, length),
            held_out=np.minimum(self.held_out, most),
            prompts=np.minimum(self.prompts, length),
            trained_tokens=trained,
        )


def rows_of(dataset: Dataset) -> RunRows:
    """Return the rows of a data set that was read."""
    train, held_out, report = dataset.train, dataset.validation, dataset.report
    prompts = [row.sides[0].prompt_len for row in held_out[:PROMPTS_LOOKED_AT]]
    return RunRows(
        dataset.format,
        train.lengths,
        train.rows.side_lengths,
        held_out.lengths,
        np.asarray([length for length in prompts if length], dtype=np.int64),
        train.sizes,
        train.shares,
        report.trained_tokens,
        report.skipped,
        report.truncated,
        report.overlap,
    )


def estimated_rows(spec: DataSpec) -> RunRows:
    """Return about how long a spec's rows are where no tokenizer is at hand. Raises DataError with all that is wrong with them."""
    read, problems = [_read_file(source.path, spec) for source in spec.train], Problems()
    held = _read_file(spec.validation, spec) if isinstance(spec.validation, Path) else None
    every = [*read, *([held] if held else [])]
    for problem in (problem for file in every for problem in file.problems.kept):
        problems.add(problem)
    formats = {file.format for file in every} - {UNKNOWN}
    if (problems and spec.bad_rows == "refuse") or len(formats) != 1 or not all(len(file.sides) for file in every):
        what = "hold rows of different formats" if len(formats) > 1 else "hold rows that cannot be used"
        raise DataError(f"the files {what}", tuple(problems.kept), hint="kivnun data check FILE says more")
    lengths, sizes = np.concatenate([file.sides.sum(axis=1) for file in read]), tuple(len(file.sides) for file in read)
    held_out = held.sides.sum(axis=1) if held else lengths[:0]
    if isinstance(spec.validation, float):
        count = min(max(round(len(lengths) * spec.validation), 1), len(lengths) - 1)
        # Which rows are held out hangs on the seed; of about how long they are, their mean says enough.
        held_out, lengths = lengths[:count], lengths[count:]
        sizes = _less(sizes, count)
    prints = {its for file in read for its in file.prints}
    shares = tuple(source.share for source in spec.train if source.share is not None)
    name = formats.pop()
    rows = RunRows(
        name,
        lengths,
        np.concatenate([file.sides.ravel() for file in read]),
        held_out,
        held_out[:0] if name == "text" else held_out // 2,
        sizes,
        shares if len(shares) == len(sizes) else None,
        None,
        problems.rows,
        overlap=sum(its in prints for its in held.prints) if held else 0,
        counted=False,
    )
    return rows if spec.max_seq_len is None else rows.cut_to(spec.max_seq_len)


@dataclass(frozen=True)
class _File:
    """A file's rows: about how many tokens each side has [rows, sides], and what tells equal rows."""

    format: str
    sides: np.ndarray
    prints: list[bytes]
    problems: Problems


def _read_file(path: Path, spec: DataSpec) -> _File:
    stream = stream_records(path, spec.format, spec.columns, spec.instruction)
    sides: list[tuple[int, ...]] = []
    prints: list[bytes] = []
    problems = Problems()
    for item in stream:
        if isinstance(item, RowProblem):
            problems.add(item)
        else:
            sides.append(_estimated(item))
            prints.append(fingerprint(item))
    return _File(stream.format, np.asarray(sides, dtype=np.int64), prints, problems)


def _estimated(record: Record) -> tuple[int, ...]:
    """Return about how many tokens each side of a record has."""
    tokens = max(2, round(num_characters(record) / LETTERS_A_TOKEN))
    return (tokens, tokens) if isinstance(record, PreferenceRecord) else (tokens,)


def _less(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """Return the sizes of files from which so many rows are taken, from each its part."""
    total, left = sum(sizes), sum(sizes) - count
    kept = [max(1, size * left // total) for size in sizes]
    kept[-1] += left - sum(kept)
    return tuple(kept)
