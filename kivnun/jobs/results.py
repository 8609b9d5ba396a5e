"""The results of a job as the tables that scripts read: a row for each step that was reported, in each dialect's columns.

Two files are kept, one for each dialect, and after them the report of the examples, so that the first file of a job is always its
table. Whoever ends a job calls `tables` and writes the files; whoever shows the job calls `shown`. Next: `tuning.py`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kivnun.jobs.tuning import JobEvent

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


def tables(events: Iterable[JobEvent]) -> list[tuple[str, bytes]]:
    """Return the name and content of each dialect's file, OpenAI's first, from a job's events in any order."""
    steps = {event.data["step"]: event.data for event in sorted(events, key=lambda it: it.number) if event.type == "metrics"}
    rows = [steps[step] for step in sorted(steps)]
    return [(OPENAI_FILE, results_csv(rows, azure=False)), (AZURE_FILE, results_csv(rows, azure=True))]


def results_csv(rows: Iterable[Mapping[str, Any]], *, azure: bool) -> bytes:
    """Return a table of steps; what a step did not measure is blank."""
    columns = _AZURE if azure else _OPENAI
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row.get(key)) for key in columns.values()] for row in rows)
    return text.getvalue().encode()


def shown(result_files: Sequence[str], *, azure: bool) -> list[str]:
    """Return a job's files as a dialect shows them: of the two tables its own, then the rest. A job that failed has no tables."""
    if len(result_files) < 2:
        return [*result_files]
    return [*result_files[1:2], *result_files[2:]] if azure else [*result_files[:1], *result_files[2:]]


def _cell(value: Any) -> str:
    return "" if value is None else str(round(value, 5)) if isinstance(value, float) else str(value)
