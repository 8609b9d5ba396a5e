"""Which states of a run are kept, and which one a resumed run begins from.

A checkpoint is a folder `step-000120` that appears whole: files, manifest, fsync, rename. The store knows nothing of tensors:
the trainee writes its own files into the folder it is given. Next: `train/loop.py`, which asks `Cadence` after each step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kivnun.artifacts import atomic_folder, check_manifest, discard, storage_errors, sweep, write_manifest
from kivnun.errors import IntegrityError

_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state whose every file agrees with its manifest. `warnings` names newer ones that did not and were passed over."""

    step: int
    path: Path
    fields: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


class CheckpointStore:
    """The checkpoints of one run, in `folder`; after each save the newest `keep` stay. One process writes, any may read."""

    def __init__(self, folder: Path, keep: int) -> None:
        assert keep >= 1, "a store that keeps nothing cannot be resumed from"
        self.folder = folder
        self.keep = keep

    def recover(self) -> None:
        """Clear what a killed writer left. The process that will save calls it once, before `latest`. Raises StorageError."""
        sweep(self.folder)

    def save(self, step: int, write: Callable[[Path], None], fields: Mapping[str, Any]) -> Path:
        """Let `write` fill a folder, make it durable as `step-NNNNNN`, then delete what is no longer kept; return its path.

        `fields` (JSON values) come back from `latest`. Older checkpoints are touched only once the new one is durable. Those of
        later steps are deleted too: the run went back behind them (they were damaged), so they belong to no run any more.
        Raises StorageError; the older checkpoints are then intact, and no part of the new one stays."""
        path = self.folder / f"step-{step:06d}"
        with atomic_folder(path) as partial:
            write(partial)
            write_manifest(partial, {"step": step, "fields": dict(fields)})
        steps = self._paths()
        kept = sorted(number for number in steps if number <= step)[-self.keep :]
        for number, old in steps.items():
            if number not in kept:
                discard(old)
        return path

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint that is whole, or None where none was ever saved. Changes nothing on disk.
        Raises IntegrityError when there are checkpoints and none is whole: to start over is the user's decision."""
        warnings: list[str] = []
        for step, path in sorted(self._paths().items(), reverse=True):
            try:
                manifest = check_manifest(path)
                if manifest.get("step") != step:
                    raise IntegrityError(f"{path} holds step {manifest.get('step')}: it was renamed", hint="give it back its name")
            except (IntegrityError, OSError) as error:  # OSError: a sector that cannot be read
                reason = error.message if isinstance(error, IntegrityError) else str(error)
                warnings.append(f"checkpoint {path.name} is damaged and was passed over: {reason}")
                continue
            return Checkpoint(step, path, manifest["fields"], tuple(warnings))
        if warnings:
            raise IntegrityError("\n".join(warnings), hint=f"no checkpoint is whole; remove {self.folder} to start over")
        return None

    def _paths(self) -> dict[int, Path]:
        with storage_errors(self.folder):
            entries = list(self.folder.iterdir()) if self.folder.is_dir() else []
        found = [(_NAME.fullmatch(entry.name), entry) for entry in entries]
        return {int(match[1]): entry for match, entry in found if match and entry.is_dir()}


class Cadence:
    """When to save: every so many steps, at an epoch's end, after so many seconds; whichever comes first.
    `clock` gives seconds and never goes back (time.monotonic)."""

    def __init__(self, every_steps: int | None, every_epoch: bool, every_seconds: float | None, clock: Callable[[], float]) -> None:
        self._every_steps = every_steps
        self._every_epoch = every_epoch
        self._every_seconds = every_seconds
        self._clock = clock
        self._since = clock()

    def due(self, step: int, epoch_ended: bool) -> bool:
        """Return whether to save now, after `step` (counted from 1). The seconds count from the last save."""
        return (
            (self._every_steps is not None and step % self._every_steps == 0)
            or (self._every_epoch and epoch_ended)
            or (self._every_seconds is not None and self._clock() - self._since >= self._every_seconds)
        )

    def saved(self) -> None:
        """Begin to count the seconds anew. Called after a save has ended, so that a slow disk is not saved to at every step."""
        self._since = self._clock()
