"""Fixtures that several test files share. Nothing here loads torch before a test asks for a base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kivnun.jobs.database import Database
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


@pytest.fixture(scope="session")
def filled_template(postgres: str) -> Iterator[str]:
    """Return the name of a database of that server with tables and two tenants, to be copied."""
    from kivnun.jobs.database import Database
    from postgres import empty_database
    from service_parts import fill

    with empty_database(postgres) as url:
        db = Database(url)
        fill(db)
        name = db.url.database
        db.close()
        assert name is not None
        yield name


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_db_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Return the URL of a database without tables: every test that asks for it holds on both kinds."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'kivnun.sqlite'}"
        return
    from postgres import empty_database

    with empty_database(request.getfixturevalue("postgres")) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def db_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Return the URL of a database with tables and two tenants: every test that asks for it holds on both kinds."""
    if request.param == "sqlite":
        from service_parts import filled_sqlite

        file = tmp_path / "kivnun.sqlite"
        file.write_bytes(filled_sqlite())
        yield f"sqlite:///{file}"
        return
    from postgres import copied_database

    with copied_database(request.getfixturevalue("postgres"), request.getfixturevalue("filled_template")) as url:
        yield url


@pytest.fixture
def db(db_url: str) -> Iterator[Database]:
    """Return a database with tables and two tenants."""
    from kivnun.jobs.database import Database

    made = Database(db_url)
    yield made
    made.close()


@pytest.fixture(scope="module")
def trainers() -> Iterator[Trainers]:
    """Toy trainers for workers in this process: the process that they are forked from takes half a second to load."""
    from kivnun.worker.trainer import Trainers

    made = Trainers(loads_torch=False)
    yield made
    made.close()
