"""A run's folder: where each file is, who may write it, and whether it may be gone on with.

The layout is fixed; `docs/concepts/run-folder.md` shows it. Next: `pipeline.py` (who fills it), `artifacts.py` (how).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from kivnun.artifacts import MANIFEST, atomic_write, environment_difference, make_folder, read_manifest
from kivnun.errors import IntegrityError, RunFolderError, SpecError
from kivnun.events import Event, RunStarted
from kivnun.spec import ComputeSpec, MultiProcessSpec, PassChoice, TuneSpec, parse_spec, read_spec_text, resolved_yaml

CHANGED_SPEC = "18-resume-changed-spec"  # of docs/mistakes


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of a run."""

    path: Path

    @property
    def spec(self) -> Path:
        return self.path / "spec.yaml"

    @property
    def resolved(self) -> Path:
        return self.path / "resolved.yaml"

    @property
    def start(self) -> Path:
        """What the run was begun with: the spec with its overrides, and the hashes of data and base, and the environment."""
        return self.path / "start.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The result of LoRA and DoRA: a PEFT folder."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The result of full tuning: a transformers folder."""
        return self.path / "model"

    @property
    def exposed(self) -> Path:
        """Adapters as they were at the end of each of the last epochs, where `tune` was asked for them: `step-000120/`."""
        return self.path / "exposed"

    @property
    def stopped(self) -> Path:
        """The adapter as it was where the run was stopped, where `tune` was asked for such."""
        return self.path / "stopped"

    @property
    def base_evaluation(self) -> Path:
        return self.path / "evaluation" / "base.json"

    @property
    def tuned_evaluation(self) -> Path:
        return self.path / "evaluation" / "tuned.json"

    @property
    def reference(self) -> Path:
        """The log-probabilities that DPO holds the tuned model to."""
        return self.path / "reference.npz"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's files, where they were asked for."""
        return self.path / "tensorboard"

    @property
    def has_begun(self) -> bool:
        """Return whether anything was computed here. A run refused for its data or its base leaves only what was said of it."""
        said = {self.spec.name, self.resolved.name, self.events.name, self.tensorboard.name}
        return any(entry.name not in said for entry in self.path.iterdir())

    @property
    def is_finished(self) -> bool:
        """Return whether the run came to its end: the manifest that lists the result is written last."""
        if not (self.result.is_file() and (self.path / MANIFEST).is_file()):
            return False
        try:
            return self.result.name in read_manifest(self.path)["files"]
        except IntegrityError:  # damaged since: verifying tells of it
            return True

    def threads_in_another_shape(self, compute: ComputeSpec) -> int | None:
        """Return the threads of the folder's run where that was begun with another number of processes, else None."""
        if not (self.resolved.is_file() and self.has_begun and isinstance(compute, MultiProcessSpec)):
            return None
        before = self.read_spec().compute
        return before.threads if isinstance(before, MultiProcessSpec) and before.processes != compute.processes else None

    def passes_before(self) -> PassChoice | None:
        """Return how the folder's run computes passes where it was begun: it goes on so, however much memory there is now."""
        if not (self.resolved.is_file() and self.has_begun):
            return None
        before = self.read_spec().compute
        return PassChoice(before.micro_batch_tokens, bool(before.activation_checkpointing), "as the run was begun with")

    def read_spec(self) -> TuneSpec:
        """Return the resolved spec. Raises RunFolderError when the folder is not a run."""
        if not self.resolved.is_file():
            raise RunFolderError(
                f"{self.path} is not a run folder: it has no resolved.yaml", hint="give the folder that tune wrote"
            )
        # Its paths were made absolute when it was written; those of a run that may go on elsewhere were not, and stay as they are.
        return parse_spec(read_spec_text(self.resolved), folder=None, source=self.resolved.name)

    def read_result(self) -> dict[str, Any]:
        """Return the final object of a finished run. Raises RunFolderError when there is none yet."""
        try:
            result: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{self.path} holds no finished run", hint="finish it with `kivnun tune SPEC --resume`") from error
        return result


def claim(folder: RunFolder, *, resume: bool) -> None:
    """Make the folder ready for a run. Raises RunFolderError when it holds one that was not asked to be gone on with."""
    occupied = folder.path.exists() and (not folder.path.is_dir() or any(folder.path.iterdir()))
    if occupied and not resume and not _was_refused(folder):
        raise RunFolderError(
            f"{folder.path} exists already",
            hint="choose another --output, or go on with it with --resume",
            pages=("17-run-folder-exists",),
        )
    if occupied and not folder.events.is_file():
        raise RunFolderError(f"{folder.path} is not a run folder: it has no events.jsonl", hint="choose another --output")
    make_folder(folder.path)


def _was_refused(folder: RunFolder) -> bool:
    """Return whether the folder's run came to nothing, so that the command may be given again once its cause is mended."""
    return folder.path.is_dir() and folder.events.is_file() and not folder.has_begun


def write_specs(folder: RunFolder, spec_text: str, spec: TuneSpec, reasons: Mapping[str, str]) -> list[str]:
    """Write the spec as given and as resolved; return what has changed of the run's shape since it was begun, which may.
    Raises RunFolderError when the folder's run was made by another spec."""
    reshaped: list[str] = []
    if folder.resolved.is_file() and folder.has_begun:
        before = folder.read_spec()
        reshaped, changed = _apart(differences(before.to_tree(), spec.to_tree()))
        if changed:
            raise RunFolderError(
                f"{folder.path} was made by another spec: {'; '.join(changed)}",
                hint="resume with the spec it was made by, or choose another --output",
                pages=(CHANGED_SPEC,),
            )
    atomic_write(folder.spec, spec_text)
    atomic_write(folder.resolved, resolved_yaml(spec, reasons))
    return reshaped


def _apart(differences: list[str]) -> tuple[list[str], list[str]]:
    """Return the differences that a resumed run may have, since they change no more than last bits, and the others."""
    allowed = [text for text in differences if text.startswith("compute.processes was ")]
    return allowed, [text for text in differences if text not in allowed]


def check_finished(folder: RunFolder, spec: TuneSpec) -> None:
    """Refuse a finished run as the result of another spec than the one it was begun with; one it cannot read, it lets pass.
    Raises RunFolderError, which says what differs."""
    try:
        before = TuneSpec.model_validate((_read_start(folder) or {})["spec"])
    except (KeyError, ValueError):  # written by another version: its result is what is asked for
        return
    _, changed = _apart(differences(before.to_tree(), spec.to_tree()))
    if changed:
        raise RunFolderError(
            f"{folder.path} was finished with another spec: {'; '.join(changed)}",
            hint="choose another --output for the new one",
            pages=(CHANGED_SPEC,),
        )


def check_start(folder: RunFolder, spec: TuneSpec, now: Mapping[str, Any]) -> None:
    """Write down what the run begins with, or compare with what it was begun with: `now` as in `check_same`, which needs no
    checkpoint. A score of the base, too, holds for these rows and this base alone. Raises RunFolderError, StorageError."""
    before = _read_start(folder)
    if before is None:
        atomic_write(folder.start, json.dumps({"spec": spec.to_tree(), **now}, indent=2, ensure_ascii=False) + "\n")
    else:
        check_same(folder, before, now)


def _read_start(folder: RunFolder) -> dict[str, Any] | None:
    try:
        return json.loads(folder.start.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{folder.start} cannot be read: {error}", hint="restore it, or choose another --output") from error


def check_same(folder: RunFolder, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run of other data, another base or another numeric environment.

    `before` and `now` hold `data_hash`, `base_hash`, `environment` and, where a run goes on with an adapter, `start_hash`. Raises
    RunFolderError, which says what differs.
    """
    changed = [
        f"the {what} changed since the run was begun"
        for name, what in (
            ("data_hash", "training or validation data"),
            ("base_hash", "base's weights or configuration"),
            ("start_hash", "adapter that the run starts from"),
        )
        if before.get(name) != now.get(name)
    ]
    changed += environment_difference(before["environment"], now["environment"])
    if changed:
        raise RunFolderError(
            f"{folder.path} cannot be resumed to the same bits: {'; '.join(changed)}",
            hint="restore what changed, or start over in another --output",
        )


def read_json_file(path: Path) -> dict[str, object]:
    """Return the object in a JSON file that a spec names. Raises SpecError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise SpecError(f"{path} cannot be read as JSON: {error}", hint="correct the path or the file") from error
    if not isinstance(found, dict):
        raise SpecError(f"{path} holds no JSON object, but {type(found).__name__}", hint="write fields and values in braces")
    return found  # type: ignore[return-value]


def seconds_worked(events: list[Event]) -> float:
    """Return the wall-clock seconds of all processes that worked on the run, pauses between them left out."""
    total, began, last = 0.0, None, None
    for event in events:
        now = datetime.fromisoformat(event.time)
        if isinstance(event, RunStarted):
            total += (last - began).total_seconds() if began is not None and last is not None else 0.0
            began = now
        last = now
    return total + ((last - began).total_seconds() if began is not None and last is not None else 0.0)


def differences(before: object, now: object, path: str = "") -> list[str]:
    """Return one sentence for each value that differs between two trees of plain JSON."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [text for key in keys for text in differences(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))]
    return [] if before == now else [f"{path} was {before!r}, is {now!r}"]
