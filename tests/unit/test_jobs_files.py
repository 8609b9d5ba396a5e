"""Files and uploads as rows, on both databases: pages without gaps, no other tenant's rows, room counted, users known."""

from __future__ import annotations

import time
from dataclasses import replace

import sqlalchemy as sa

from kivnun.jobs import files, tuning, uploads
from kivnun.jobs.database import Database
from kivnun.jobs.files import File, Storage
from kivnun.jobs.ids import new_id
from kivnun.jobs.schema import files as files_table
from kivnun.jobs.uploads import Part, Upload

FILE = File("file-0", "default", 1.0, "fine-tune", "a.jsonl", 10, "default/" + "0" * 64)
JOB = tuning.Job(id="ftjob-1", tenant="default", created_at=1.0, model="toy", base="toy", training_file="file-0", method={}, seed=1)
UPLOAD = Upload("upload_1", "default", 1.0, 3601.0, "fine-tune", "a.jsonl", "text/jsonl", 7)


def test_files_are_paged_in_both_orders_within_a_tenant_and_a_purpose(db: Database) -> None:
    for n in range(5):
        purpose = "batch" if n == 2 else "fine-tune"
        db.write(
            "add", lambda tx, n=n, p=purpose: files.add(tx, replace(FILE, id=f"file-{n}", created_at=float(n // 2), purpose=p))
        )
    db.write("add", lambda tx: files.add(tx, replace(FILE, id="file-x", tenant="other")))

    def ids(after: str | None, order: files.Order = "desc", purpose: str | None = None) -> tuple[list[str], bool]:
        found, more = db.read(lambda tx: files.page(tx, "default", 2, after, order, purpose))
        return [file.id for file in found], more

    assert ids(None) == (["file-4", "file-3"], True)
    assert ids("file-3") == (["file-2", "file-1"], True)
    db.write("delete", lambda tx: files.delete(tx, "file-1", "default", 9.0))
    assert ids("file-1") == (["file-0"], False), "a file that was deleted meanwhile still marks its place"
    assert ids(None, "asc") == (["file-0", "file-2"], True)
    assert ids("file-2", "asc") == (["file-3", "file-4"], False)
    assert ids(None, purpose="batch") == (["file-2"], False)
    assert ids("file-x") == ([], False)


def test_no_function_finds_marks_or_deletes_another_tenants_file(db: Database) -> None:
    db.write("add", lambda tx: files.add(tx, FILE))
    assert db.read(lambda tx: files.find(tx, "file-0", "other")) is None
    db.write("mark", lambda tx: files.mark(tx, "file-0", "other", "error"))
    db.write("delete", lambda tx: files.delete(tx, "file-0", "other", 2.0))
    assert db.read(lambda tx: files.find(tx, "file-0", "default")) == FILE


def test_a_file_is_in_use_until_its_job_ends(db: Database) -> None:
    db.write("add", lambda tx: files.add(tx, FILE))
    db.write("job", lambda tx: tuning.create(tx, JOB, new_id))
    assert db.read(lambda tx: files.user_of(tx, "file-0", "default")) == "ftjob-1"
    assert db.read(lambda tx: files.user_of(tx, "file-0", "other")) is None
    db.write("cancel", lambda tx: tuning.command(tx, JOB, "cancel", 2.0, new_id))
    assert db.read(lambda tx: files.user_of(tx, "file-0", "default")) is None


def test_room_counts_files_that_are_there_and_parts_of_uploads_that_are_open(db: Database) -> None:
    db.write("add", lambda tx: files.add(tx, FILE))
    db.write("add", lambda tx: files.add(tx, replace(FILE, id="file-1")))
    db.write("add", lambda tx: files.add(tx, replace(FILE, id="file-x", tenant="other")))
    db.write("upload", lambda tx: uploads.add(tx, UPLOAD))
    for n in range(2):
        db.write("part", lambda tx, n=n: uploads.add_part(tx, Part(f"part_{n}", UPLOAD.id, time.time(), 5, FILE.blob)))
    assert db.read(lambda tx: files.storage_of(tx, "default")) == Storage(2, 30)
    db.write("end", lambda tx: uploads.end(tx, UPLOAD, "cancelled"))
    db.write("delete", lambda tx: files.delete(tx, "file-1", "default", 2.0))
    assert db.read(lambda tx: files.storage_of(tx, "default")) == Storage(1, 10)
    row = db.read(lambda tx: tx.execute(sa.select(files_table).where(files_table.c.id == "file-1")).one())
    assert (row.filename, row.deleted_at, row.bytes) == ("", 2.0, 10), "what it was called is forgotten"
    assert db.read(lambda tx: uploads.parts_of(tx, UPLOAD.id)) == {}
    assert db.read(lambda tx: uploads.find(tx, UPLOAD.id, "default")) == replace(UPLOAD, status="cancelled")
    assert db.read(lambda tx: uploads.find(tx, UPLOAD.id, "other")) is None
