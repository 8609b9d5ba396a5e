"""The end of a run as people read it: base against tuned with intervals, samples before and after, and what to do next.

Reads the object that the pipeline returns (`run`, `status`, `base`, `tuned`, ...) and the run's `evaluated` events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from kivnun.cli.screen import figure, table
from kivnun.events import Evaluated, read_events

# Keys of `base` and `tuned` that are not a metric.
NOT_METRICS = ("intervals", "rows", "samples")


def show_comparison(console: Console, base: Mapping[str, Any], tuned: Mapping[str, Any]) -> None:
    """Write one line per metric: base, tuned and their difference, each with its 95 % interval."""
    names = [name for name in tuned if name not in NOT_METRICS and isinstance(tuned[name], (int, float))]
    differences = tuned.get("intervals", {}).get("difference", {})
    rows = [(name, _with_interval(name, base), _with_interval(name, tuned), *_difference(name, differences)) for name in names]
    console.print(f"\n{tuned.get('rows', 0):,} held-out rows, 95 % intervals in brackets", style="bold")
    table(("", "base", "tuned", "difference", ""), rows, console)


def show_samples(console: Console, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
    """Write held-out rows with both models' replies, each text on a line of its own and unchanged: a terminal that lays out
    right-to-left text would mix the columns of a table."""
    for base, tuned in pairs:
        console.print()
        console.print(f"prompt     {_one_line(tuned['prompt'])}")
        console.print(f"reference  {_one_line(tuned['reference'])}")
        console.print(f"base       {_one_line(base['reply'])}", style="red" if base["reply"] != base["reference"] else "green")
        console.print(f"tuned      {_one_line(tuned['reply'])}", style="green" if tuned["reply"] == tuned["reference"] else "red")


def sample_pairs(run: Path) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return (base's, tuned's) samples of the same prompts, from the run's record."""
    latest: dict[str, list[dict[str, Any]]] = {"base": [], "tuned": []}
    for event in read_events(run / "events.jsonl"):
        if isinstance(event, Evaluated) and event.samples:
            latest[event.which] = event.samples
    by_prompt = {sample["prompt"]: sample for sample in latest["base"]}
    return [(by_prompt[sample["prompt"]], sample) for sample in latest["tuned"] if sample["prompt"] in by_prompt]


def show_next(console: Console, run: Path) -> None:
    """Write where the result is and the commands that use it."""
    made = "adapter" if (run / "adapter").is_dir() else "model"
    console.print(f"\nresult: {run / made}  (report: {run / 'report.html'})", style="bold")
    console.print(f"  kivnun chat {run}")
    console.print(f"  kivnun export {run} --to merged --output {run}-merged")
    console.print(f"  kivnun verify {run}")


def _with_interval(name: str, scores: Mapping[str, Any]) -> str:
    if name not in scores:
        return "-"
    interval = scores.get("intervals", {}).get(name)
    text = figure(name, scores[name])
    return text if interval is None else f"{text} [{figure(name, interval['low'])}, {figure(name, interval['high'])}]"


def _difference(name: str, differences: Mapping[str, Any]) -> tuple[str, str]:
    if name not in differences:
        return "", ""
    found = differences[name]
    sign = "+" if found["value"] >= 0 else ""
    return f"{sign}{figure(name, found['value'])} [{figure(name, found['low'])}, {figure(name, found['high'])}]", str(
        found["verdict"]
    )


def _one_line(text: str) -> str:
    return text.replace("\n", " ⏎ ")
