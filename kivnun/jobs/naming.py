"""What a tuned model is called: its base, whose service made it, what the user called it, and eight letters of its job's id.

    ft:kivnun/tiny-phi:kivnun:my-name:7p4lURel                  the model of a job
    ft:kivnun/tiny-phi:kivnun:my-name:7p4lURel:ckpt-step-88     an earlier step of the same job

Names follow from the job alone, so that a worker that writes one twice writes the same one. Both dialects use them; Azure's
clients take any name that the job object holds. Next: `tuning.py`.
"""

from __future__ import annotations

import re

from kivnun.jobs.tuning import Job

LETTERS_OF_ID = 8
_CHECKPOINT = re.compile(r":ckpt-step-(\d+)$")


def model_name(job: Job, organization: str) -> str:
    """Return the id of a job's tuned model."""
    return f"ft:{job.base}:{organization}:{slug(job.suffix or '')}:{job.id[-LETTERS_OF_ID:]}"


def checkpoint_name(job: Job, organization: str, step: int) -> str:
    """Return the id of a job's model as it was after a step."""
    return f"{model_name(job, organization)}:ckpt-step-{step}"


def slug(suffix: str) -> str:
    """Return a user's suffix as it stands in a name: small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9-]", "-", suffix.lower())


def step_of(model: str) -> int | None:
    """Return the step of a checkpoint's id; None for any other model."""
    found = _CHECKPOINT.search(model)
    return int(found[1]) if found else None
