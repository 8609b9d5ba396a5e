"""The end of a run as people read it: base against tuned with intervals, samples before and after, and what to do next.

Reads the object that the pipeline returns (`run`, `status`, `base`, `tuned`, ...) and the run's `evaluated` events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console

from kivnun.cli.screen import figure, table
from kivnun.evaluate.metrics import DIFFERENCE
from kivnun.events import Evaluated, read_events

Scores: TypeAlias = Mapping[str, Any]
"""`base` or `tuned` of the result: rows, nll and each metric by its name, intervals (name -> [low, high]), verdicts."""

# Keys of `base` and `tuned` that are not a metric.
NOT_METRICS = ("forgetting", "intervals", "rows", "verdicts")


def show_comparison(console: Console, base: Scores, tuned: Scores) -> None:
    """Write one line per metric: base, tuned and their difference, each with its 95 % interval, and what that says in words."""
    names = [name for name in tuned if name not in NOT_METRICS]
    verdicts = tuned.get("verdicts", {})
    rows = [
        (name, _value(name, base), _value(name, tuned), _difference(name, base, tuned), verdicts.get(name, "")) for name in names
    ]
    brackets = ", 95 % intervals in brackets" if tuned["intervals"] else ", too few for intervals"
    console.print(f"\n{tuned['rows']:,} held-out rows{brackets}", style="bold")
    table(("", "base", "tuned", "difference", ""), rows, console)
    if "forgetting" in tuned:
        console.print(_forgetting(base.get("forgetting"), tuned["forgetting"]))


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


def _value(name: str, scores: Scores) -> str:
    return f"{figure(name, scores[name])}{_interval(name, name, scores)}" if name in scores else "-"


def _difference(name: str, base: Scores, tuned: Scores) -> str:
    if name not in base:
        return ""
    value = tuned[name] - base[name]
    sign = "+" if value >= 0 else ""
    return f"{sign}{figure(name, value)}{_interval(name, name + DIFFERENCE, tuned)}"


def _interval(name: str, key: str, scores: Scores) -> str:
    if key not in scores["intervals"]:
        return ""
    low, high = scores["intervals"][key]
    return f" [{figure(name, low)}, {figure(name, high)}]"


def _forgetting(base: Mapping[str, Any] | None, tuned: Mapping[str, Any]) -> str:
    """Return the line on unrelated text: its loss before and after, and what the paired difference says."""
    about = f"unrelated text ({tuned['source']}, {tuned['rows']:,} rows): nll "
    if base is None:
        return f"{about}{tuned['nll']:.4f}; the base was not scored on it"
    interval = f" [{tuned['difference'][0]:.4f}, {tuned['difference'][1]:.4f}]" if "difference" in tuned else ""
    change = f"{base['nll']:.4f} -> {tuned['nll']:.4f}, difference {tuned['nll'] - base['nll']:+.4f}{interval}"
    return f"{about}{change}: {tuned.get('verdict', 'not compared')}"


def _one_line(text: str) -> str:
    return text.replace("\n", " ⏎ ")
