"""`kivnun tune`: the main job, from a spec to a run folder."""

from __future__ import annotations

import shlex
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from kivnun.cli.completion import option_paths, spec_files
from kivnun.errors import InterruptedRun

SPEC = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("spec", type=SPEC, shell_complete=spec_files)
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), metavar="RUN",
    help="The run folder to make.  [default: runs/ and the spec's name, in the current folder]",
)  # fmt: skip
@click.option(
    "--set", "overrides", multiple=True, metavar="PATH=VALUE", shell_complete=option_paths,
    help="Override one value of the spec, e.g. --set adapter.rank=32.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint; a finished run prints its result again.")
@click.option("--tensorboard", is_flag=True, help="Write RUN/tensorboard too, as the run goes on; needs the extra tensorboard.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on the last line of stdout.")
def tune(spec: Path, output: Path | None, overrides: tuple[str, ...], resume: bool, tensorboard: bool, as_json: bool) -> int:
    """Tune a base as SPEC (YAML or JSON) says.

    Scores the base on held-out rows, trains, scores again, and leaves everything in the run folder: the adapter, checkpoints,
    the record of events and a report. Ctrl-C finishes the step and saves; a second Ctrl-C ends at once, and the last
    checkpoint stands.
    """
    from kivnun.cli.fetch import fetch_base
    from kivnun.cli.process import keep_freed_memory, set_threads
    from kivnun.cli.screen import open_screen
    from kivnun.evaluate.tensorboard import with_board
    from kivnun.spec import MultiProcessSpec, load_spec

    checked = load_spec(spec, overrides)
    run = output if output is not None else Path("runs") / spec.stem
    text, going_on = spec.read_text(encoding="utf-8-sig"), _saying_how_to_go_on(_again(spec, run, overrides, tensorboard))
    if not run.exists():  # else it is refused, or gone on with: its base has been fetched
        fetch_base(checked.base.model, checked.base.revision)
    if isinstance(checked.compute, MultiProcessSpec):
        from kivnun.cli.together import start_together, tune_together
        from kivnun.launch import started_by_torchrun

        if started_by_torchrun():
            return tune_together(
                checked,
                text,
                run,
                going_on,
                resume=resume,
                tensorboard=tensorboard,
                show=lambda result: _show(result, run, as_json),
            )
        arguments = _arguments(spec, run, overrides, resume, tensorboard, as_json)
        return start_together(checked.compute.processes, arguments, as_json=as_json)
    keep_freed_memory()
    set_threads(checked.compute.threads)
    with open_screen() as screen, going_on, with_board(screen, run, tensorboard) as listener:
        # torch is loaded here: after the thread count and the allocator are set, and behind a screen that says what goes on.
        from kivnun.pipeline import tune as run_spec

        result = run_spec(checked, text, run, resume=resume, listener=listener, on_progress=screen.scoring)
    _show(result, run, as_json)
    return 0


@contextmanager
def _saying_how_to_go_on(again: str) -> Generator[None]:
    try:
        yield
    except InterruptedRun as stopped:
        raise InterruptedRun(stopped.message, hint=f"go on with: {again}") from None
    except KeyboardInterrupt:
        # Before the first step, or at the second Ctrl-C: nothing was finished, the last checkpoint stands if there is one.
        raise InterruptedRun("stopped at once", hint=f"go on with: {again}") from None


def _show(result: dict[str, Any], run: Path, as_json: bool) -> None:
    from kivnun.cli.result import sample_pairs, show_comparison, show_next, show_samples
    from kivnun.cli.screen import print_json, stderr, stdout

    if as_json:
        print_json(result)
        return
    if result["base"] is not None:
        show_comparison(stdout(), result["base"], result["tuned"])
        show_samples(stdout(), sample_pairs(run))
    show_next(stderr(), run)


def _again(spec: Path, run: Path, overrides: tuple[str, ...], tensorboard: bool) -> str:
    return shlex.join(["kivnun", *_arguments(spec, run, overrides, resume=True, tensorboard=tensorboard, as_json=False)])


def _arguments(spec: Path, run: Path, overrides: tuple[str, ...], resume: bool, tensorboard: bool, as_json: bool) -> list[str]:
    sets = [part for override in overrides for part in ("--set", override)]
    flags = [flag for flag, given in (("--resume", resume), ("--tensorboard", tensorboard), ("--json", as_json)) if given]
    return ["tune", str(spec), "--output", str(run), *sets, *flags]
