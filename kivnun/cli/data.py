"""`kivnun data`: look at data before spending time on it. Loads no model and no torch."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kivnun.cli.completion import option_paths, spec_files
from kivnun.errors import DataError, StorageError

if TYPE_CHECKING:
    from rich.console import Console

    from kivnun.data.checks import Check
    from kivnun.data.rows import TokenRow, Trainable
    from kivnun.data.template import ChatTokenizer
    from kivnun.spec import TuneSpec

FORMATS = (
    "auto", "messages", "sharegpt", "preference", "prompt_completion", "prompt_response", "instruction", "multiple_choice",
    "entities", "classification", "text",
)  # fmt: skip
PAGE = "data_report.html"


@click.group()
def data() -> None:
    """Check a data file; see the tokens a spec trains."""


@data.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--held-out", type=click.Path(path_type=Path), metavar="FILE", help="A file of held-out rows, for the overlap.")
@click.option("--base", metavar="BASE", help="Count lengths in this base's tokens, and try its chat template on every row.")
@click.option(
    "--format", "format_name", type=click.Choice(FORMATS), default="auto", show_default=True, help="The shape of the rows."
)
@click.option("--columns", multiple=True, metavar="KEY=COLUMN", help="Which column is a key of the format, as data.columns.")
@click.option("--instruction", metavar="TEXT", help="What is asked of each row's text, as data.instruction.")
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), metavar="PATH", help=f"The page to write; else {PAGE}.")
@click.option("--no-report", is_flag=True, help="Write no page.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; a page is then written with --report only.")
def check(
    files: tuple[Path, ...],
    held_out: Path | None,
    base: str | None,
    format_name: str,
    columns: tuple[str, ...],
    instruction: str | None,
    report: Path | None,
    no_report: bool,
    as_json: bool,
) -> None:
    """Check every row of the FILEs and say what is in them: problems, duplicates, overlap, lengths.

    A FILE is JSONL, JSON, CSV, TSV, Parquet or a data set. All problems are found, with their line numbers; the first 20 are shown,
    on the page and with --json all. Prints a table and writes data_report.html in the current folder. Needs no model.
    """
    from kivnun.cli.screen import print_json, stderr, stdout, table
    from kivnun.data.checks import check_files, describe_check

    if report is not None and no_report:
        raise click.UsageError("--report and --no-report exclude each other")
    tokenizer, longest = _tokenizer_of(base) if base is not None else (None, None)
    found = check_files(
        files, held_out, format_name, columns=_columns(columns), instruction=instruction, tokenizer=tokenizer, longest_row=longest
    )
    page = report if report is not None else None if as_json or no_report else Path(PAGE)
    if not as_json:
        table(("", ""), describe_check(found), stdout())
    written = _write_page(found, page) if page is not None else None
    if page is not None and written is None:
        stderr().print(f"report: {page}")
    if found.problems:
        if written is not None:
            stderr().print(written.message)
        raise _unusable(found)
    if written is not None:
        raise written
    if as_json:
        print_json(_as_json(found))


def _write_page(found: Check, page: Path) -> StorageError | None:
    """Write the page. Return what went wrong: bad rows, if there are any, are the first thing to tell."""
    from kivnun.artifacts import atomic_write, make_folder
    from kivnun.evaluate.data_page import render

    try:
        make_folder(page.parent)
        atomic_write(page, render(found))
    except StorageError as error:
        return StorageError(error.message, hint="name another place with --report, or give --no-report")
    return None


def _unusable(found: Check) -> DataError:
    paths = [found.train.path, *([found.held_out.path] if found.held_out else [])]
    return DataError(
        f"{', '.join(paths)}: {found.bad_rows:,} of {found.all_rows:,} rows cannot be used",
        found.problems,
        hint="mend the lines, or set data.bad_rows to skip to leave them out",
    )


def _as_json(found: Check) -> dict[str, Any]:
    """Return a check as one object: the training files' report, and beside it the rest. Rows themselves are left out."""
    rest = asdict(found)
    for name in ("train", "samples"):
        del rest[name]
    return {**asdict(found.train), **rest}


def _columns(given: tuple[str, ...]) -> dict[str, str]:
    pairs = [item.partition("=") for item in given]
    if wrong := [item for item, (key, _, column) in zip(given, pairs, strict=True) if not (key and column)]:
        raise click.BadParameter(f"must be KEY=COLUMN, got {wrong[0]!r}", param_hint="--columns")
    return {key: column for key, _, column in pairs}


def _tokenizer_of(base: str) -> tuple[ChatTokenizer, int]:
    from kivnun.data.template import load_tokenizer
    from kivnun.model.families import find_base, longest_row

    folder = find_base(base, None)
    return load_tokenizer(folder), longest_row(folder)


@data.command()
@click.argument("spec", type=click.Path(path_type=Path, dir_okay=False), shell_complete=spec_files)
@click.option(
    "--set", "overrides", multiple=True, metavar="PATH=VALUE", shell_complete=option_paths, help="Override one value of the spec."
)
@click.option("--rows", "num_rows", type=click.IntRange(min=1), default=3, show_default=True, help="Training rows to show.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with ids, weights and text of each row shown.")
def show(spec: Path, overrides: tuple[str, ...], num_rows: int, as_json: bool) -> None:
    """Show the first rows of SPEC as the model will see them, with the trained tokens marked.

    Trained text is green on a terminal, and between ⟦ and ⟧ elsewhere.
    """
    from kivnun.cli.screen import print_json, stdout, table
    from kivnun.data.checks import describe
    from kivnun.data.loader import load_dataset
    from kivnun.spec import load_spec

    checked = load_spec(spec, overrides)
    tokenizer, max_seq_len = _tokenizer(checked)
    dataset = load_dataset(checked.data, tokenizer, checked.seed, max_seq_len)
    shown = [part for item in dataset.train.rows[:num_rows] for part in _parts(item)]
    if as_json:
        print_json(
            {
                "format": dataset.format,
                "report": asdict(dataset.report),
                "rows": [{"part": part, **_row_fields(row, tokenizer)} for part, row in shown],
            }
        )
        return
    console = stdout()
    for part, row in shown:
        _print_row(console, part, row, tokenizer)
    console.print()
    table(("", ""), describe(dataset.report), console)


def _tokenizer(spec: TuneSpec) -> tuple[ChatTokenizer, int]:
    """Return the base's tokenizer and the longest row allowed, from the base's folder alone."""
    from kivnun.data.template import load_tokenizer
    from kivnun.model.families import find_base, longest_row

    folder = find_base(spec.base.model, spec.base.revision)
    return load_tokenizer(folder, spec.data.template), spec.data.max_seq_len or longest_row(folder)


def _row_fields(row: TokenRow, tokenizer: ChatTokenizer) -> dict[str, Any]:
    return {
        "path": row.where.path,
        "line": row.where.line,
        "row": row.row,
        "tokens": row.length,
        "trained_tokens": int((row.weights != 0).sum()),
        "total_weight": row.total_weight,
        "prompt_len": row.prompt_len,
        "text": tokenizer.decode(row.ids.tolist()),
        "trained": [text for text, weight in _spans(row, tokenizer) if weight],
        "ids": row.ids.tolist(),
        "weights": row.weights.tolist(),
    }


def _print_row(console: Console, part: str, row: TokenRow, tokenizer: ChatTokenizer) -> None:
    from rich.text import Text

    trained = int((row.weights != 0).sum())
    of = f"{part} reply, " if part != "row" else ""
    console.print(f"\n{row.where}  {of}{row.length:,} tokens, {trained:,} trained", style="bold")
    text = Text()
    for piece, weight in _spans(row, tokenizer):
        if not weight:
            text.append(piece, style="dim")
        elif console.is_terminal and not console.no_color:
            text.append(piece, style="bold green")
        else:
            text.append(f"⟦{piece}⟧")
        if weight not in (0.0, 1.0):
            text.append(f"(weight {weight:g})", style="yellow")
    console.print(text)


def _spans(row: TokenRow, tokenizer: ChatTokenizer) -> list[tuple[str, float]]:
    """Return the row's text cut where the weight changes. Neighbours are decoded together: one letter may be several tokens."""
    pairs = zip(row.weights.tolist(), row.ids.tolist(), strict=True)
    groups = itertools.groupby(pairs, key=lambda pair: pair[0])
    return [(tokenizer.decode([token for _, token in group]), weight) for weight, group in groups]


def _parts(item: Trainable) -> list[tuple[str, TokenRow]]:
    """Return the token rows to show, each with what it is: a row, or one side of a preference."""
    from kivnun.data.rows import PreferencePair

    return [("chosen", item.chosen), ("rejected", item.rejected)] if isinstance(item, PreferencePair) else [("row", item)]
