"""Fixtures that several test files share. Nothing here loads torch before a test asks for a base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kivnun.worker.trainer import Trainers


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a family's tiny base (a name in `tiny.CONFIGS`), written once per session."""
    import tiny

    root = tmp_path_factory.mktemp("bases")

    def folder_of(name: str) -> Path:
        folder = root / name
        return folder if folder.exists() else tiny.write_base(folder, tiny.CONFIGS[name]())

    return folder_of


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the base of whole runs: a Phi-3 of two layers with a tokenizer and a chat template."""
    from tiny_task import make_base

    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of torch's threads for one test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Return the URL of a real PostgreSQL server, started once per test process."""
    from postgres import server

    with server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def db_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Return the URL of an empty database: every test that asks for it holds on both."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'kivnun.sqlite'}"
        return
    from postgres import empty_database

    with empty_database(request.getfixturevalue("postgres")) as url:
        yield url


@pytest.fixture(scope="module")
def trainers() -> Iterator[Trainers]:
    """Toy trainers for workers in this process: the process that they are forked from takes half a second to load."""
    from kivnun.worker.trainer import Trainers

    made = Trainers(loads_torch=False)
    yield made
    made.close()
