"""`kivnun advise`: which technique to begin with, and a spec that says so. Loads no torch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from kivnun.cli.completion import base_names, device_names, scenario_names
from kivnun.errors import RunFolderError

if TYPE_CHECKING:
    from kivnun.data.scenarios import Scenario
    from kivnun.plan.advise import Advice, Candidate, Question

FILE = click.Path(path_type=Path, dir_okay=False)
ROWS = click.Path(path_type=Path)  # a file, a data set's folder, or hf://ORG/NAME
HELD_OUT = 0.1  # of a user's rows, where no file of held-out ones is given


@click.command()
@click.option(
    "--scenario",
    "scenario_name",
    required=True,
    metavar="NAME",
    shell_complete=scenario_names,
    help="The task that yours is most like: kivnun scenario list.",
)
@click.option(
    "--base", required=True, metavar="BASE", shell_complete=base_names, help="A folder, a model hub's id, or kivnun/tiny-phi."
)
@click.option(
    "--device", default="cpu", show_default=True, metavar="DEVICE", shell_complete=device_names,
    help="cpu or cuda (this machine's), or a GPU by name: h100, a100-40gb, l4, rtx-4090, ...",
)  # fmt: skip
@click.option("--devices", type=click.IntRange(min=1, max=4096), default=1, show_default=True, help="How many of them.")
@click.option("--memory", type=click.FloatRange(min=0, min_open=True), metavar="GIB", help="What a run may take of each device.")
@click.option("--train", type=ROWS, metavar="FILE", help="Your rows, in any kind of data file.  [default: the scenario's]")
@click.option("--validation", type=ROWS, metavar="FILE", help="Your held-out rows.  [default: a tenth of --train]")
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the rows.  [default: the scenario's; 3 for your rows]")
@click.option("--matrix", type=FILE, metavar="FILE", help="A matrix.json of yours.  [default: the one that comes along]")
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Write spec.yaml there, and the scenario's rows unless --train is given.  [default: the spec on stdout]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print {spec, chosen, others, reasons, candidates} as one JSON object.")
def advise(
    scenario_name: str,
    base: str,
    device: str,
    devices: int,
    memory: float | None,
    train: Path | None,
    validation: Path | None,
    epochs: int | None,
    matrix: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Choose a technique for a task, a base and a device, out of what was measured.

    Prints a spec that is ready to run, the reasons, and three other techniques with the memory and the time that each would take.
    Nothing is downloaded but the base's configuration.
    """
    from kivnun.cli.screen import print_json
    from kivnun.data.scenarios import find_scenario
    from kivnun.plan.advise import Question, advise, spec_tree
    from kivnun.plan.bases import known_base
    from kivnun.plan.devices import find_device
    from kivnun.plan.measured import read_table
    from kivnun.plan.rows import training_rows
    from kivnun.plan.time import machine_speed
    from kivnun.spec.resolve import SMALL_BASE
    from kivnun.spec.yaml_text import write_yaml

    scenario, table = find_scenario(scenario_name), read_table(matrix)
    found, where = find_device(device, memory, devices), known_base(base)
    usual = _scenario_tree(scenario)
    data: dict[str, Any] = {"train": "train.jsonl", "validation": "validation.jsonl"}
    if output is not None:
        _claim(output)
    with tempfile.TemporaryDirectory() as temporary:
        folder = output or Path(temporary)
        if train is None:
            scenario.write(folder)
            rows = training_rows(folder / "train.jsonl", where)
        else:
            rows = training_rows(train, where)
            data = {"train": _place(train), "validation": HELD_OUT if validation is None else _place(validation)}
    question = Question(
        _task(table, scenario.name),
        table,
        where,
        found,
        rows,
        epochs or (usual["schedule"]["epochs"] if train is None else 3),
        usual["schedule"]["batch_rows"],
        machine_speed("bf16" if where.sizes.numbers >= SMALL_BASE else "fp32") if found.kind == "cpu" else 1.0,
    )
    advice = advise(question)
    tree = spec_tree(question, advice.chosen, data, usual["evaluation"])
    head = "".join(f"# {line}\n" for line in (f"{scenario.title}: {advice.chosen.label}", *advice.reasons))
    text = head + write_yaml(tree)
    if output is not None:
        from kivnun.artifacts import atomic_write

        output.mkdir(parents=True, exist_ok=True)
        atomic_write(output / "spec.yaml", text)
    if as_json:
        print_json({"spec": tree, **_as_json(advice)})
        return
    _show(question, advice, text, output)


def _place(rows: Path) -> str:
    """Return what a spec in any folder names these rows by."""
    from kivnun.data.opening import name_of, on_hub

    return name_of(rows) if on_hub(rows) else str(rows.resolve())


def _claim(output: Path) -> None:
    """Refuse a folder that holds something: a spec that somebody wrote is not written over."""
    if output.is_dir() and any(output.iterdir()):
        raise RunFolderError(f"{output} holds files already", hint="choose another --output")


def _scenario_tree(scenario: Scenario) -> dict[str, Any]:
    """Return the scenario's own spec, whose steps and metrics the advice keeps."""
    from kivnun.spec import read_spec_text
    from kivnun.spec.yaml_text import read_yaml

    return cast("dict[str, Any]", read_yaml(read_spec_text(scenario.folder / "spec.yaml")).value)


def _task(table: Any, name: str) -> Any:
    from kivnun.errors import SpecError

    if name not in table.tasks:
        raise SpecError(
            f"the table of {table.date} ({table.command}) has no scores on {name}",
            hint=f"it has {', '.join(table.tasks)}; a full kivnun matrix scores all",
        )
    return table.tasks[name]


def _show(question: Question, advice: Advice, text: str, output: Path | None) -> None:
    """Print the reasons and the table for people, and the spec where it goes to no file."""
    from kivnun.cli.screen import stderr, stdout, table
    from kivnun.plan.advise import words_of_bytes

    console = stderr()
    limit = words_of_bytes(question.device.memory_bytes)
    console.print(f"{question.task.title}, {question.base.name}, {question.device.name}, up to {limit}\n", style="bold")
    console.print(f"{advice.chosen.label}, because", style="bold green")
    for reason in advice.reasons:
        console.print(f"  {reason}")
    console.print()
    heads = ("technique", "what speaks for it", question.task.metric, "to full tuning", "memory", "time", "trained", "file", "step")
    lines = [_line("chosen", advice.chosen), *(_line(why, candidate) for why, candidate in advice.others)]
    table(heads, lines, console)
    if output is None:
        console.print()
        stdout().print(text, end="", soft_wrap=True)
    else:
        console.print(f"\nwritten: {output / 'spec.yaml'}\n  kivnun tune {output / 'spec.yaml'}")


def _line(why: str, candidate: Candidate) -> tuple[str, ...]:
    from kivnun.plan.advise import words_of_bytes, words_of_seconds

    score = candidate.score
    return (
        candidate.label,
        why,
        f"{score.score:.3g}",
        f"{score.to_full:+.3g} ({score.to_full_interval[0]:.2g} to {score.to_full_interval[1]:.2g})",
        words_of_bytes(candidate.memory.peak),
        words_of_seconds(candidate.seconds),
        f"{candidate.trained:,}",
        words_of_bytes(candidate.file_bytes),
        candidate.how,
    )


def _as_json(advice: Advice) -> dict[str, Any]:
    return {
        "chosen": _candidate_json(advice.chosen),
        "others": [{"why": why, **_candidate_json(candidate)} for why, candidate in advice.others],
        "reasons": list(advice.reasons),
        "candidates": [_candidate_json(candidate) for candidate in advice.candidates],
    }


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "technique": candidate.technique,
        "fits": candidate.fits,
        "peak_bytes": round(candidate.memory.peak),
        "bytes_by_part": {name: round(value) for name, value in asdict(candidate.memory).items()},
        "seconds": None if candidate.seconds != candidate.seconds else candidate.seconds,
        "trained": candidate.trained,
        "file_bytes": candidate.file_bytes,
        "shape": asdict(candidate.shape),
        "score": asdict(candidate.score),
    }
