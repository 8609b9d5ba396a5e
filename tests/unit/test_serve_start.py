"""The start of a service on its folder: held by one, its key made once, its dead let go, and nobody reachable without TLS."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from kivnun.cli.main import run
from kivnun.errors import StorageError
from kivnun.jobs import leases
from kivnun.jobs.database import Database
from kivnun.jobs.errors import StaleLease
from kivnun.jobs.place import Place, place_in
from kivnun.jobs.schema import answerers, api_keys
from kivnun.jobs.tenants import SCOPES, find_key
from kivnun.service.run import begin, held

CHOSEN = "sk-kivnun-chosen-by-the-operator"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return place_in(tmp_path / "data")


@pytest.fixture
def db(place: Place) -> Iterator[Database]:
    with held(place.data):
        database = place.database()
        yield database
        database.close()


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def keys(db: Database) -> int:
    return db.read(lambda tx: tx.execute(sa.select(sa.func.count()).select_from(api_keys)).scalar_one())


def test_a_folder_is_held_by_one_service_and_is_its_owners_alone(place: Place) -> None:
    with held(place.data), pytest.raises(StorageError, match="another service runs") as refused, held(place.data):
        pass
    assert refused.value.hint
    assert place.data.stat().st_mode & 0o077 == 0
    with held(place.data):
        pass


def test_whatever_the_umask_a_folder_that_was_open_is_closed_and_nothing_in_it_is_for_others(
    place: Place, open_umask: None, caplog: pytest.LogCaptureFixture
) -> None:
    place.data.mkdir()
    assert place.data.stat().st_mode & 0o777 == 0o777
    place.keep_private()
    with held(place.data):
        db = place.database()
        begin(place, db, CHOSEN)
        place.blobs().put_bytes("default", b"examples")
        db.close()
    made = [place.data, *place.data.rglob("*")]
    assert {"kivnun.sqlite", "lock", "blobs"} <= {path.name for path in made}
    assert [path for path in made if path.stat().st_mode & 0o077] == []
    assert not caplog.records


def test_a_folder_that_is_for_everybody_stays_so_and_it_is_said(
    place: Place, open_umask: None, caplog: pytest.LogCaptureFixture
) -> None:
    place.data.mkdir()
    place.data.chmod(0o1777)  # as /tmp is
    place.keep_private()
    assert place.data.stat().st_mode & 0o7777 == 0o1777
    assert "others" in caplog.text


def test_the_first_start_makes_an_admin_key_and_later_ones_do_not(place: Place, db: Database) -> None:
    made = begin(place, db, None)
    assert made is not None
    found = db.read(lambda tx: find_key(tx, made))
    assert found is not None
    assert (found.tenant, found.scopes) == ("default", list(SCOPES))
    assert begin(place, db, None) is None
    assert keys(db) == 1


def test_a_key_of_the_operators_is_recorded_at_any_start_once_and_none_is_made(place: Place, db: Database) -> None:
    for _ in range(2):
        assert begin(place, db, CHOSEN) is None
    assert keys(db) == 1
    assert begin(place, db, None) is None
    assert begin(place, db, CHOSEN + "-changed") is None
    assert keys(db) == 2


def test_a_key_of_the_operators_that_was_revoked_stays_so(place: Place, db: Database) -> None:
    begin(place, db, CHOSEN)
    db.write("revoked", lambda tx: tx.execute(sa.update(api_keys).values(revoked_at=1.0)))
    begin(place, db, CHOSEN)
    found = db.read(lambda tx: find_key(tx, CHOSEN))
    assert found is not None
    assert found.revoked_at == 1.0


def test_a_start_on_its_own_folder_takes_leases_and_addresses_from_the_dead(place: Place, db: Database) -> None:
    begin(place, db, CHOSEN)
    lease = db.write("claim", lambda tx: leases.claim(tx, "job:1", "dead"))
    assert lease is not None
    row = {
        "id": "answerer_1",
        "base": "toy",
        "address": "unix:/gone",
        "secret": "s",
        "machine": "m",
        "beat": 1,
        "created_at": time.time(),
    }
    db.write("address", lambda tx: tx.execute(sa.insert(answerers).values(**row)))
    begin(place, db, CHOSEN)
    with pytest.raises(StaleLease):
        db.write("late", lambda tx: leases.beat(tx, lease))
    assert db.write("claim", lambda tx: leases.claim(tx, "job:1", "next")) == leases.Lease("job:1", 2)
    assert db.read(lambda tx: tx.execute(sa.select(answerers)).all()) == []


def test_a_start_on_a_database_that_others_share_leaves_their_leases(place: Place, tmp_path: Path) -> None:
    shared = place_in(tmp_path / "mine", f"sqlite:///{tmp_path / 'shared.sqlite'}")
    db = shared.database()
    begin(shared, db, CHOSEN)
    lease = db.write("claim", lambda tx: leases.claim(tx, "job:1", "elsewhere"))
    assert lease is not None
    begin(shared, db, CHOSEN)
    db.write("beat", lambda tx: leases.beat(tx, lease))
    db.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "can be reached by others"),
        (["--host", "::"], "can be reached by others"),
        (["--db", "mysql://host/name"], "neither sqlite nor postgresql"),
        (["--tls-cert", __file__], "belong together"),
    ],
)
def test_what_serve_refuses_is_said_before_anything_is_made(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["serve", *words]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_short_admin_key_is_refused_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KIVNUN_ADMIN_KEY", "guessable")
    assert run(["serve"]) == 2
    assert "guessable" not in "".join(capsys.readouterr())
