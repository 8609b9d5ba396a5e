"""The results of a job as the tables that scripts read: a row for each step that was reported, in each dialect's columns.

Two files are kept, one for each dialect, and after them the report of the examples, so that the first file of a job is always its
table. Whoever ends a job calls `write_tables`; whoever shows the job calls `shown`. Next: `tuning.py`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kivnun.artifacts import storage_errors

OPENAI_FILE, AZURE_FILE, REPORT_FILE = "step_metrics.csv", "results.csv", "report.jsonl"

# Column of the table -> key of a metrics event.
_OPENAI = {
    "step": "step", "train_loss": "train_loss", "train_accuracy": "train_mean_token_accuracy", "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
}  # fmt: skip
_AZURE = {
    "step": "step", "train_loss": "train_loss", "train_mean_token_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss", "validation_mean_token_accuracy": "valid_mean_token_accuracy",
    "full_valid_loss": "full_valid_loss", "full_valid_mean_token_accuracy": "full_valid_mean_token_accuracy",
}  # fmt: skip


def write_tables(rows: Iterable[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write each dialect's file into a folder, OpenAI's first, of what was told of each step in order; return their paths.

    What a step did not measure is blank. No more than a row is held in memory. Raises StorageError."""
    paths = [folder / OPENAI_FILE, folder / AZURE_FILE]
    with (
        storage_errors(folder),
        paths[0].open("w", encoding="utf-8", newline="") as openai,
        paths[1].open("w", encoding="utf-8", newline="") as azure,
    ):
        tables = [(csv.writer(openai, lineterminator="\n"), _OPENAI), (csv.writer(azure, lineterminator="\n"), _AZURE)]
        for writer, columns in tables:
            writer.writerow(columns)
        for row in rows:
            for writer, columns in tables:
                writer.writerow([_cell(row.get(key)) for key in columns.values()])
    return paths


def shown(result_files: Sequence[str], *, azure: bool) -> list[str]:
    """Return a job's files as a dialect shows them: of the two tables its own, then the rest. A job that failed has no tables."""
    if len(result_files) < 2:
        return [*result_files]
    return [*result_files[1:2], *result_files[2:]] if azure else [*result_files[:1], *result_files[2:]]


def _cell(value: Any) -> str:
    return "" if value is None else str(round(value, 5)) if isinstance(value, float) else str(value)
