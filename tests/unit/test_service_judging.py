"""What an upload is told of its lines: each rule by its code, all problems by line, within a bound of time and memory."""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kivnun.errors import StorageError
from kivnun.jobs import files, leases
from kivnun.jobs.files import File
from kivnun.service import judging
from kivnun.service.context import Service
from kivnun.service.judging import MAX_SHOWN, Findings, JudgeFiles, judge
from kivnun.service.problem_codes import CODES
from service_parts import place, service_at

USER = {"role": "user", "content": "q"}
REPLY = {"role": "assistant", "content": "a"}
ANSWER = {"role": "tool", "tool_call_id": "c1", "content": "x"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def pair(better: Any, worse: Any, **more: Any) -> dict[str, Any]:
    return {"input": {"messages": [USER], **more}, "preferred_output": better, "non_preferred_output": worse}


def found(path: Path, content: bytes, purpose: str = "fine-tune") -> Findings:
    path.write_bytes(content)
    findings = judge(path, purpose)
    assert findings is not None
    return findings


def codes(findings: Findings) -> list[str]:
    return [problem["code"] for problem in findings.shown]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.jsonl"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"messages": "\xff"}', "invalid_encoding"),
        (b'{"messages": "\x00"}', "invalid_encoding"),
        (rb'{"messages": [{"role": "user", "content": "\u0000"}]}', "invalid_encoding"),
        (b'\xef\xbb\xbf{"messages": []}', "invalid_encoding"),
        (b"{", "invalid_json"),
        (b"[1]", "invalid_json"),
        (b"null", "invalid_json"),
        (b'{"a": 1, "a": 2}', "invalid_json"),
        (b'{"a": NaN}', "invalid_json"),
        (b'{"a": -Infinity}', "invalid_json"),
        (b'{"a": 1e999}', "invalid_json"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "invalid_json"),
        (b"[" * 1_000_000, "invalid_json"),
        (rb'{"a": "\ud800"}', "invalid_json"),
        (b'{"a": 1}\r{"a": 2}', "invalid_json"),
        (b"{}", "invalid_row"),
        (chat(USER), "missing_assistant"),
        (chat(USER, REPLY, USER), "missing_assistant"),
        (chat(USER, {"role": "asistant", "content": "a"}), "invalid_role"),
        (chat({"role": "function", "name": "f", "content": "a"}, REPLY), "invalid_role"),
        (chat(), "invalid_message"),
        (chat(USER, {"role": "assistant", "content": 3}), "invalid_message"),
        (chat(USER, REPLY, extra=1), "unrecognized_key"),
        (chat(USER, REPLY | {"wieght": 1}), "unrecognized_key"),
        (chat(USER, REPLY | {"audio": {"id": "a"}}), "unrecognized_key"),
        (chat(USER, REPLY | {"weight": 0.5}), "invalid_weight"),
        (chat(USER | {"weight": 1}, REPLY), "invalid_weight"),
        (chat(USER, REPLY | {"weight": 0}), "invalid_weight"),
        (chat(USER, {"role": "assistant", "tool_calls": []}), "invalid_tool_call"),
        (chat(USER, {"role": "tool", "content": "x", "tool_call_id": "c9"}, REPLY), "invalid_tool_call"),
        (chat(USER, REPLY, tools=[{"type": "function"}]), "invalid_tool_call"),
        (chat(USER, REPLY, parallel_tool_calls="yes"), "invalid_tool_call"),
        (chat({"role": "user", "content": [IMAGE]}, REPLY), "invalid_image"),
        ({"prompt": "", "completion": "a"}, "invalid_prompt"),
        ({"prompt": "a", "completion": 3}, "invalid_prompt"),
        (pair([REPLY], [REPLY]), "invalid_preference"),
        (pair([REPLY, REPLY], [REPLY | {"content": "b"}]), "invalid_preference"),
        (pair([USER], [REPLY]), "invalid_preference"),
        ({"preferred_output": [REPLY], "non_preferred_output": [REPLY]}, "invalid_preference"),
    ],
)
def test_a_broken_rule_has_its_code(path: Path, line: bytes | dict[str, Any], code: str) -> None:
    content = line if isinstance(line, bytes) else json.dumps(line).encode()
    began = time.process_time()
    findings = found(path, json.dumps(chat(USER, REPLY)).encode() + b"\n" + content + b"\n")
    assert time.process_time() - began < 1
    if code not in ("invalid_prompt", "invalid_preference"):
        assert set(codes(findings)) == {code}
        assert {problem["line"] for problem in findings.shown} == {2}
    else:  # beside a chat the row is first of all one of another format
        assert codes(findings) == ["mixed_formats"]
        assert set(codes(found(path, content))) == {code}
    assert findings.status == "error"
    assert set(codes(findings)) <= set(CODES)


@pytest.mark.parametrize(
    ("row", "format"),
    [
        (chat(USER, REPLY | {"weight": 1}, tools=[TOOL], parallel_tool_calls=False), "messages"),
        (
            chat(USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c1", "content": "x"}, REPLY),
            "messages",
        ),
        ({"prompt": "p", "completion": "c"}, "prompt_completion"),
        (pair([REPLY], [REPLY | {"content": "b"}], tools=[], parallel_tool_calls=True), "preference"),
    ],
)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_good_rows_of_the_three_formats_are_processed(
    path: Path, row: dict[str, Any], format: str, end: bytes, start: bytes
) -> None:
    findings = found(path, start + end.join([json.dumps(row).encode()] * 12) + end + end)
    assert (findings.status, findings.format, findings.rows, findings.details) == ("processed", format, 12, None)
    assert findings.facts == {"format": format, "rows": 12, "problems": 0, "warnings": findings.warnings}
    assert [(warning["code"], warning["line"]) for warning in findings.warnings] == [("duplicate_rows", 2)]
    assert findings.warnings[0]["message"].startswith("11 rows repeat an earlier one")


def test_other_formats_are_refused_with_the_three_that_are_trained(path: Path) -> None:
    findings = found(path, b'{"text": "a"}\n' * 100)
    assert codes(findings) == ["unsupported_format"]
    assert all(word in findings.shown[0]["message"] for word in ("messages", "completion", "preferred_output"))


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"", "empty_file"), (b"\n \n", "empty_file"), (b"\xff\xfea\x00", "invalid_encoding"), (b"\x1f\x8bx", "invalid_encoding"),
     (b'[{"messages": []}]', "invalid_json")],
)  # fmt: skip
def test_a_file_that_is_none_of_lines_is_told_without_the_servers_paths(path: Path, content: bytes, code: str) -> None:
    findings = found(path, content)
    assert codes(findings) == [code]
    assert findings.shown[0]["line"] == 0
    assert str(path.parent) not in json.dumps(findings.shown) + str(findings.details)


def test_all_problems_are_counted_and_the_first_hundred_told(path: Path) -> None:
    findings = found(path, json.dumps(chat(USER, REPLY)).encode() + b"\n" + b"{\n" * 250)
    assert (findings.problems, findings.bad_rows, findings.rows, len(findings.shown)) == (250, 250, 251, MAX_SHOWN)
    assert findings.details is not None
    assert findings.details.startswith("250 problems; the first: line 2: not valid JSON at column 2")
    report = json.loads(findings.report("file-1"))
    assert (report["file"], report["problems_total"], len(report["problems"])) == ("file-1", 250, MAX_SHOWN)


def test_few_examples_are_warned_of(path: Path) -> None:
    findings = found(path, json.dumps(chat(USER, REPLY)).encode())
    assert [warning["code"] for warning in findings.warnings] == ["few_examples"]


def test_a_file_of_many_short_lines_is_left_to_the_duty(path: Path) -> None:
    path.write_bytes(b"{\n" * 30)
    assert judge(path, "fine-tune", max_rows=20) is None


REQUEST = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "toy", "messages": []}}


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (REQUEST, "duplicate_custom_id"),
        (REQUEST | {"custom_id": ""}, "invalid_request"),
        (REQUEST | {"custom_id": 1}, "invalid_request"),
        (REQUEST | {"custom_id": "2", "method": "GET"}, "invalid_method"),
        (REQUEST | {"custom_id": "2", "url": "/v1/embeddings"}, "invalid_url"),
        (REQUEST | {"custom_id": "2", "url": ["/v1/chat/completions"]}, "invalid_url"),
        (REQUEST | {"custom_id": "2", "body": []}, "invalid_request"),
        (REQUEST | {"custom_id": "2", "body": {}}, "invalid_request"),
        (REQUEST | {"custom_id": "2", "more": 1}, "unrecognized_key"),
        ([1], "invalid_json"),
    ],
)
def test_a_line_of_a_batch_is_a_whole_request(path: Path, row: Any, code: str) -> None:
    findings = found(path, json.dumps(REQUEST).encode() + b"\n" + json.dumps(row).encode(), "batch")
    assert (codes(findings), findings.shown[0]["line"], findings.rows) == ([code], 2, 2)
    assert findings.format == "batch"


def test_a_batch_of_requests_is_processed(path: Path) -> None:
    rows = [REQUEST | {"custom_id": str(n)} for n in range(20)]
    findings = found(path, "\n".join(json.dumps(row) for row in rows).encode(), "batch")
    assert findings.facts == {"format": "batch", "rows": 20, "problems": 0, "warnings": []}
    assert codes(found(path, b"", "batch")) == ["empty_file"]


KEYS = (
    "messages", "role", "content", "tool_calls", "function", "weight", "prompt", "completion", "input", "custom_id", "body",
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["user", "assistant", "tool"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(KEYS)
        | st.text(max_size=4),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip
LINES = st.lists(JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40), max_size=6).map(b"\n".join)


@settings(max_examples=60, deadline=2000)
@given(content=LINES, purpose=st.sampled_from(["fine-tune", "batch"]))
def test_whatever_the_lines_hold_there_is_a_verdict(tmp_path_factory: pytest.TempPathFactory, content: bytes, purpose: str) -> None:
    findings = found(tmp_path_factory.getbasetemp() / "any.jsonl", content, purpose)
    assert (findings.problems == 0) == (findings.status == "processed")
    assert findings.rows or findings.problems
    json.loads(findings.report("file-1"))
    assert set(codes(findings)) <= set(CODES)


# --- the duty --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def service(tmp_path: Path, db_url: str) -> Iterator[Service]:
    made = service_at(place(tmp_path / "service", db_url))
    yield made
    made.db.close()


def added(service: Service, content: bytes, file_id: str = "file-1") -> None:
    blob = service.blobs.put_bytes("default", content)
    file = File(file_id, "default", 1.0, "fine-tune", "a.jsonl", len(content), blob)
    service.db.write("add", lambda tx: files.add(tx, file))


def kept(service: Service, file_id: str = "file-1") -> File:
    file = service.db.read(lambda tx: files.find(tx, file_id, "default"))
    assert file is not None
    return file


def test_the_duty_judges_what_waits_and_leaves_a_report(service: Service) -> None:
    added(service, json.dumps(chat(USER, REPLY)).encode())
    added(service, b"{", "file-2")
    duty = JudgeFiles(service)
    assert [duty.turn(), duty.turn(), duty.turn()] == [True, True, False]
    assert (kept(service).status, (kept(service).facts or {})["rows"]) == ("processed", 1)
    bad = kept(service, "file-2")
    assert (bad.status, bad.status_details) == (
        "error",
        "1 problem: line 1: not valid JSON at column 2: expecting property name enclosed in double quotes",
    )
    assert bad.report is not None
    assert json.loads(b"".join(service.blobs.read(bad.report)))["problems"][0]["line"] == 1
    assert not list(service.scratch.iterdir())


def test_a_file_that_another_judges_is_left_until_that_one_is_dead(service: Service) -> None:
    added(service, b"{")
    other = service.db.write("claim", lambda tx: leases.claim(tx, "file:file-1", "other"))
    assert other is not None
    now = [0.0]
    duty = JudgeFiles(service, clock=lambda: now[0])
    assert not duty.turn()
    now[0] = leases.TERM_S + 1
    assert duty.turn()
    assert kept(service).status == "error"
    with pytest.raises(leases.StaleLease):
        service.db.write("late", lambda tx: leases.check(tx, other))


def test_a_file_that_ends_its_judges_is_an_error_after_some_tries(service: Service) -> None:
    added(service, b"{")
    for n in range(judging.TRIES):  # as killed processes leave it: claimed, counted, not released

        def claim(tx: files.Transaction, n: int = n) -> None:
            files.mark(tx, "file-1", "default", "uploaded", facts={"tries": n + 1})

        service.db.write("claim", claim)
    assert JudgeFiles(service).turn()
    assert (kept(service).status, kept(service).status_details) == (
        "error",
        "1 problem: the file could not be judged; upload it again, or in smaller files",
    )


def test_an_outage_is_not_the_files_fault(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    added(service, b"{")
    duty = JudgeFiles(service)

    def full(*_: object) -> Findings:
        raise StorageError("the disk is full", hint="make room")

    with monkeypatch.context() as patch:
        patch.setattr(judging, "judge", full)
        for _ in range(5):
            with pytest.raises(StorageError):
                duty.turn()
    assert kept(service).status == "uploaded"
    assert duty.turn()
    assert kept(service).status_details != "1 problem: the file could not be judged; upload it again, or in smaller files"


def test_a_scratch_folder_that_is_full_or_gone_is_not_the_files_fault(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    added(service, b"{")
    duty = JudgeFiles(service)

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "full")

    def removed(path: Path, *_: object) -> Findings | None:
        shutil.rmtree(service.scratch)
        return judge(path, "fine-tune")

    for where, name, breaks in ((judging.tempfile, "mkdtemp", full), (judging, "judge", removed)):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, breaks)
            with pytest.raises((StorageError, FileNotFoundError)):
                duty.turn()
        assert kept(service).status == "uploaded"
    assert duty.turn()
    assert (kept(service).facts or {})["rows"] == 1


def test_a_judge_that_breaks_still_ends_the_files_status(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    added(service, b"{")

    def broken(*_: object) -> Findings:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(judging, "judge", broken)
    assert JudgeFiles(service).turn()
    assert kept(service).status == "error"
    assert kept(service).facts == {"format": "unknown", "rows": 0, "problems": 1, "warnings": []}
