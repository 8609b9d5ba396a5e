"""The real trainer: the pipeline in a work folder, its spec's paths as they are written there.

A job may go on in another folder or on another machine and is still the same run, so its spec's paths stay relative to the folder
that the trainer runs in. Next: `trainer.py` (who starts it), `../pipeline.py`.
"""

from __future__ import annotations

from pathlib import Path

from kivnun.pipeline import tune
from kivnun.spec import parse_spec

EXPOSED = 3  # adapters of epochs that stay


def tune_real(text: str) -> None:
    """Run a job's spec in this folder's `run`; go on with what is there already. Raises KivnunError subclasses."""
    tune(parse_spec(text, folder=None), text, Path("run"), resume=True, exposed=EXPOSED)
