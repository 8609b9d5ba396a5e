"""`kivnun harness`: tasks of lm-evaluation-harness on a run, before and after, or on a base."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kivnun.errors import SpecError

if TYPE_CHECKING:
    from kivnun.evaluate.harness import Difference, HarnessModel, Progress, TaskScores
    from kivnun.opened import OpenedBase, OpenedRun

MICRO_BATCH_TOKENS = 2048


@click.command(short_help="Run tasks of lm-evaluation-harness on a run or a base.")
@click.argument("model", metavar="RUN_OR_BASE")
@click.option("--tasks", required=True, metavar="NAMES", help="Tasks by name, with commas between.")
@click.option(
    "--include-path", "folder", type=click.Path(path_type=Path, file_okay=False, exists=True), metavar="DIR",
    help="A folder with tasks of your own (YAML).",
)  # fmt: skip
@click.option("--fewshot", type=click.IntRange(min=0), metavar="N", help="Examples before each question.  [default: the task's]")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N rows of each task, to try it.")
@click.option("--chat", is_flag=True, help="Ask through the base's chat template.")
@click.option("--gen-kwargs", metavar="K=V,...", help="Options of generation in place of the task's, e.g. max_gen_toks=64.")
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the harness's results as JSON."
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON object.")
def harness(
    model: str,
    tasks: str,
    folder: Path | None,
    fewshot: int | None,
    limit: int | None,
    chat: bool,
    gen_kwargs: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Score a run's base and its result, or a base alone, on tasks of EleutherAI's lm-evaluation-harness.

    RUN_OR_BASE is a finished run's folder, a model folder, a model hub's id or a built-in base. Prompts, cuts and metrics are the
    harness's own. Needs the extra: pip install 'kivnun[harness]'.
    """
    from kivnun.cli.process import keep_freed_memory
    from kivnun.cli.screen import print_json, working

    keep_freed_memory()
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    with working("loading the harness") as show:
        _require()
        os.environ["TQDM_DISABLE"] = "1"  # the harness's own bars: these are on the screen already
        from kivnun.evaluate.harness import Tasks, differences, score_tasks
        from kivnun.opened import open_base, open_run

        opened = open_run(Path(model)) if (Path(model) / "resolved.yaml").is_file() else open_base(model)
        wanted = Tasks(names, folder, fewshot, limit, chat, gen_kwargs)
        scores = {which: score_tasks(one, wanted) for which, one in _models(opened, show)}
    change = differences(scores["base"], scores["tuned"]) if "tuned" in scores else {}
    record = _record(model, scores, change, limit)
    if output is not None:
        import json

        from kivnun.artifacts import atomic_write

        atomic_write(output, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if as_json:
        print_json(record)
    else:
        _show(scores, change, limit)


def _require() -> None:
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise SpecError("lm-evaluation-harness is not installed", hint="pip install 'kivnun[harness]'")


def _models(opened: OpenedRun | OpenedBase, show: Progress) -> Any:
    """Yield each model to score with its name, as the harness sees it, when its turn comes."""
    from kivnun.opened import OpenedRun

    yield "base", _as_harness(opened, opened.base_model, "base", show)
    if isinstance(opened, OpenedRun):
        yield "tuned", _as_harness(opened, opened.tuned, "tuned", show)


def _as_harness(opened: OpenedRun | OpenedBase, model: Any, which: str, show: Progress) -> HarnessModel:
    from kivnun.evaluate.harness import HarnessModel
    from kivnun.model.decoder import Decoder
    from kivnun.model.families import NO_LIMIT, longest_row
    from kivnun.model.read_model import open_config
    from kivnun.model.rope import rows_turn_from

    def told(what: str, done: int, total: int) -> None:
        show(f"{which}: {what}", done, total)

    past_end = isinstance(opened.base.model, Decoder)  # positions are rotations there; elsewhere they may be a table that ends
    return HarnessModel(
        model,
        opened.tokenizer,
        longest_row(opened.base.folder),
        MICRO_BATCH_TOKENS,
        told,
        reads_past_end=past_end,
        shares_up_to=rows_turn_from(open_config(opened.base.folder)) or NO_LIMIT,
    )


def _record(
    model: str, scores: dict[str, TaskScores], change: dict[tuple[str, str], Difference], limit: int | None
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "model": model,
        "limit": limit,
        "versions": next(iter(scores.values())).versions,
        "results": {which: found.results for which, found in scores.items()},
    }
    if "tuned" in scores:
        record["differences"] = {
            task: {
                metric: {"value": own.value, "interval": own.interval and list(own.interval), "verdict": own.verdict}
                for (name, metric), own in sorted(change.items())
                if name == task
            }
            for task in scores["base"].results
        }
    return record


def _show(scores: dict[str, TaskScores], change: dict[tuple[str, str], Difference], limit: int | None) -> None:
    from kivnun.cli.screen import stderr, table

    heads = ("task", "metric", *scores, *(("difference", "") if "tuned" in scores else ()))
    lines: list[tuple[str, ...]] = []
    for task, results in scores["base"].results.items():
        for key, value in results.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            cells = [_cell(found.results[task], metric, filtered) for found in scores.values()]
            lines.append((task, name, *cells, *(_difference(change.get((task, key))) if "tuned" in scores else ())))
    table(heads, lines)
    if limit is not None:
        stderr().print(f"note: the first {limit:,} rows alone: no figures to report", style="yellow")


def _cell(results: dict[str, Any], metric: str, filtered: str) -> str:
    error = results.get(f"{metric}_stderr,{filtered}")
    return f"{results[f'{metric},{filtered}']:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")


def _difference(change: Difference | None) -> tuple[str, str]:
    if change is None:
        return "", ""
    ends = "" if change.interval is None else f" [{change.interval[0]:+.4f}, {change.interval[1]:+.4f}]"
    return f"{change.value:+.4f}{ends}", change.verdict
