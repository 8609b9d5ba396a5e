"""`kivnun plan`: what a run will take and whether it fits, without a base's weights and without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kivnun.cli.completion import device_names, option_paths, spec_files

if TYPE_CHECKING:
    from rich.console import Console

    from kivnun.plan.cost import Cost
    from kivnun.plan.devices import Device
    from kivnun.plan.verdict import Plan, Question
    from kivnun.spec import TuneSpec

FILE = click.Path(path_type=Path, dir_okay=False)
BAR = 24  # characters of all that a process takes
VERDICTS = {"fits": "It fits", "does_not_fit": "It does not fit", "unknown": "Nobody knows whether it fits"}


@click.command()
@click.argument("spec", type=FILE, shell_complete=spec_files)
@click.option(
    "--set", "overrides", multiple=True, metavar="PATH=VALUE", shell_complete=option_paths,
    help="Override one value of the spec, e.g. --set adapter.rank=32.",
)  # fmt: skip
@click.option(
    "--device", metavar="DEVICE", shell_complete=device_names,
    help="cpu or cuda (this machine's), or a GPU by name: h100, a100-40gb, l4, rtx-4090, ...  [default: what a run takes here]",
)  # fmt: skip
@click.option(
    "--devices", type=click.IntRange(min=1, max=4096), metavar="N", help="How many of them.  [default: as the spec needs]"
)
@click.option("--memory", type=click.FloatRange(min=0, min_open=True), metavar="GIB", help="What a run may take of each device.")
@click.option("--prices", type=FILE, metavar="FILE", help="Your prices (YAML or JSON), to be told what the run costs.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object on the last line of stdout.")
def plan(
    spec: Path,
    overrides: tuple[str, ...],
    device: str | None,
    devices: int | None,
    memory: float | None,
    prices: Path | None,
    as_json: bool,
) -> int:
    """Say what SPEC will take: steps, memory by part, time, cost, and whether it fits.

    Reads the rows and the base's configuration, nothing else. Where it does not fit, changes of the spec are named with which it
    would, and the exit status is 10.
    """
    from kivnun.cli.screen import print_json, stdout
    from kivnun.plan.cost import cost_of, read_prices
    from kivnun.plan.plan import make_plan, question_of
    from kivnun.spec import load_spec

    checked = load_spec(spec, overrides)
    listed = None if prices is None else read_prices(prices)
    name, where = _device(checked, device, devices, memory)
    question = _timed(question_of(checked, where))
    made = make_plan(question)
    cost = None
    if listed is not None:
        seconds = float("nan") if made.forecast is None else made.forecast.seconds
        cost = cost_of(listed, name, where.count, seconds, made.steps.trained_tokens)
    refusal = made.refusal()
    if as_json:
        print_json(_as_json(question, made, cost))
    else:
        _show(stdout(), spec, question, made, cost)
    return 0 if refusal is None else refusal.exit_status


def _device(spec: TuneSpec, name: str | None, count: int | None, memory: float | None) -> tuple[str, Device]:
    """Return a device's name as prices have it, and the device. Without a name it is what a run of the spec would take here."""
    from kivnun.plan.devices import find_device, has_gpu, this_machine
    from kivnun.spec import MultiProcessSpec

    if name is None:
        wanted = spec.compute.device
        name = wanted if wanted != "auto" else "cuda" if has_gpu() else "cpu"
    if count is None:
        count = spec.compute.processes if isinstance(spec.compute, MultiProcessSpec) and name != "cpu" else 1
    if name == "cpu" and memory is None:
        return name, this_machine(count)
    return name, find_device(name, memory, count)


def _timed(question: Question) -> Question:
    """Return a question with this machine's speed, where it is asked of and its seconds can be foretold."""
    from dataclasses import replace

    from kivnun.plan.time import machine_speed
    from kivnun.spec import MultiProcessSpec, resolve

    if question.device.kind != "cpu" or question.sizes is None:
        return question
    spec, _ = resolve(question.spec, question.facts)
    speed = machine_speed("fp32" if spec.base.precision == "fp32" else "bf16")
    if isinstance(spec.compute, MultiProcessSpec):  # which share the machine's cores
        speed /= -(-spec.compute.processes // question.device.count)
    return replace(question, here=replace(question.here, speed=speed))


def _show(console: Console, spec: Path, question: Question, made: Plan, cost: Cost | None) -> None:
    """Write the verdict, then what it rests on, for people."""
    from kivnun.plan.advise import words_of_bytes, words_of_seconds

    device, resolved = question.device, made.spec
    many = f" x {device.count}" if device.count > 1 else ""
    where = f"{device.name}{many}, {words_of_bytes(made.limit)} for each process"
    colour = {"fits": "bold green", "does_not_fit": "bold red", "unknown": "bold yellow"}[made.verdict]
    console.print(f"{VERDICTS[made.verdict]}: {spec.name} on {where}", style=colour)
    if made.forecast is None:
        console.print(f"  {made.unknown}")
    else:
        _show_memory(console, made)
    _show_facts(console, question, made, cost)
    for caution in made.cautions:
        console.print(f"note: {caution}", style="yellow")
    for path in ("micro_batch_tokens", "activation_checkpointing"):
        reason = made.reasons.get(f"compute.{path}")
        if reason is not None:
            console.print(f"compute.{path}: {str(getattr(resolved.compute, path)).lower()} ({reason})")
    if made.verdict == "does_not_fit":
        console.print(
            "\nIt would fit with" if made.changes else "\nNo change of the spec makes it fit: take more memory, or a smaller base"
        )
        for change in made.changes:
            sets = " ".join(f"--set '{override}'" if " " in override else f"--set {override}" for override in change.overrides)
            taken = f"{words_of_bytes(change.peak)}, {words_of_seconds(change.seconds)}"
            console.print(f"  {change.what}: {taken}\n    {sets}")


def _show_memory(console: Console, made: Plan) -> None:
    from kivnun.plan.advise import words_of_bytes

    assert made.forecast is not None
    parts, peak = made.forecast.parts, made.forecast.peak
    width = max(len(words_of_bytes(size)) for size in (peak, *parts.values()))
    for name, size in parts.items():
        full = round(BAR * size / peak)
        console.print(f"  {name:<12} {words_of_bytes(size):>{width}}  {'█' * full}{'░' * (BAR - full)}")
    share = f"{100 * peak / made.limit:.3g} % of {words_of_bytes(made.limit)}"
    console.print(f"  {'together':<12} {words_of_bytes(peak):>{width}}  {share}", style="bold")


def _show_facts(console: Console, question: Question, made: Plan, cost: Cost | None) -> None:
    from kivnun.plan.advise import words_of_seconds

    rows, steps = question.rows, made.steps
    how = "" if rows.counted else ", estimated"
    facts = [
        (
            "rows",
            f"{len(rows.lengths):,} to train on, {len(rows.held_out):,} held out, {rows.longest:,} tokens in the longest{how}",
        ),
        ("tokens", f"{steps.tokens:,} in all epochs{_trained(steps.tokens, steps.trained_tokens)}"),
        ("steps", f"{steps.count:,}, in passes of {steps.largest_pass:,} tokens at most"),
    ]
    if made.forecast is not None:
        stages = ", ".join(f"{name} {words_of_seconds(seconds)}" for name, seconds in made.forecast.stages.items() if seconds)
        facts.append(("time", f"{words_of_seconds(made.forecast.seconds)} ({stages})"))
    if cost is not None:
        parts = (("hours", cost.by_hours), ("trained tokens", cost.by_tokens))
        known = [f"{value:,.4g} {cost.currency} by {what}" for what, value in parts if value is not None]
        facts.append(("cost", ", ".join(known) or "not known, since the time is not"))
    for name, fact in facts:
        console.print(f"  {name:<12} {fact}")


def _trained(tokens: int, trained: int | None) -> str:
    return "" if trained is None else f", {trained:,} of them trained ({100 * trained / tokens:.0f} %)"


def _as_json(question: Question, made: Plan, cost: Cost | None) -> dict[str, Any]:
    """Return the plan as programs read it; where it does not fit, with the keys that every failure has."""
    from dataclasses import asdict

    refusal, rows = made.refusal(), question.rows
    failure: dict[str, Any] = {"status": made.verdict}
    if refusal is not None:
        error = {"code": refusal.code, "message": refusal.message, "hint": refusal.hint}
        failure = {"status": "failed", "exit_status": refusal.exit_status, "error": error}
    seconds = None if made.forecast is None else {name: _known(value) for name, value in made.forecast.stages.items()}
    return {
        **failure,
        "verdict": made.verdict,
        "plan": made.result(),
        "unknown": made.unknown or None,
        "seconds_by_stage": seconds,
        "limit_bytes": round(made.limit),
        "device": asdict(question.device),
        "rows": {
            "format": rows.format,
            "train": len(rows.lengths),
            "held_out": len(rows.held_out),
            "longest": rows.longest,
            "skipped": rows.skipped,
            "truncated": rows.truncated,
            "counted": rows.counted,
        },
        "steps": asdict(made.steps),
        "cost": None if cost is None else asdict(cost),
        "notes": list(made.cautions),
        "changes": [
            {"what": it.what, "set": list(it.overrides), "peak_bytes": round(it.peak), "seconds": _known(it.seconds)}
            for it in made.changes
        ],
        "spec": made.spec.to_tree(),
    }


def _known(seconds: float) -> float | None:
    return None if seconds != seconds else round(seconds, 3)
