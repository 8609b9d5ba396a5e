"""Jobs, their events and checkpoints as clients read them: OpenAI's objects, with Azure's words where its dialect has others.

Times are whole seconds. What OpenAI's objects lack stands under `x_`. Next: `api/tuning.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kivnun.jobs import results
from kivnun.jobs.models import Model
from kivnun.jobs.states import TERMINAL
from kivnun.jobs.tuning import Job, JobEvent
from kivnun.service.dialect import Dialect

AZURE_STATUS = {"validating_files": "pending", "queued": "pending"}
AZURE_LEVEL = {"warn": "warning"}
METRICS = (
    "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy", "full_valid_loss",
    "full_valid_mean_token_accuracy",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Waiting:
    """Where a job stands in the queue, and when it may begin (None: nobody knows)."""

    position: int
    tokens_ahead: int
    estimated_start: float | None


def job_object(job: Job, dialect: Dialect, waiting: Waiting | None = None) -> dict[str, Any]:
    """Return a job; `waiting` is where it stands while it is queued."""
    shown, azure = _hyperparameters(job), dialect == "azure"
    ended = job.status in TERMINAL
    return {
        "object": "fine_tuning.job",
        "id": job.id,
        "created_at": int(job.created_at),
        "finished_at": _seconds(job.finished_at),
        "model": job.model,
        "fine_tuned_model": job.tuned_model,
        "organization_id": f"org-{job.tenant}",
        "status": AZURE_STATUS.get(job.status, job.status) if azure else job.status,
        "hyperparameters": shown if job.method["type"] == "supervised" else {},
        "method": {"type": job.method["type"], job.method["type"]: {"hyperparameters": shown}},
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": results.shown(job.result_files, azure=azure),
        "trained_tokens": job.trained_tokens if ended and job.started_at is not None else None,
        "error": job.error,
        "seed": job.seed,
        "estimated_finish": _seconds(job.estimated_finish),
        "integrations": job.integrations or [],
        "metadata": job.metadata,
        "user_provided_suffix": job.suffix,
        **_extensions(job, waiting),
    }


def event_object(event: JobEvent, dialect: Dialect) -> dict[str, Any]:
    return {
        "object": "fine_tuning.job.event",
        "id": event.id,
        "created_at": int(event.created_at),
        "level": AZURE_LEVEL.get(event.level, event.level) if dialect == "azure" else event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data,
    }


def checkpoint_object(model: Model) -> dict[str, Any]:
    """Return a checkpoint; a metric that was not measured is left out."""
    measured = {name: model.metrics[name] for name in METRICS if model.metrics.get(name) is not None}
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": model.checkpoint,
        "created_at": int(model.created_at),
        "fine_tuned_model_checkpoint": model.id,
        "fine_tuning_job_id": model.job,
        "step_number": model.step,
        "metrics": {"step": model.step, **measured},
    }


def _hyperparameters(job: Job) -> dict[str, Any]:
    """Return the resolved numbers; before they are known, what was asked for."""
    return dict(job.hyperparameters or job.method[job.method["type"]]["hyperparameters"])


def _extensions(job: Job, waiting: Waiting | None) -> dict[str, Any]:
    facts, found = job.facts, dict(job.extensions)
    if facts:
        names = ("examples", "held_out", "tokens", "trained_tokens", "truncated", "refused", "overlap")
        found["x_learning_rate"] = facts["learning_rate"]
        found["x_examples"] = {name: facts[name] for name in names}
    if job.total_steps is not None:
        found["x_progress"] = {
            "step": job.step,
            "total_steps": job.total_steps,
            "trained_tokens": job.trained_tokens,
            "planned_tokens": job.planned_tokens,
            "planned_seconds": job.planned_seconds,
        }
    if job.status == "queued" and waiting is not None:
        found["x_queue"] = {
            "position": waiting.position,
            "tokens_ahead": waiting.tokens_ahead,
            "estimated_start": _seconds(waiting.estimated_start),
        }
    return found


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
