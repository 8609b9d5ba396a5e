"""Where a model comes from: the run or adapter that training went on with, or the run whose result is the base.

A result is named by its content hash, which a run's manifest gives without reading a weight. Nothing here needs a model stack.
Next: `run_view.py` (who shows it), `train/continued.py` (who trains on).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kivnun.artifacts import hash_folder, listed_hash, read_manifest
from kivnun.errors import IntegrityError, RunFolderError
from kivnun.run_folder import RunFolder
from kivnun.spec.adapters import AdapterSpec, LowRank

MERGE_RECORD = "kivnun_merge.json"
CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Start:
    """An adapter to go on with. `run` is the name of the run it is of and `base_hash` its base, where these are known."""

    folder: Path
    run: str | None
    content_hash: str
    base_hash: str | None


def result_hash(manifest: dict[str, Any]) -> str | None:
    """Return the content hash of a run's adapter or model, from its manifest alone."""
    return listed_hash(manifest, "adapter") or listed_hash(manifest, "model")


def model_hash(manifest: dict[str, Any]) -> str | None:
    """Return the hash of a run's model as a base (`model/families.py`), which the card beside it is no part of; None: no model."""
    return listed_hash(manifest, "model", without=CARD)


def find_start(place: Path) -> Start:
    """Return the adapter in a run's folder, its adapter folder, or any PEFT folder.

    Raises RunFolderError where there is none, IntegrityError where a run's adapter is not what its manifest says.
    """
    if _is_adapter_of_run(place):
        place = place.resolve().parent
    if (place / "adapter_config.json").is_file():
        return Start(place, None, hash_folder(place), _base_on_card(place))
    folder = RunFolder(place)
    if folder.resolved.is_file() and folder.model.is_dir():
        raise RunFolderError(
            f"{place} trained the whole model, so there is no adapter to start from", hint=f"go on with base: {folder.model}"
        )
    if not folder.resolved.is_file():
        raise RunFolderError(
            f"{place} holds no adapter to start from", hint="give a finished run, its adapter folder, or any PEFT folder"
        )
    if not folder.is_finished:
        raise RunFolderError(f"{place} is not finished", hint="finish it with `kivnun tune SPEC --resume`")
    return _of_run(place)


def start_of(adapter: AdapterSpec) -> Start | None:
    """Return what a spec starts from, None where it starts anew."""
    return find_start(adapter.start_from) if isinstance(adapter, LowRank) and adapter.start_from is not None else None


def lineage_of(adapter: AdapterSpec, base_folder: Path, base_hash: str) -> dict[str, Any] | None:
    """Return what a run's manifest says of its parent: how it is used, its run's name where known, its content hash."""
    start = start_of(adapter)
    if start is not None:
        return {"how": "adapter", "run": start.run, "content_hash": start.content_hash}
    record = base_folder / MERGE_RECORD
    if record.is_file():
        merged = json.loads(record.read_text(encoding="utf-8"))
        return {"how": "merged", "run": None, "content_hash": merged["adapter_hash"]}
    if base_folder.name == "model" and (base_folder.parent / "resolved.yaml").is_file():
        return {"how": "model", "run": base_folder.resolve().parent.name, "content_hash": base_hash}
    return None


def _is_adapter_of_run(place: Path) -> bool:
    return place.resolve().name == "adapter" and RunFolder(place.resolve().parent).resolved.is_file()


def _of_run(place: Path) -> Start:
    manifest = read_manifest(place)
    folder, said = place / "adapter", listed_hash(manifest, "adapter")
    found = hash_folder(folder)
    if said != found:
        raise IntegrityError(f"{folder} was changed: its run's manifest says {said}, it has {found}", hint="restore it from a copy")
    return Start(folder, place.resolve().name, found, manifest["base"]["content_hash"])


def _base_on_card(folder: Path) -> str | None:
    """Return the base's hash that an exported adapter's card tells; None where there is no such card."""
    try:
        head = (folder / CARD).read_text(encoding="utf-8").split("---\n")[1]
        said = yaml.safe_load(head)["kivnun"]["base_hash"]
    except (OSError, ValueError, IndexError, KeyError, TypeError, yaml.YAMLError):
        return None
    return said if isinstance(said, str) else None
