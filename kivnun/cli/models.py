"""`kivnun models`: the runs of a folder side by side, with their scores and where they came from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kivnun.run_view import RunView

DEFAULT = Path("runs")
SHORT = 12  # of a hash: enough to tell results apart


@click.command(short_help="List runs with scores, versions and lineage.")
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path, file_okay=False), metavar="[DIR]...")
@click.option("--json", "as_json", is_flag=True, help="Print {models: [...]} as one JSON object.")
def models(folders: tuple[Path, ...], as_json: bool) -> None:
    """List the runs in each DIR, a folder of runs, oldest first; without one those in ./runs.

    A version is the content hash of a run's adapter or model. A folder that is damaged, or is no run, is listed as such. Reads
    files only: nothing is loaded.
    """
    from kivnun.cli.screen import print_json, stderr, table
    from kivnun.run_view import view_runs

    given = list(folders) or ([DEFAULT] if DEFAULT.is_dir() else [])
    views = view_runs(given)
    if as_json:
        print_json({"models": [view.as_json() for view in views]})
    elif views:
        heads = ("name", "version", "when", "status", "base", "technique", "from", "nll", "task", "size")
        table(heads, [_cells(view) for view in views])
    else:
        stderr().print("no runs here; kivnun tune SPEC makes one in ./runs")
    for view in views:
        if view.problem is not None and not as_json:
            stderr().print(f"{view.path}: {view.status}: {view.problem}")


def _cells(view: RunView) -> tuple[str, ...]:
    when = (view.when or "")[:16].replace("T", " ")
    version = (view.version or "")[:SHORT]
    base = Path(view.base).name if view.base and Path(view.base).is_absolute() else view.base or ""
    metrics = dict(view.metrics or {})
    nll = metrics.pop("nll", None)
    task = next(iter(metrics), None)
    return (
        view.name, version, when, view.status, base, view.technique or "", _parent(view),
        _change("nll", nll), f"{task} {_change(task, metrics[task])}" if task else "", f"{view.size_bytes / 2**20:,.1f} MiB",
    )  # fmt: skip


def _parent(view: RunView) -> str:
    if view.lineage is None:
        return ""
    whose = view.lineage["run"] or str(view.lineage["content_hash"])[:SHORT]
    return whose if view.lineage["how"] == "adapter" else f"{whose} ({view.lineage['how']})"


def _change(name: str, scores: dict[str, object] | None) -> str:
    from kivnun.cli.screen import figure

    if scores is None:
        return ""
    base, tuned = scores["base"], scores["tuned"]
    before = f"{figure(name, base)} → " if isinstance(base, int | float) else ""
    return before + (figure(name, tuned) if isinstance(tuned, int | float) else "")
