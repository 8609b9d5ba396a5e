"""The documentation holds: its links lead somewhere, its specs are specs, its rows are rows, and its commands run as printed.

A page is a session (`tests/pages.py`): its files are saved, and the lines of its `sh` blocks are run in their order, each page in a
folder of its own. What a `text` block shows is what the commands print. Pages about mistakes: `test_mistakes.py`.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from kivnun.cli import failure
from kivnun.cli.main import cli, run
from kivnun.data.formats import read_records
from kivnun.data.scenarios import cldr
from kivnun.errors import KivnunError
from kivnun.showcase.run import Size
from kivnun.spec import parse_spec
from pages import ROOT, blocks, commands, is_tree, named, prose, save_files

GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS, *sorted((ROOT / "recipes").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
SESSIONS = [ROOT / "README.md", *GUIDES]
# One thread, so that workers side by side do not wait for one another.
ONE_THREAD = ("--set", "compute.threads=1")
# The command writes 200; every score of the page is taken over them, six times in all.
HELD_OUT_ROWS = 20
# What `kivnun showcase --quick` does on a page: each of its stages, with hardly any rows.
QUICK = Size("quick", 9, 10, 10, 10, 1, 1, 1, 16)
# What `kivnun doctor` hears of torch and the kernels, which takes seconds to find out: test_doctor.py does.
TRIED = {
    "torch": {"version": "2", "built_for_cuda": None, "gpus": [], "bf16": None},
    "kernels": {"reason": None, "packs": [], "compiler": "cc"},
    "triton": {"reason": "there is no CUDA device"},
}


def of_a_service() -> Iterator[click.Command]:
    """Yield the commands that run a service or call one: pages' lines are parsed, test_serve_service.py runs them for real."""
    for name in ("serve", "jobs", "keys", "worker"):
        command = cli.commands[name]
        yield from command.commands.values() if isinstance(command, click.Group) else [command]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.replace("`", "").lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_relative_link_leads_to_a_file_and_an_anchor_that_are_there(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{named(page)}: {link}"
        assert target.is_relative_to(ROOT), f"{named(page)}: {link} leaves the repository"
        assert not anchor or anchor in anchors(target), f"{named(page)}: {link}"


def test_every_page_is_in_the_index() -> None:
    index, mistakes = ROOT / "docs" / "README.md", ROOT / "docs" / "mistakes" / "README.md"
    linked = {(page.parent / link).resolve() for page in (index, mistakes) for link in re.findall(r"\]\(([^)#\s]+)", prose(page))}
    assert [named(page) for page in DOCS if page != index and page not in linked] == []


def test_the_tree_of_the_readme_is_the_tree_of_the_repository() -> None:
    tree = next(block.text for block in blocks(ROOT / "README.md") if is_tree(block))
    listed = [("kivnun/" if line.startswith("  ") else "") + line.split()[0].rstrip("/") for line in tree.splitlines()]
    assert [path for path in listed if not (ROOT / path).exists()] == []
    package = [path for path in (ROOT / "kivnun").iterdir() if not path.name.startswith("_") and path.name != "py.typed"]
    assert {named(path) for path in package} - set(listed) == set()


@pytest.mark.parametrize("page", [*SESSIONS, ROOT / "docs" / "reference" / "spec.md"], ids=named)
def test_every_spec_shown_is_a_spec(page: Path, tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    for block in blocks(page):
        if block.language == "yaml":
            parse_spec(block.text, folder=tmp_path)


@pytest.mark.parametrize("page", SESSIONS, ids=named)
def test_every_row_shown_is_a_row(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.language == "json":
            path = tmp_path / (block.name or "rows.jsonl")
            path.write_text(block.text, encoding="utf-8")
            _, records, problems = read_records(path)
            assert problems == []
            assert len(records) == len(block.text.splitlines()) or path.suffix == ".json"


@pytest.mark.parametrize("page", SESSIONS, ids=named)
def test_the_commands_of_a_page_run_in_their_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kivnun.showcase.run.QUICK", QUICK)
    # A table takes ten minutes and more: the pages' commands are read, test_matrix_whole.py measures.
    monkeypatch.setattr("kivnun.matrix.matrix.make_matrix", lambda output, **given: {"cells": []})
    monkeypatch.setattr("kivnun.plan.checkup.try_out", lambda: TRIED)
    for command in of_a_service():
        monkeypatch.setattr(command, "callback", lambda **given: None)
    save_files(page, tmp_path)
    said = ""
    for words, status in commands(page):
        if words[0] == "python" and words[1] != "-m":
            runpy.run_path(words[1])
            continue
        if words[0] == "python":
            assert words[2] == cldr.__name__
            cldr.write(Path(words[3]), validation=HELD_OUT_ROWS)
            continue
        more = ONE_THREAD if words[1] == "tune" else ()
        ended = run([*words[1:], *more])
        out, err = capsys.readouterr()
        assert ended == status, f"{shlex.join(words)}\n{err}"
        assert "Traceback" not in err
        if "--json" in words:
            json.loads(out.splitlines()[-1])
        said += out + err
    printed = {" ".join(line.split()) for line in said.splitlines()}
    shown = [block.text for block in blocks(page) if block.language == "text" and block.name is None and not is_tree(block)]
    wrong = [line for text in shown for line in text.splitlines() if " ".join(line.split()) not in printed]
    assert wrong == [], "the page shows what the commands do not print"


def test_every_command_is_run_on_some_page() -> None:
    shown = [words for page in SESSIONS for words, _ in commands(page)]
    run_somewhere = {tuple(word for word in words[1:3] if word.replace("-", "").isalpha()) for words in shown}
    for name, command in cli.commands.items():
        leaves = [(name, below) for below in command.commands] if isinstance(command, click.Group) else [(name,)]
        for leaf in leaves:
            assert any(words[: len(leaf)] == leaf for words in run_somewhere), f"kivnun {' '.join(leaf)} is shown nowhere"


def test_every_error_code_is_explained_in_a_guide_and_in_the_reference() -> None:
    guides = "".join(page.read_text(encoding="utf-8") for page in GUIDES)
    reference = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    for status, code, _meaning in failure.exit_statuses():
        if code:
            assert f"| `{code}` | {status} |" in guides, f"no guide says what to do about {code}"
            assert f"`{code}`" in reference
    assert KivnunError.code not in {code for _, code, _ in failure.exit_statuses()}
