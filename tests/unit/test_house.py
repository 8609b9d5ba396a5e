"""Facts about the repository as a whole."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import kivnun
from kivnun.cli.failure import error_classes

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kivnun"
MADE = {".git", ".venv", "build", "dist", "runs", "node_modules", "htmlcov", "__pycache__", "shared"}
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".sh", ".txt", ".json", ".jsonl", ".cfg", ""}
MODULES = sorted(PACKAGE.rglob("*.py"))


def own_files() -> Iterator[Path]:
    """Yield the files that belong to the repository, without asking git: the sources may have come as an archive."""
    waiting = [ROOT]
    while waiting:
        for path in sorted(waiting.pop().iterdir()):
            if path.name in MADE or path.name.startswith(".coverage") or path.is_symlink():
                continue
            if path.name.endswith((".egg-info", "_cache", ".hypothesis")):
                continue
            if path.is_dir():
                waiting.append(path)
            else:
                yield path


def imported(module: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are written in full"
            yield node.module or ""


def test_only_the_command_line_imports_the_command_line() -> None:
    own = PACKAGE / "cli", PACKAGE / "__main__.py"  # the latter is the command line, as `python -m kivnun`
    others = [module for module in MODULES if not {*own}.intersection((module, *module.parents))]
    assert [str(module) for module in others if any(name.startswith("kivnun.cli") for name in imported(module))] == []


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    place = re.compile(r"(?<![\w.$}/-])/(?:root|work|opt|home/\w+|Users/\w+)/")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in own_files()
        if path.suffix in TEXT and path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if place.search(line)
    ]
    assert found == []


def test_every_error_code_is_documented() -> None:
    page = (ROOT / "docs/reference/errors.md").read_text(encoding="utf-8")
    assert [kind.code for kind in error_classes() if f"## `{kind.code}`" not in page] == []


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "kivnun.__version__"}
    assert "version" not in project["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {kivnun.__version__}" in changelog or "## Unreleased" in changelog


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    names = {re.split(r"[\[<>=!~ ]", name)[0].lower().replace("_", "-") for name in wanted}
    assert names - pinned == set()


def test_no_local_build_of_a_library_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "+" in line.split("#")[0] or "@" in line] == []


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_says_why_it_is_there_and_is_a_chapter_not_a_book(module: Path) -> None:
    text = module.read_text(encoding="utf-8")
    empty_package = module.name == "__init__.py" and not text
    assert empty_package or ast.get_docstring(ast.parse(text)), "a module begins with why it exists"
    assert len(text.splitlines()) < 600


def test_nothing_is_read_that_could_run_as_code() -> None:
    """Weights and caches are safetensors and plain arrays: no pickle, whatever it is called, and no code of a model's folder."""
    unsafe = re.compile(r"torch\.load\(|allow_pickle=True|trust_remote_code=True")
    for module in MODULES:
        names = {name.partition(".")[0] for name in imported(module)}
        assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, module
        assert not unsafe.search(module.read_text(encoding="utf-8")), module


def test_there_is_no_utils() -> None:
    assert [path for path in MODULES if path.stem in ("utils", "util", "helpers", "common", "misc")] == []


def test_decision_records_are_numbered_without_gaps_and_hold_their_four_parts() -> None:
    records = sorted((ROOT / "docs/adr").glob("*.md"))
    assert [int(path.name[:4]) for path in records] == list(range(1, len(records) + 1))
    for path in records:
        text = path.read_text(encoding="utf-8")
        for part in ("## Context", "## Decision", "## Consequences", "## What would change our mind"):
            assert part in text, f"{path.name} lacks {part!r}"


def test_every_verb_that_the_documents_name_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        verb
        for path in own_files()
        if path.suffix in (".md", ".sh", ".py")
        for verb in re.findall(r"`make ([a-z-]+)`", path.read_text(encoding="utf-8"))
    }
    assert named - targets == set()


def test_relative_links_of_the_documents_lead_somewhere() -> None:
    broken = [
        f"{path.relative_to(ROOT)} -> {link}"
        for path in own_files()
        if path.suffix == ".md"
        for link in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
        if "://" not in link and not (path.parent / link).exists()
    ]
    assert broken == []
