"""Run folders seen side by side: what each is, what it came from and what it scored, read from files alone.

A folder that is damaged, or is no run, is shown as such: one bad folder must not hide the others. Nothing is loaded and no weight
is read; a result's version is its content hash, which the manifest gives. Next: `lineage.py`, `run_folder.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from kivnun.artifacts import read_manifest
from kivnun.errors import KivnunError, RunFolderError
from kivnun.events import Event, RunFailed, RunInterrupted, from_json
from kivnun.lineage import model_hash, result_hash
from kivnun.run_folder import RunFolder
from kivnun.spec import TuneSpec
from kivnun.spec.adapters import LowRank
from kivnun.spec.base import QUANTISED

# Of the record's end: room for the last few events, one with samples among them.
TAIL_BYTES = 1 << 18
NOT_METRICS = ("intervals", "rows", "verdicts")


@dataclass(frozen=True, slots=True)
class RunView:
    """One folder. `status` is succeeded, failed, interrupted, not finished, damaged or no run; `problem` says why, in words.

    `version` is the content hash of the result, `when` the end of the run or of what it did so far (UTC), `lineage` {how, run,
    content_hash} of what it was continued from, `metrics` name -> {base, tuned, verdict}, `size_bytes` all files of the folder.
    """

    path: str
    name: str
    status: str
    problem: str | None = None
    version: str | None = None
    when: str | None = None
    base: str | None = None
    technique: str | None = None
    lineage: dict[str, Any] | None = None
    metrics: dict[str, dict[str, Any]] | None = None
    size_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def view_runs(places: Sequence[Path]) -> list[RunView]:
    """Return the runs in folders of runs, or run folders themselves, oldest first. Raises RunFolderError for a missing folder."""
    folders: dict[Path, None] = {}
    for place in places:
        if not place.is_dir():
            raise RunFolderError(f"{place} is not a folder", hint="give a folder of runs, such as runs")
        inside = [entry for entry in sorted(place.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
        folders |= dict.fromkeys([place] if _looks_like_run(place) else inside)
    views = [view_run(folder) for folder in folders]
    results = {known: view for view in views if view.version is not None for known in (view.version, _hash_as_base(view)) if known}
    return sorted((_with_parent(view, results) for view in views), key=lambda view: (view.when or "", view.path))


def _hash_as_base(view: RunView) -> str | None:
    """Return the hash by which another run knows this one's model as its base; None where it made no model."""
    return model_hash(read_manifest(Path(view.path)))


def view_run(folder: Path) -> RunView:
    """Return what a folder is; never raises for what is in it."""
    known = RunView(str(folder), folder.resolve().name, "no run", size_bytes=_size(folder))
    if not _looks_like_run(folder):
        return replace(known, problem="it holds no resolved.yaml and no events.jsonl")
    try:
        return _filled(known, RunFolder(folder))
    except (KivnunError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        told = error.message if isinstance(error, KivnunError) else f"{type(error).__name__}: {error}"
        return replace(known, status="damaged", problem=told.split("\n")[0])


def _looks_like_run(folder: Path) -> bool:
    return (folder / "resolved.yaml").is_file() or (folder / "events.jsonl").is_file()


def _filled(view: RunView, folder: RunFolder) -> RunView:
    last, when = _last_of(folder)
    view = replace(view, status=_status(last), when=when, problem=last.message if isinstance(last, RunFailed) else None)
    if not folder.resolved.is_file():  # refused for its data or its base: nothing was decided
        return view
    spec = folder.read_spec()
    view = replace(view, base=_base_of(spec), technique=_technique(spec), lineage=_planned(spec))
    if not (folder.path / "manifest.json").is_file():
        return view
    manifest = read_manifest(folder.path)
    if "result.json" not in manifest["files"]:
        return view
    view = replace(
        view,
        status="succeeded",
        version=result_hash(manifest),
        lineage=manifest.get("lineage") or _by_base(manifest),
        metrics=_metrics(folder.read_result()),
    )
    lost = next((name for name, said in manifest["files"].items() if not _is_whole(folder.path / name, said)), None)
    if lost is not None:
        return replace(view, status="damaged", problem=f"{lost} is missing or of another size than the manifest says")
    return view


def _is_whole(path: Path, said: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == said["size"]


def _status(last: Event | None) -> str:
    names = {RunFailed: "failed", RunInterrupted: "interrupted"}
    return names.get(type(last), "not finished")


def _last_of(folder: RunFolder) -> tuple[Event | None, str | None]:
    """Return the last event of the record, read from its end, and when that was."""
    if not folder.events.is_file():
        return None, None
    with folder.events.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")
    for line in reversed(lines[:-1]):  # what follows the last line feed is torn
        try:
            event = from_json(line.decode())
        except (KivnunError, ValueError):
            break  # an event longer than the tail, or a damaged line: the file's own time is what is known
        return event, event.time
    return None, datetime.fromtimestamp(folder.events.stat().st_mtime, UTC).isoformat(timespec="seconds")


def _base_of(spec: TuneSpec) -> str:
    return spec.base.model


def _technique(spec: TuneSpec) -> str:
    """Return the technique in a few words: what is trained, at which rank, on codes or not, for what."""
    adapter = spec.adapter
    rank = getattr(adapter, "rank", None) or getattr(adapter, "num_virtual_tokens", None)
    words = [adapter.kind, *([str(rank)] if rank is not None else [])]
    if spec.base.precision in QUANTISED:
        words.append(f"on {spec.base.precision}")
    if spec.objective is not None and spec.objective.kind != "supervised":
        words.append(spec.objective.kind)
    return " ".join(words)


def _planned(spec: TuneSpec) -> dict[str, Any] | None:
    """Return what an unfinished run goes on with, of which no hash is known yet."""
    adapter = spec.adapter
    if isinstance(adapter, LowRank) and adapter.start_from is not None:
        place = adapter.start_from
        return {"how": "adapter", "run": place.parent.name if place.name == "adapter" else place.name, "content_hash": None}
    return None


def _by_base(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the base as a possible parent: that it is another run's model is found by its hash alone."""
    return {"how": "model", "run": None, "content_hash": manifest["base"]["content_hash"]}


def _with_parent(view: RunView, results: Mapping[str, RunView]) -> RunView:
    """Return the view with its parent's name and version where that is among the runs; a base that nobody made is no parent."""
    if view.lineage is None:
        return view
    parent = results.get(view.lineage["content_hash"])
    lineage = view.lineage if parent is None else {**view.lineage, "run": parent.name, "content_hash": parent.version}
    told = lineage["run"] is not None or lineage["how"] != "model"
    return replace(view, lineage=lineage if told else None)


def _metrics(result: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    base, tuned = cast("Mapping[str, Any] | None", result["base"]), cast("Mapping[str, Any] | None", result["tuned"])
    if base is None or tuned is None:
        return None
    verdicts = tuned.get("verdicts", {})
    return {
        name: {"base": base.get(name), "tuned": tuned[name], "verdict": verdicts.get(name)}
        for name in tuned
        if name not in NOT_METRICS
    }


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except OSError:  # gone since: a run is being written
            continue
    return total
