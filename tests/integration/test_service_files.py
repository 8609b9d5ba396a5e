"""Files and uploads through the real client, in both dialects: judged, listed, read back, deleted; limits before bytes."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
from openai import APIStatusError, AsyncAzureOpenAI, AsyncOpenAI, AzureOpenAI, BadRequestError, NotFoundError, OpenAI, omit

from disks import small_disk
from kivnun.jobs import files, tuning
from kivnun.jobs.config import ServiceConfig
from kivnun.jobs.files import File
from kivnun.jobs.ids import new_id
from kivnun.service import receiving
from kivnun.service.context import Service
from kivnun.service.judging import AT_ONCE_BYTES, JudgeFiles
from service_parts import KEY, OTHER_KEY, TOY, api, place, service_at

ROW = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "%d"}]}'
GOOD = b"\n".join(ROW % n for n in range(12))
BAD = GOOD + b'\n{"messages": []}\n{"a": 1, "a": 2}\n'


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def other(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key=OTHER_KEY, max_retries=0) as made:
        yield made


def report_of(client: OpenAI, file_id: str) -> dict[str, Any]:
    return client.get(f"/files/{file_id}/x_report", cast_to=dict[str, Any])


def code_of(failed: pytest.ExceptionInfo[APIStatusError]) -> str | None:
    return failed.value.code


def test_a_good_file_is_processed_when_its_upload_is_answered(client: OpenAI) -> None:
    file = client.files.create(file=("train.jsonl", GOOD), purpose="fine-tune")
    assert file.model_dump() == {
        "id": file.id, "object": "file", "bytes": len(GOOD), "created_at": file.created_at, "expires_at": None,
        "filename": "train.jsonl", "purpose": "fine-tune", "status": "processed", "status_details": None,
    }  # fmt: skip
    assert file.id.startswith("file-")
    assert abs(file.created_at - time.time()) < 60
    assert client.files.retrieve(file.id) == file
    assert client.files.wait_for_processing(file.id, poll_interval=0.01) == file
    assert client.files.content(file.id).read() == GOOD
    report = report_of(client, file.id)
    assert (report["file"], report["format"], report["rows"], report["problems"]) == (file.id, "messages", 12, [])


def test_a_bad_file_says_so_at_once_and_line_by_line(client: OpenAI) -> None:
    file = client.files.create(file=("train.jsonl", BAD), purpose="fine-tune")
    assert (file.status, file.status_details) == ("error", "2 problems; the first: line 13: messages is empty")
    assert [(problem["line"], problem["code"]) for problem in report_of(client, file.id)["problems"]] == [
        (13, "invalid_message"), (14, "invalid_json"),
    ]  # fmt: skip


def test_a_larger_file_is_answered_before_it_is_judged(client: OpenAI, service: Service) -> None:
    content = GOOD * (AT_ONCE_BYTES // len(GOOD) + 1) + b"{"
    file = client.files.create(file=("train.jsonl", content), purpose="fine-tune")
    assert file.status == "uploaded"
    assert report_of(client, file.id)["status"] == "uploaded"
    assert JudgeFiles(service).turn()
    judged = client.files.wait_for_processing(file.id, poll_interval=0.01)
    assert judged.status == "error"
    assert report_of(client, file.id)["problems_total"] >= 1
    client.files.delete(file.id)


def test_other_purposes_are_kept_as_they_are(client: OpenAI) -> None:
    content = os.urandom(1000)
    file = client.files.create(file=("picture.png", content), purpose="user_data")
    assert (file.status, client.files.content(file.id).read()) == ("processed", content)
    with pytest.raises(BadRequestError) as failed:
        report_of(client, file.id)
    assert code_of(failed) == "no_report"


def test_a_file_expires_when_its_owner_says(client: OpenAI) -> None:
    file = client.files.create(
        file=("a.bin", b"a"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
    )  # fmt: skip
    assert file.expires_at == file.created_at + 3600
    for seconds in (3599, 2_592_001, -1):
        with pytest.raises(BadRequestError) as failed:
            client.files.create(
                file=("a.bin", b"a"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": seconds}
            )  # fmt: skip
        assert failed.value.param == "expires_after[seconds]"


def test_a_deleted_file_is_gone_and_one_in_use_is_refused(client: OpenAI, service: Service) -> None:
    file = client.files.create(file=("a.jsonl", GOOD), purpose="fine-tune")
    job = tuning.Job(
        id=new_id("ftjob-"), tenant="default", created_at=1.0, model="toy", base="toy", training_file=file.id, method={}, seed=1
    )
    service.db.write("job", lambda tx: tuning.create(tx, job, new_id))
    with pytest.raises(BadRequestError) as failed:
        client.files.delete(file.id)
    assert code_of(failed) == "file_in_use"
    assert job.id in str(failed.value)
    service.db.write("cancel", lambda tx: tuning.command(tx, job, "cancel", 2.0, new_id))
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (file.id, "file", True)
    for call in (client.files.retrieve, client.files.content, client.files.delete, lambda file_id: report_of(client, file_id)):
        with pytest.raises(NotFoundError):
            call(file.id)


def test_another_tenants_file_answers_as_one_that_is_not_there(client: OpenAI, other: OpenAI) -> None:
    file = client.files.create(file=("a.jsonl", GOOD), purpose="fine-tune")
    upload = client.uploads.create(filename="a", bytes=3, purpose="user_data", mime_type="text/plain")
    part = client.uploads.parts.create(upload.id, data=b"abc")

    def answers(file_id: str, upload_id: str) -> list[tuple[int, object]]:
        calls = (
            lambda: other.files.retrieve(file_id),
            lambda: other.files.content(file_id),
            lambda: other.files.delete(file_id),
            lambda: report_of(other, file_id),
            lambda: other.uploads.parts.create(upload_id, data=b"abc"),
            lambda: other.uploads.complete(upload_id, part_ids=[part.id]),
            lambda: other.uploads.cancel(upload_id),
        )
        told: list[tuple[int, object]] = []
        for call in calls:
            with pytest.raises(APIStatusError) as failed:
                call()
            text = json.dumps(failed.value.body).replace(file_id, "ID").replace(upload_id, "ID")
            told.append((failed.value.status_code, text))
        return told

    assert answers(file.id, upload.id) == answers("file-" + "0" * 24, "upload_" + "0" * 24)
    assert {status for status, _ in answers(file.id, upload.id)} == {404}
    assert file.id not in [listed.id for listed in other.files.list()]
    assert client.files.retrieve(file.id) == file


def test_files_are_listed_in_pages_orders_and_purposes(url: str, other: OpenAI) -> None:
    made = [other.files.create(file=(f"{n}", b"x"), purpose="batch" if n == 1 else "user_data").id for n in range(4)]
    assert [file.id for file in other.files.list(limit=3)] == made[::-1], "the client turns the pages by itself"
    assert [file.id for file in other.files.list(order="asc", limit=2)] == made
    assert [file.id for file in other.files.list(purpose="batch")] == [made[1]]
    assert [file.id for file in other.files.list(after=made[2])] == made[1::-1]
    for wrong in ({"limit": 0}, {"limit": 10_001}, {"order": "up"}, {"limit": "many"}):
        answer = httpx.get(f"{url}/v1/files", params=wrong, headers={"authorization": f"Bearer {OTHER_KEY}"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(wrong)))


@pytest.mark.parametrize(
    ("header", "status", "start", "end"),
    [("bytes=0-0", 206, 0, 1), ("bytes=5-", 206, 5, None), ("bytes=-3", 206, -3, None), ("bytes=2-99999", 206, 2, None),
     ("bytes=0-1,3-4", 200, 0, None), ("lines=1-2", 200, 0, None), ("bytes=-", 200, 0, None)],
)  # fmt: skip
def test_a_range_of_a_file_is_answered(client: OpenAI, url: str, header: str, status: int, start: int, end: int | None) -> None:
    file = client.files.create(file=("a.jsonl", GOOD), purpose="user_data")
    answer = httpx.get(f"{url}/v1/files/{file.id}/content", headers={"authorization": f"Bearer {KEY}", "range": header})
    assert (answer.status_code, answer.content) == (status, GOOD[start:end])


def test_a_range_outside_the_file_is_refused(client: OpenAI, url: str) -> None:
    file = client.files.create(file=("a.jsonl", GOOD), purpose="user_data")
    answer = httpx.get(f"{url}/v1/files/{file.id}/content", headers={"authorization": f"Bearer {KEY}", "range": "bytes=99999-"})
    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{len(GOOD)}")


def test_results_are_base64_for_openais_clients_and_raw_for_azures(client: OpenAI, url: str, service: Service) -> None:
    for rows in (GOOD, GOOD[:-1], GOOD[:-2], b"", os.urandom(3 << 20)):
        blob = service.blobs.put_bytes("default", rows)
        file = File(new_id("file-"), "default", 1.0, "fine-tune-results", "step_metrics.csv", len(rows), blob, "processed")
        service.db.write("add", lambda tx, file=file: files.add(tx, file))
        assert base64.b64decode(client.files.content(file.id).read(), validate=True) == rows
        headers = {"api-key": KEY}
        assert httpx.get(f"{url}/openai/files/{file.id}/content?api-version=2024-10-21", headers=headers).content == rows
        assert httpx.get(f"{url}/v1/files/{file.id}/content?encoding=raw", headers=headers).content == rows
        coded = httpx.get(f"{url}/openai/v1/files/{file.id}/content?encoding=base64", headers=headers)
        assert base64.b64decode(coded.content) == rows
        service.db.write("delete", lambda tx, file=file: files.delete(tx, file.id, "default", 2.0))


def test_azures_clients_upload_list_and_delete_too(url: str) -> None:
    with AzureOpenAI(azure_endpoint=url, api_key=KEY, api_version="2024-10-21", max_retries=0) as azure:
        file = azure.files.create(file=("train.jsonl", b"\xef\xbb\xbf" + GOOD), purpose="fine-tune")
        assert file.status == "processed"
        assert azure.files.list(limit=1).data == [file]
        with pytest.raises(BadRequestError) as failed:
            azure.post("/files/import", body={"purpose": "fine-tune", "filename": "a", "content_url": "http://x"}, cast_to=object)
        assert code_of(failed) == "unsupported"
        assert "/uploads" in str(failed.value)
        assert azure.files.delete(file.id).deleted
        with pytest.raises(NotFoundError) as gone:
            azure.files.retrieve(file.id)
        assert gone.value.body == {**gone.value.body, "innererror": {"code": "not_found"}}  # type: ignore[dict-item]


def test_asynchronous_clients_of_both_dialects_do_the_same(url: str) -> None:
    async def life(client: AsyncOpenAI) -> None:
        async with client:
            file = await client.files.create(file=("a.jsonl", GOOD), purpose="fine-tune")
            assert (await client.files.wait_for_processing(file.id, poll_interval=0.01)).status == "processed"
            assert (await client.files.content(file.id)).read() == GOOD
            assert (await client.files.delete(file.id)).deleted

    async def both() -> None:
        await asyncio.gather(
            life(AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY)),
            life(AsyncAzureOpenAI(azure_endpoint=url, api_key=KEY, api_version="2024-10-21")),
        )

    asyncio.run(both())


NAMES = ["../../etc/passwd", "a\r\nx: y.jsonl", "nul\x00.jsonl", "x" * 4096, "\u202egnp.exe", "נתונים 😀.jsonl", '"; x="']


@pytest.mark.parametrize("name", NAMES)
def test_whatever_a_file_is_called_its_name_is_safe_in_the_answers(client: OpenAI, url: str, service: Service, name: str) -> None:
    file = client.files.create(file=(name, b"x"), purpose="user_data")
    assert len(file.filename) <= 255
    assert not set("/\\\r\n\x00\u202e") & set(file.filename)
    answer = httpx.get(f"{url}/v1/files/{file.id}/content", headers={"authorization": f"Bearer {KEY}"})
    assert answer.content == b"x"
    assert "x" not in answer.headers
    assert answer.headers["content-disposition"].startswith('attachment; filename="')
    assert not [path for path in service.scratch.parent.rglob("*") if "passwd" in path.name]


def test_what_a_file_says_is_in_no_report_and_no_log(client: OpenAI, caplog: pytest.LogCaptureFixture) -> None:
    canary = "canaryXq7"
    lines = [
        {"messages": [{"role": "user", "content": canary}]}, {"messages": [{"role": canary, "content": "a"}]},
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": canary, "type": canary, "function": canary}]}]},
        {"prompt": canary}, {"custom_id": canary, "method": canary, "url": canary, "body": canary}, [canary], canary,
    ]  # fmt: skip
    content = "\n".join(json.dumps(line) for line in lines) + f'\n{{"a": "{canary}\n{{"{canary[:3]}": NaN}}'
    with caplog.at_level("DEBUG"):
        for purpose in ("fine-tune", "batch"):
            file = client.files.create(file=(f"{canary}.jsonl", content.encode()), purpose=purpose)  # type: ignore[arg-type]
            assert file.status == "error"
            assert canary not in json.dumps(report_of(client, file.id)) + str(file.status_details)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("kivnun", "uvicorn", "sqlalchemy"))]
    assert canary not in "\n".join(ours)


# --- sent again ------------------------------------------------------------------------------------------------------------------


@contextmanager
def losing_answers(url: str, lost: int) -> Iterator[OpenAI]:
    """Give a client whose connection breaks after the server has answered, the first `lost` times."""
    left = [lost]

    class Losing(httpx2.HTTPTransport):
        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            answer = super().handle_request(request)
            if left[0]:
                left[0] -= 1
                answer.close()
                raise httpx2.ReadError("the answer was lost", request=request)
            return answer

    with OpenAI(base_url=f"{url}/v1", api_key=KEY, http_client=httpx2.Client(transport=Losing())) as client:
        yield client


def test_an_upload_whose_answer_was_lost_twice_is_one_file(url: str, client: OpenAI) -> None:
    with losing_answers(url, 2) as unlucky:
        file = unlucky.files.create(file=("again.jsonl", GOOD), purpose="fine-tune")
    assert [listed.id for listed in client.files.list() if listed.filename == "again.jsonl"] == [file.id]
    assert client.files.create(file=("again.jsonl", GOOD), purpose="fine-tune").id != file.id, "no retry: a new wish"


def test_uploads_and_parts_whose_answers_were_lost_are_one_each(url: str, service: Service) -> None:
    def kept() -> int:
        return service.db.read(lambda tx: files.storage_of(tx, "default")).bytes

    before = kept()
    with losing_answers(url, 1) as unlucky:
        upload = unlucky.uploads.create(filename="a.txt", bytes=6, purpose="user_data", mime_type="text/plain")
    with losing_answers(url, 2) as unlucky:
        part = unlucky.uploads.parts.create(upload.id, data=b"abcdef")
    assert kept() == before + 6
    with losing_answers(url, 2) as unlucky:
        done = unlucky.uploads.complete(upload.id, part_ids=[part.id])
    assert done.status == "completed"
    assert kept() == before + 6


def test_a_part_equal_to_one_before_whose_first_post_never_came_is_that_one_again(client: OpenAI) -> None:
    upload = client.uploads.create(filename="a.txt", bytes=6, purpose="user_data", mime_type="text/plain")
    retried: dict[str, str] = {"x-stainless-retry-count": "1"}
    parts = [client.uploads.parts.create(upload.id, data=b"abc", extra_headers=headers).id for headers in ({}, retried)]
    done = client.uploads.complete(upload.id, part_ids=parts, md5=hashlib.md5(b"abcabc").hexdigest())
    assert done.file is not None
    assert client.files.content(done.file.id).read() == b"abcabc"


def test_an_idempotency_key_is_one_file_and_another_files_is_refused(client: OpenAI) -> None:
    key = {"Idempotency-Key": "upload-1"}
    first = client.files.create(file=("a.jsonl", GOOD), purpose="fine-tune", extra_headers=key)
    assert client.files.create(file=("a.jsonl", GOOD), purpose="fine-tune", extra_headers=key) == first
    with pytest.raises(APIStatusError) as failed:
        client.files.create(file=("a.jsonl", BAD), purpose="fine-tune", extra_headers=key)
    assert (failed.value.status_code, code_of(failed)) == (422, "idempotency_key_reused")


# --- limits ----------------------------------------------------------------------------------------------------------------------


def limited(tmp_path: Path, **limits: int) -> Service:
    return service_at(place(tmp_path), TOY.model_copy(update={"limits": ServiceConfig().limits.model_copy(update=limits)}))


def refused(url: str, content: bytes | Iterator[bytes], **headers: str) -> httpx.Response:
    body = content if isinstance(content, bytes) else (piece for piece in content)
    sent = {"authorization": f"Bearer {KEY}", "content-type": "multipart/form-data; boundary=b", **headers}
    return httpx.post(f"{url}/v1/files", content=body, headers=sent, timeout=30)


def form(content: bytes, purpose: str = "user_data") -> bytes:
    head = f'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n--b\r\n'
    return head.encode() + b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + content + b"\r\n--b--\r\n"


def test_a_file_over_a_limit_is_refused_whether_or_not_its_length_is_declared(tmp_path: Path) -> None:
    service = limited(tmp_path, file_bytes=100_000, storage_bytes=150_000, files=2)
    with api(service) as url:
        small, large = form(b"x" * 90_000), form(b"x" * 100_001)
        told = refused(url, large)
        assert (told.status_code, told.json()["error"]["code"]) == (413, "file_too_large")
        told = refused(url, form(b"x" * 5_000_000))
        assert (told.status_code, told.json()["error"]["code"]) == (413, "file_too_large")
        told = refused(url, iter([large[:50_000], large[50_000:]]))
        assert (told.status_code, told.json()["error"]["code"]) == (413, "file_too_large")
        assert refused(url, small).status_code == 200
        for body in (small, iter([small])):
            told = refused(url, body)
            assert (told.status_code, told.json()["error"]["code"]) == (400, "insufficient_storage")
        assert refused(url, form(b"x")).status_code == 200
        told = refused(url, form(b"x"))
        assert (told.status_code, told.json()["error"]["code"]) == (400, "insufficient_storage")
        assert "2 files" in told.json()["error"]["message"]
    assert not list(service.scratch.iterdir())
    service.db.close()


def test_a_disk_that_fills_up_is_told_and_keeps_no_torn_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        (tmp_path / "service").mkdir()
        service = replace(service_at(place(tmp_path / "service")), scratch=disk)
        with api(service) as url:
            told = refused(url, form(b"x" * 1000))
            assert (told.status_code, told.json()["error"]["code"]) == (507, "insufficient_storage"), "before a byte is accepted"
            monkeypatch.setattr(receiving, "SPARE_BYTES", 0)
            content = form(os.urandom(6 << 20))
            told = refused(url, iter([content[at : at + 100_000] for at in range(0, len(content), 100_000)]))
            assert (told.status_code, told.json()["error"]["code"]) == (507, "insufficient_storage"), "in the middle"
            assert told.headers["x-should-retry"] == "false"
            assert not list(disk.iterdir())
            assert refused(url, form(b"x" * 1000)).status_code == 200
        assert len(list(service.blobs.names())) == 1
        service.db.close()


# --- uploads ---------------------------------------------------------------------------------------------------------------------


def test_the_clients_own_chunked_upload_becomes_one_judged_file(client: OpenAI, service: Service) -> None:
    content = GOOD + b"\n" + b"\n".join(ROW % n for n in range(100, 2000))
    upload = client.uploads.upload_file_chunked(
        file=content, filename="train.jsonl", bytes=len(content), mime_type="text/jsonl", purpose="fine-tune", part_size=50_000,
        md5=hashlib.md5(content).hexdigest(),
    )  # fmt: skip
    assert upload.status == "completed"
    assert upload.file is not None
    assert (upload.file.status, upload.file.bytes, upload.file.filename) == ("processed", len(content), "train.jsonl")
    assert client.files.content(upload.file.id).read() == content
    assert not list(service.scratch.iterdir())


def test_parts_are_put_together_in_the_order_of_their_ids_and_completing_again_answers_the_same(client: OpenAI) -> None:
    upload = client.uploads.create(
        filename="a.txt", bytes=6, purpose="user_data", mime_type="text/plain",
        expires_after={"anchor": "created_at", "seconds": 7200},
    )  # fmt: skip
    assert (upload.status, upload.file, upload.expires_at) == ("pending", None, upload.created_at + 3600)
    parts = [client.uploads.parts.create(upload.id, data=data) for data in (b"def", b"unused", b"abc")]
    assert (parts[0].object, parts[0].upload_id) == ("upload.part", upload.id)
    ids = [parts[2].id, parts[0].id]
    first = client.uploads.complete(upload.id, part_ids=ids)
    assert first.file is not None
    assert client.files.content(first.file.id).read() == b"abcdef"
    assert first.file.expires_at == first.file.created_at + 7200
    assert client.uploads.complete(upload.id, part_ids=ids) == first
    for call in (lambda: client.uploads.cancel(upload.id), lambda: client.uploads.parts.create(upload.id, data=b"x")):
        with pytest.raises(BadRequestError) as failed:
            call()
        assert code_of(failed) == "upload_not_pending"


def test_completing_one_upload_many_times_at_once_is_done_once_and_keeps_nobody_else_waiting(
    url: str, client: OpenAI, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = client.uploads.create(filename="a.txt", bytes=3, purpose="user_data", mime_type="text/plain")
    part = client.uploads.parts.create(upload.id, data=b"abc")
    may_go_on, reads, real = threading.Event(), list[str](), service.blobs.read

    def slow(name: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        reads.append(name)
        assert may_go_on.wait(30)
        return real(name, start, length)

    monkeypatch.setattr(service.blobs, "read", slow)

    async def all_at_once() -> list[httpx.Response]:
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=f"{url}/v1", headers=headers, timeout=20, limits=httpx.Limits()) as asking:
            route = f"/uploads/{upload.id}/complete"
            asked = [asyncio.create_task(asking.post(route, json={"part_ids": [part.id]})) for _ in range(60)]
            try:
                while not reads:
                    await asyncio.sleep(0.01)
                for path in ("/files", "/models"):
                    assert (await asking.get(path, timeout=5)).status_code == 200
                assert (await asking.get(url + "/ready", timeout=5)).status_code == 200
            finally:
                may_go_on.set()
                answers = await asyncio.gather(*asked)
            return answers

    answers = asyncio.run(all_at_once())
    assert {(answer.status_code, answer.json()["file"]["id"]) for answer in answers} == {(200, answers[0].json()["file"]["id"])}
    assert len(reads) == 1


def test_an_upload_that_is_not_what_was_declared_is_not_completed(client: OpenAI, service: Service) -> None:
    upload = client.uploads.create(filename="a.txt", bytes=6, purpose="user_data", mime_type="text/plain")
    parts = [client.uploads.parts.create(upload.id, data=data).id for data in (b"abc", b"def")]
    for part_ids, md5, code in (
        (parts[:1], None, "upload_size_mismatch"),
        ([*parts, "part_x"], None, "invalid_value"),
        ([], None, "invalid_value"),
        (parts, "0" * 32, "checksum_mismatch"),
        (parts, "no md5", "invalid_value"),
    ):
        with pytest.raises(BadRequestError) as failed:
            client.uploads.complete(upload.id, part_ids=part_ids, md5=omit if md5 is None else md5)
        assert code_of(failed) == code
    assert client.uploads.complete(upload.id, part_ids=parts, md5=hashlib.md5(b"abcdef").hexdigest().upper()).status == "completed"
    assert not list(service.scratch.iterdir())


def test_a_cancelled_upload_stays_so(client: OpenAI) -> None:
    upload = client.uploads.create(filename="a.txt", bytes=6, purpose="user_data", mime_type="text/plain")
    part = client.uploads.parts.create(upload.id, data=b"abcdef")
    assert client.uploads.cancel(upload.id).status == "cancelled"
    assert client.uploads.cancel(upload.id).status == "cancelled"
    with pytest.raises(BadRequestError) as failed:
        client.uploads.complete(upload.id, part_ids=[part.id])
    assert code_of(failed) == "upload_not_pending"


def test_uploads_that_are_wrong_or_too_large_are_refused_before_they_begin(client: OpenAI) -> None:
    good: dict[str, Any] = {"filename": "a", "bytes": 6, "purpose": "user_data", "mime_type": "text/plain"}
    for wrong, status, param in (
        ({"bytes": 0}, 400, "bytes"), ({"bytes": True}, 400, "bytes"), ({"bytes": (8 << 30) + 1}, 413, "bytes"),
        ({"purpose": "evil"}, 400, "purpose"), ({"filename": ""}, 400, "filename"), ({"mime_type": "a\r\nb: c"}, 400, "mime_type"),
        ({"expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "expires_after.seconds"), ({"more": 1}, 400, "more"),
    ):  # fmt: skip
        with pytest.raises(APIStatusError) as failed:
            client.post("/uploads", body={**good, **wrong}, cast_to=object)
        assert (failed.value.status_code, failed.value.param) == (status, param)


def test_a_part_over_its_limit_is_refused(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    from kivnun.service.api import uploads

    monkeypatch.setattr(uploads, "MAX_PART_BYTES", 1000)
    upload = client.uploads.create(filename="a.txt", bytes=6, purpose="user_data", mime_type="text/plain")
    with pytest.raises(APIStatusError) as failed:
        client.uploads.parts.create(upload.id, data=b"x" * 1001)
    assert (failed.value.status_code, code_of(failed)) == (413, "file_too_large")
    with pytest.raises(BadRequestError):
        client.uploads.parts.create(upload.id, data=b"")
