"""What the sweep erases, and what it never does: blobs that a row, a part or a manifest names, and those about to be named."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from kivnun.jobs import files, tuning, uploads
from kivnun.jobs.blobs import PARTIAL
from kivnun.jobs.database import Database
from kivnun.jobs.files import File
from kivnun.jobs.ids import new_id
from kivnun.jobs.schema import models, snapshots
from kivnun.jobs.uploads import Part, Upload
from kivnun.service.context import Service
from kivnun.service.sweeping import SETTLE_S, YOUNG_S, Sweep
from service_parts import place, service_at

JOB = tuning.Job(id="ftjob-1", tenant="default", created_at=1.0, model="toy", base="toy", training_file="file-1", method={}, seed=1)


class World:
    """A service whose two clocks the test turns."""

    def __init__(self, folder: Path, db_url: str) -> None:
        self.wall, self.steady = time.time(), 0.0
        self.folder = folder / "blobs"
        self.service: Service = replace(service_at(place(folder, db_url)), clock=lambda: self.wall)
        self.sweep = Sweep(self.service, clock=lambda: self.steady)

    def put(self, content: bytes, tenant: str = "default", *, old: bool = True) -> str:
        name = self.service.blobs.put_bytes(tenant, content)
        if old:
            path = next(self.folder.rglob(name.partition("/")[2]))
            os.utime(path, (1.0, 1.0))
        return name

    def pass_by(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds

    def swept(self) -> set[str]:
        """Look as often as it takes, with the wait between; return what is left."""
        for _ in range(3):
            while self.sweep.turn():
                pass
            self.pass_by(SETTLE_S + 1)
        return {name for name, _ in self.service.blobs.names()}


@pytest.fixture
def world(tmp_path: Path, db_url: str) -> Iterator[World]:
    made = World(tmp_path, db_url)
    yield made
    made.service.db.close()


def test_what_no_row_names_is_erased_and_all_else_stays(world: World) -> None:
    db = world.service.db
    inner, weights = world.put(b"adapter"), world.put(b"weights of a snapshot")
    named = {
        "file": world.put(b"file"), "report": world.put(b"report"), "part": world.put(b"part"),
        "snapshot": world.put(json.dumps({"files": [{"path": "w", "blob": weights, "bytes": 1}]}).encode()),
        "model": world.put(json.dumps({"files": [{"path": "a", "blob": inner, "bytes": 1}]}).encode()),
        "young": world.put(b"young", old=False),
    }  # fmt: skip
    others = world.put(b"file", "other")
    garbage = {world.put(b"garbage"), world.put(b"garbage", "other")}
    file = File("file-1", "default", 1.0, "fine-tune", "a", 4, named["file"], "processed", report=named["report"])
    db.write("file", lambda tx: files.add(tx, file))
    db.write("file", lambda tx: files.add(tx, replace(file, id="file-2", tenant="other", blob=others, report=None)))
    db.write(
        "upload", lambda tx: uploads.add(tx, Upload("upload_1", "default", world.wall, world.wall + 1e6, "batch", "a", "b", 4))
    )
    db.write("part", lambda tx: uploads.add_part(tx, Part("part_1", "upload_1", 1.0, 4, named["part"])))
    db.write("job", lambda tx: tuning.create(tx, JOB, new_id))
    snapshot = {"job": "ftjob-1", "epoch": 1, "step": 1, "created_at": 1.0, "manifest": named["snapshot"]}
    db.write("snapshot", lambda tx: tx.execute(sa.insert(snapshots).values(**snapshot)))
    model = {"id": "ft:m", "tenant": "default", "created_at": 1.0, "job": "ftjob-1", "base": "toy", "step": 1, "metrics": {},
             "manifest": named["model"], "content_hash": "x"}  # fmt: skip
    db.write("model", lambda tx: tx.execute(sa.insert(models).values(**model)))
    kept = {*named.values(), inner, weights, others}
    assert {name for name, _ in world.service.blobs.names()} == kept | garbage
    assert world.swept() == kept
    world.service.blobs.delete(named["young"])  # it grows old below
    kept.remove(named["young"])

    # A deleted model goes with its weights, but not while a job that goes on from it has not ended.
    db.write("model", lambda tx: tx.execute(sa.update(models).values(deleted_at=2.0)))
    going_on = replace(JOB, id="ftjob-2", model="ft:m")
    db.write("job", lambda tx: tuning.create(tx, going_on, new_id))
    assert world.swept() == kept
    db.write("cancel", lambda tx: tuning.command(tx, going_on, "cancel", 2.0, new_id))
    assert world.swept() == kept - {named["model"], inner}

    # One content in two files goes with the second.
    db.write("file", lambda tx: files.add(tx, replace(file, id="file-3")))
    db.write("delete", lambda tx: files.delete(tx, "file-1", "default", 3.0))
    assert named["file"] in world.swept()
    db.write("delete", lambda tx: files.delete(tx, "file-3", "default", 3.0))
    left = world.swept()
    assert not {named["file"], named["report"]} & left
    assert others in left, "another tenant's copy of the same content is its own"


def test_a_manifest_that_is_lost_or_damaged_keeps_its_tenants_blobs_and_no_others(world: World) -> None:
    db = world.service.db
    db.write("job", lambda tx: tuning.create(tx, JOB, new_id))
    damaged = world.put(b"no manifest")
    kept = {damaged, world.put(b"an adapter that the lost manifest may have named")}
    for manifest in ("default/" + "0" * 64, damaged):
        model = {"id": "ft:m", "tenant": "default", "created_at": 1.0, "job": "ftjob-1", "base": "toy", "step": 1, "metrics": {},
                 "manifest": manifest, "content_hash": "x"}  # fmt: skip
        db.write("model", lambda tx: tx.execute(sa.delete(models)))
        db.write("model", lambda tx, model=model: tx.execute(sa.insert(models).values(**model)))
        world.put(b"garbage", "other")
        (world.folder / "other" / "ab").mkdir(parents=True, exist_ok=True)
        leftover = world.folder / "other" / "ab" / f"{PARTIAL}x"
        leftover.touch()
        os.utime(leftover, (1.0, 1.0))
        assert world.swept() == kept
        assert not leftover.exists()


def test_a_blob_that_gets_its_row_between_two_looks_stays(world: World) -> None:
    name = world.put(b"slow to be named")
    world.sweep.turn()
    world.pass_by(SETTLE_S + 1)
    world.service.db.write("file", lambda tx: files.add(tx, File("file-1", "default", 1.0, "batch", "a", 4, name)))
    assert world.swept() == {name}


def test_a_clock_that_jumps_by_a_day_erases_nothing_that_is_about_to_be_named(world: World) -> None:
    name = world.put(b"just put", old=False)
    world.wall += 86_400
    world.sweep.turn()
    world.steady += SETTLE_S - 1
    world.sweep.turn()
    assert world.service.blobs.has(name)


def test_a_blob_put_again_after_the_first_look_stays(world: World) -> None:
    name = world.put(b"put again")
    world.sweep.turn()
    world.pass_by(SETTLE_S + 1)
    assert world.put(b"put again", old=False) == name
    world.sweep.turn()
    assert world.service.blobs.has(name)
    world.pass_by(YOUNG_S)
    assert world.swept() == set()


def test_writers_that_put_and_name_while_all_is_swept_lose_nothing(world: World) -> None:
    """Two writers name the same few contents again and again, delete them again, and two sweeps with no patience go round."""
    stop = threading.Event()
    failed: list[str] = []
    # As if an hour were half a second, and the wait nothing.
    sweeps = [Sweep(replace(world.service, clock=time.time), young_s=0.5, settle_s=0.0, every_s=0.0) for _ in range(2)]

    def write(writer: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            file_id, content = f"file-{writer}-{number}", b"content %d" % (number % 3)
            blob = world.service.blobs.put_bytes("default", content)
            file = File(file_id, "default", time.time(), "user_data", "a", len(content), blob, "processed")
            world.service.db.write("add", lambda tx, file=file: files.add(tx, file))
            if b"".join(world.service.blobs.read(blob)) != content:
                failed.append(file_id)
            world.service.db.write("delete", lambda tx, file_id=file_id: files.delete(tx, file_id, "default", time.time()))
            stop.wait(0.02 if number % 5 else 0.7)  # long enough that the contents grow old and are erased

    def sweep(one: Sweep) -> None:
        while not stop.wait(0.01):
            one.turn()

    def reported(work: object, argument: object) -> None:
        try:
            work(argument)  # type: ignore[operator]
        except Exception as error:
            failed.append(repr(error))
            stop.set()

    threads = [threading.Thread(target=reported, args=(write, n)) for n in range(2)]
    threads += [threading.Thread(target=reported, args=(sweep, one)) for one in sweeps]
    for thread in threads:
        thread.start()
    stop.wait(1.6)
    stop.set()
    for thread in threads:
        thread.join()
    assert failed == []


def test_files_and_uploads_whose_time_is_over_end_and_those_in_use_wait(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    db = Database(world.service.db.url.render_as_string(hide_password=False), written.append)
    world.sweep = Sweep(replace(world.service, db=db), clock=lambda: world.steady)
    monkeypatch.setattr("kivnun.service.sweeping.AT_ONCE", 1)  # those in use come first, and hold up no other
    soon = world.wall + 10
    for n in (1, 2):
        blob = world.put(b"file %d" % n)
        file = File(f"file-{n}", "default", 1.0, "fine-tune", "a", 6, blob, "processed", expires_at=soon + n)
        db.write("file", lambda tx, file=file: files.add(tx, file))
    db.write("job", lambda tx: tuning.create(tx, JOB, new_id))  # of file-1
    db.write("upload", lambda tx: uploads.add(tx, Upload("upload_1", "default", 1.0, soon, "batch", "a", "b", 4)))
    db.write("part", lambda tx: uploads.add_part(tx, Part("part_1", "upload_1", 1.0, 4, world.put(b"part"))))
    world.sweep.turn()
    assert db.read(lambda tx: files.find(tx, "file-2", "default")) is not None
    world.pass_by(13)
    left = world.swept()
    assert len(left) == 1
    written.clear()
    world.sweep.turn()
    assert written == [], "what is in use costs no write"
    assert db.read(lambda tx: files.find(tx, "file-1", "default")) is not None
    assert db.read(lambda tx: files.find(tx, "file-2", "default")) is None
    upload = db.read(lambda tx: uploads.find(tx, "upload_1", "default"))
    assert upload is not None
    assert upload.status == "expired"
    db.write("cancel", lambda tx: tuning.command(tx, JOB, "cancel", 2.0, new_id))
    assert world.swept() == set()
    db.close()
