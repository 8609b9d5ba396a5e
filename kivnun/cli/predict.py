"""`kivnun predict`: a file of questions, answered by the tuned model or its base."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from kivnun.cli.completion import run_folders
from kivnun.errors import InterruptedRun

PIPE = Path("-")


@click.command(short_help="Answer a file of questions.")
@click.argument("run", type=click.Path(path_type=Path, file_okay=False), shell_complete=run_folders)
@click.option(
    "--input", "source", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True), required=True, metavar="FILE",
    help="JSONL: messages that end with a user's, a prompt, or rows made for training; - is stdin.",
)  # fmt: skip
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True), required=True, metavar="FILE",
    help="The answers, JSONL in the input's order; it must not exist, unless with --resume. - is stdout.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on after the last whole answer of the output.")
@click.option("--skip-bad", is_flag=True, help="Write an error in place of an answer for a row that cannot be used.")
@click.option("--base", is_flag=True, help="Answer with the base, without the adapter.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="The longest answer.")
@click.option("--temperature", type=click.FloatRange(min=0.0), default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option(
    "--top-p", type=click.FloatRange(min=0.0, max=1.0, min_open=True), default=1.0, show_default=True,
    help="Draw from the likeliest tokens of this share.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="The draws' seed; each row draws by its line number.")
@click.option(
    "--batch-rows", type=click.IntRange(1, 64), default=32, show_default=True, help="Rows answered together; changes no answer."
)
@click.option("--logprob", is_flag=True, help="Tell the summed log-probability of each answer, too.")
@click.option("--json", "as_json", is_flag=True, help="Print {output, rows, answered, errors, tokens, finish_reasons} as JSON.")
def predict(
    run: Path, source: Path, output: Path, resume: bool, skip_bad: bool, base: bool, max_new_tokens: int, temperature: float,
    top_p: float, seed: int, batch_rows: int, logprob: bool, as_json: bool,
) -> None:  # fmt: skip
    """Answer every row of a file with the model of RUN.

    Each output row holds the line it answers, its id and reference where it has them, the answer, finish_reason (stop or length)
    and the number of tokens. An answer is the same whatever rows it is asked with. A call that was stopped goes on with --resume to
    the same bytes as one that was not.
    """
    if output == PIPE and (resume or as_json):
        raise click.UsageError("--output - takes neither --resume nor --json: stdout holds the answers")
    from kivnun.cli.process import keep_freed_memory
    from kivnun.cli.screen import print_json, stderr, working

    keep_freed_memory()
    name = "stdin" if source == PIPE else str(source)
    with _readable(source) as place, working("loading the run") as tell:
        from kivnun.opened import open_run
        from kivnun.predict import PredictParams, answers_of, predict_file

        opened = open_run(run)
        params = PredictParams(base, max_new_tokens, temperature, top_p, seed, logprob)
        if output == PIPE:
            for rows in answers_of(opened, place, params, batch_rows=batch_rows, skip_bad=skip_bad, name=name):
                _write(rows)
            return
        try:
            result = predict_file(
                opened, place, output, params, batch_rows=batch_rows, resume=resume, skip_bad=skip_bad, name=name,
                on_progress=lambda done, total: tell(f"{done:,} of {total:,} rows", done, total),
            )  # fmt: skip
        except KeyboardInterrupt:
            raise InterruptedRun("stopped; what was answered is kept", hint="the same command with --resume goes on") from None
    if as_json:
        print_json(result)
        return
    errors = f", {result['errors']:,} errors" if result["errors"] else ""
    stderr().print(f"{result['answered']:,} rows answered{errors}, {result['tokens']:,} tokens: {output}")


@contextmanager
def _readable(source: Path) -> Generator[Path]:
    """Give the input as a file: what comes on stdin is kept in one while it is needed."""
    if source != PIPE:
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="kivnun-predict-") as place:
        path = Path(place) / "stdin"
        path.write_bytes(sys.stdin.buffer.read())
        yield path


def _write(rows: list[dict[str, Any]]) -> None:
    sys.stdout.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    sys.stdout.flush()
