"""A base's download as people see it, before a command's own screen opens: two things that draw on one line would tear each other.

Next: `screen.py` (what is shown afterwards), `kivnun/model/hub.py` (who fetches).
"""

from __future__ import annotations

from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from kivnun.cli.screen import stderr


def fetch_base(model: str, revision: str | None) -> Path:
    """Return the base's folder, fetched if need be: with a bar on a terminal, else with a line that says what is fetched."""
    from kivnun.model.families import find_base

    console = stderr()
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=28), TextColumn("{task.percentage:.0f}%"), DownloadColumn(),
        TransferSpeedColumn(), TimeRemainingColumn(compact=True),
    )  # fmt: skip
    progress = Progress(*columns, console=console)
    task = progress.add_task(f"fetching {model}", total=None)
    said = False

    def on_bytes(name: str, done: int, total: int) -> None:
        nonlocal said
        if not said and console.is_terminal:
            progress.start()
        elif not said:
            console.print(f"fetching {name}: {total / 1e6:,.1f} MB of weights")
        said = True
        progress.update(task, completed=done, total=total)

    try:
        return find_base(model, revision, on_bytes)
    finally:
        progress.stop()
