"""`kivnun showcase`: before and after fine-tuning on a set that every machine can make, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kivnun.errors import InterruptedRun


@click.command(short_help="Measure before and after fine-tuning, with controls, as one page.")
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("showcase"), show_default=True, metavar="DIR",
    help="The folder to make.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="Few questions and one seed: under three minutes of one core instead of twenty.")
@click.option("--resume", is_flag=True, help="Go on with DIR: finished runs are not trained again.")
@click.option("--json", "as_json", is_flag=True, help="Print {figures, page, record, seconds} as one JSON object.")
def showcase(output: Path, quick: bool, resume: bool, as_json: bool) -> None:
    """Tune the built-in base on multiple-choice questions, and measure it on questions of other topics.

    Beside it stand two controls: the same with answers shuffled, which must not help, and a run trained on the test itself, which
    explains figures such as 99. DIR gets showcase.html, showcase.json (what every model gave to every answer) and every run's
    folder. Ctrl-C saves; --resume goes on.
    """
    from kivnun.cli.process import keep_freed_memory, set_threads
    from kivnun.cli.screen import open_screen, print_json, stderr, working

    keep_freed_memory()
    set_threads(1)
    from kivnun.showcase.run import FULL, QUICK, Shows, run_showcase

    console = stderr()
    shows = Shows(lambda line: console.print(line, style="bold"), open_screen, working)
    again = f"go on with: kivnun showcase --output {output}{' --quick' if quick else ''} --resume"
    try:
        record = run_showcase(output, QUICK if quick else FULL, shows, resume=resume)
    except InterruptedRun as stopped:
        raise InterruptedRun(stopped.message, hint=again) from None
    except KeyboardInterrupt:
        raise InterruptedRun("stopped at once", hint=again) from None
    page, kept = output / "showcase.html", output / "showcase.json"
    if as_json:
        print_json({"figures": record["figures"], "page": str(page), "record": str(kept), "seconds": record["seconds"]})
        return
    _show(record)
    console.print(f"\npage: {page}  (every number: {kept})", style="bold")


def _show(record: dict[str, Any]) -> None:
    from kivnun.cli.screen import table

    names = {"robust": "robust accuracy", "mc1": "MC1", "mc2": "MC2"}
    rows = [
        (label, *(_cell(record["figures"][arm][name]) for arm in ("base", "tuned", "shuffled", "contaminated")))
        for name, label in names.items()
    ]
    table(("", "base", "tuned", "answers shuffled", "trained on the test"), rows)


def _cell(figure: dict[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{100 * figure['value']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
