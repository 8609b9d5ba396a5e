"""One contract for every blob store: a folder, and a bucket behind a real server that speaks S3's protocol."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from kivnun.errors import IntegrityError, SpecError
from kivnun.jobs.blobs import PIECE_BYTES, BlobStore, FolderBlobs
from kivnun.jobs.errors import StoreDown
from kivnun.jobs.place import Place
from kivnun.jobs.s3 import S3Blobs
from s3_server import BUCKET, s3_server, s3_url_of
from service_parts import KEY, api, place, service_at


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    """Return the URL of a prefix in an empty bucket of a server that runs as long as this module's tests."""
    with s3_server() as port:
        yield s3_url_of(port)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    url = f"file://{tmp_path / 'blobs'}" if request.param == "folder" else request.getfixturevalue("s3_url")
    return Place(tmp_path, "sqlite://", url).blobs()


def content(store: BlobStore, name: str, start: int = 0, length: int | None = None) -> bytes:
    return b"".join(store.read(name, start, length))


def test_what_is_put_is_read_back_whole_and_by_ranges(store: BlobStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(9 * PIECE_BYTES + 5))  # more than one part of S3's
    name = store.put("tenant", source)
    assert name == f"tenant/{hashlib.sha256(source.read_bytes()).hexdigest()}"
    assert content(store, name) == source.read_bytes()
    assert {len(piece) for piece in store.read(name)} == {PIECE_BYTES, 5}
    for start, length in (
        (0, 1),
        (5, PIECE_BYTES),
        (8 * PIECE_BYTES - 1, 2),
        (9 * PIECE_BYTES + 4, 100),
        (10 * PIECE_BYTES, 1),
        (3, 0),
    ):
        assert content(store, name, start, length) == source.read_bytes()[start : start + length]
    target = tmp_path / "target"
    store.fetch(name, target)
    assert target.read_bytes() == source.read_bytes()
    assert source.exists()


def test_a_file_that_is_taken_is_kept_and_gone_from_where_it_was(store: BlobStore, tmp_path: Path) -> None:
    for _ in range(2):  # the second time it is there already
        source = tmp_path / "source"
        source.write_bytes(b"taken")
        name = store.take("tenant", source, hashlib.sha256(b"taken").hexdigest())
        assert content(store, name) == b"taken"
        assert not source.exists()


def test_an_empty_blob_is_a_blob(store: BlobStore) -> None:
    name = store.put_bytes("tenant", b"")
    assert store.has(name)
    assert content(store, name) == b""


def test_the_same_content_is_one_blob_of_each_tenant_and_deleted_for_one_alone(store: BlobStore) -> None:
    names = {store.put_bytes(tenant, b"the same") for tenant in ("one", "two", "one")}
    assert len(names) == 2
    listed = {name for name, _ in store.names()}
    assert names <= listed
    first, second = sorted(names)
    store.delete(first)
    store.delete(first)
    assert (store.has(first), store.has(second)) == (False, True)
    for read in (lambda: content(store, first), lambda: store.fetch(first, Path("/dev/null/never"))):
        with pytest.raises((IntegrityError, OSError)):
            read()


def test_a_blob_is_erased_only_if_it_was_last_put_before(store: BlobStore) -> None:
    name = store.put_bytes("tenant", b"old or young")
    (written,) = [at for listed, at in store.names() if listed == name]
    assert abs(written - time.time()) < 60
    assert not store.erase(name, written - 1)
    assert store.has(name)
    assert store.erase(name, written + 2)
    assert not store.has(name)
    assert store.erase(name, written + 2), "one that is not there is gone"


def test_nothing_but_a_blobs_name_is_a_path(store: BlobStore) -> None:
    for name in ("../x", "tenant/../../etc/passwd", f"tenant/{'A' * 64}", f"/{'0' * 64}", f"a b/{'0' * 64}", ""):
        with pytest.raises(IntegrityError, match="not a blob's name"):
            store.has(name)


def test_every_put_of_new_content_is_heard_of_and_no_other(tmp_path: Path, s3_url: str) -> None:
    for url in (f"file://{tmp_path / 'blobs'}", s3_url):
        heard: list[str] = []
        store = Place(tmp_path, "sqlite://", url).blobs(heard.append)
        for _ in range(2):
            store.put_bytes("watched", b"heard once")
        assert heard == ["before blob", "after blob"]


# --- the folder's own ------------------------------------------------------------------------------------------------------------


def test_a_put_of_an_old_blob_waits_for_who_erases_it_and_writes_it_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderBlobs(tmp_path)
    name = store.put_bytes("tenant", b"about to be named")
    os.utime(next(tmp_path.glob("tenant/??/*")), (1.0, 1.0))
    writer = threading.Thread(target=store.put_bytes, args=("tenant", b"about to be named"))
    unlink = Path.unlink

    def late(path: Path, missing_ok: bool = False) -> None:
        monkeypatch.undo()
        writer.start()
        writer.join(0.1)
        assert writer.is_alive(), "between the look and the unlinking nobody makes it young"
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", late)
    assert store.erase(name, time.time() - 60)
    writer.join(10)
    assert content(store, name) == b"about to be named"


def test_what_killed_writers_left_in_a_folder_is_cleared_once_it_is_old(tmp_path: Path) -> None:
    store = FolderBlobs(tmp_path)
    name = store.put_bytes("tenant", b"whole")
    folder = next(tmp_path.glob("tenant/??"))
    (folder / ".partial-old").write_bytes(b"half")
    os.utime(folder / ".partial-old", (1.0, 1.0))
    (folder / ".partial-new").write_bytes(b"half")
    assert [listed for listed, _ in store.names()] == [name]
    store.clear_leftovers(time.time() - 60)
    assert sorted(path.name for path in folder.iterdir()) == sorted([".partial-new", name.partition("/")[2]])


# --- the bucket's own ------------------------------------------------------------------------------------------------------------


def test_putting_an_old_object_again_makes_it_young(s3_url: str) -> None:
    heard: list[str] = []
    store = S3Blobs(s3_url, heard.append, clock=lambda: time.time() + 3600)
    for _ in range(2):
        store.put_bytes("renewed", b"old at once by this clock")
    assert len(heard) == 4


def test_objects_of_others_in_the_bucket_are_left_alone(s3_url: str) -> None:
    endpoint = s3_url.partition("endpoint=")[2].partition("&")[0]
    assert httpx.put(f"{endpoint}/{BUCKET}/a/prefix/somebody/else.txt", content=b"x").status_code == 200
    names = [name for name, _ in S3Blobs(s3_url).names()]
    assert "somebody/else.txt" not in names


def test_a_server_that_is_not_there_is_an_outage_soon(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"s3://{BUCKET}?endpoint=http://127.0.0.1:{taken.getsockname()[1]}&region=x&access_key_id=a&secret_access_key=secret-words"
        store = S3Blobs(url)
        began = time.monotonic()
        for call in (lambda: store.has("t/" + "0" * 64), lambda: store.put_bytes("t", b"x"), lambda: list(store.names())):
            with pytest.raises(StoreDown, match="does not answer") as failed:
                call()
            assert "secret-words" not in str(failed.value)
        assert time.monotonic() - began < 20


def test_a_bucket_that_is_not_there_is_an_outage_that_loses_nothing(s3_url: str) -> None:
    with pytest.raises((StoreDown, IntegrityError)):
        S3Blobs(s3_url.replace(BUCKET, "no-such-bucket")).put_bytes("t", b"x")


def test_address_and_credentials_may_be_those_of_the_environment(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_url.partition("endpoint=")[2].partition("&")[0])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    name = S3Blobs(f"s3://{BUCKET}").put_bytes("environment", b"x")
    assert name in [listed for listed, _ in S3Blobs(f"s3://{BUCKET}").names()]


@pytest.mark.parametrize("url", ["s3://", "s3:///prefix", "s3://bucket?endpont=http://x"])
def test_a_wrong_url_is_refused_with_what_is_right(url: str) -> None:
    with pytest.raises(SpecError, match="--store"):
        S3Blobs(url)


# --- the API over a bucket -------------------------------------------------------------------------------------------------------


def test_files_live_in_a_bucket_as_in_a_folder_and_an_outage_is_a_503_that_may_be_retried(tmp_path: Path, s3_url: str) -> None:
    made = place(tmp_path)
    row = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
    service = service_at(replace(made, store_url=s3_url))
    headers = {"authorization": f"Bearer {KEY}"}
    with api(service) as url, OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        file = client.files.create(file=("a.jsonl", row), purpose="fine-tune")
        assert file.status == "processed"
        assert client.files.content(file.id).read() == row
        assert httpx.get(f"{url}/v1/files/{file.id}/content", headers={**headers, "range": "bytes=2-9"}).content == row[2:10]
        assert httpx.get(f"{url}/v1/files/{file.id}/x_report", headers=headers).json()["rows"] == 1
        upload = client.uploads.upload_file_chunked(
            file=row, filename="a", bytes=len(row), mime_type="text/plain", purpose="user_data", part_size=40
        )
        assert upload.file is not None
        assert client.files.content(upload.file.id).read() == row
    assert not list(service.scratch.iterdir())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"endpoint=http://127.0.0.1:{taken.getsockname()[1]}&"
        down = service_at(replace(made, store_url=re.sub(r"endpoint=[^&]*&", endpoint, s3_url)))
        with api(down) as url:
            answer = httpx.get(f"{url}/v1/files/{file.id}/content", headers=headers, timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
    assert int(answer.headers["retry-after-ms"]) > 0
    service.db.close()
    down.db.close()
