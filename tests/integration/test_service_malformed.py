"""Bodies that are broken, lying, endless or hostile: an answer below 500 in bounded time, and nothing of them stays."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kivnun.jobs import files
from kivnun.service.context import Service
from service_parts import KEY

FORM = "multipart/form-data"
HEADERS = {"authorization": f"Bearer {KEY}", "content-type": "multipart/form-data; boundary=b"}
PURPOSE = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
END = b"\r\n--b--\r\n"
ROW = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
GOOD = PURPOSE + FILE + ROW * 3 + END


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers=HEADERS, timeout=20) as made:
        yield made


def count(service: Service) -> int:
    return service.db.read(lambda tx: files.storage_of(tx, "default")).files


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_multipart"),
        (b"--b--\r\n", "missing_required_parameter"),
        (PURPOSE + b"--b--\r\n", "missing_required_parameter"),
        (FILE + ROW + END, "missing_required_parameter"),
        (GOOD[:-6], "invalid_multipart"),
        (PURPOSE + FILE + ROW, "invalid_multipart"),
        (GOOD.replace(b"--b", b"--c"), "invalid_multipart"),
        (PURPOSE + FILE + ROW + b"\r\n" + FILE + ROW + END, "invalid_value"),
        (PURPOSE + PURPOSE + FILE + ROW + END, "invalid_value"),
        (PURPOSE.replace(b'"purpose"', b'"more"') + GOOD, "unknown_parameter"),
        (PURPOSE.replace(b"fine-tune", b"x" * 5000) + FILE + ROW + END, "invalid_value"),
        (PURPOSE.replace(b"fine-tune", b"evil\r\npurpose\x00") + FILE + ROW + END, "invalid_value"),
        (PURPOSE.replace(b'; name="purpose"', b"") + FILE + ROW + END, "invalid_multipart"),
        (b"--b\r\n\r\nno header\r\n" + GOOD, "invalid_multipart"),
        (b"--b\r\nX: " + b"y" * 100_000 + b"\r\n\r\n", "invalid_multipart"),
        (b"".join(b"--b\r\nX-%d: y" % n for n in range(1000)), "invalid_multipart"),
        (b"--b\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(1000)) + b"\r\n", "invalid_multipart"),
        (PURPOSE * 1000 + FILE, "invalid_value"),
        (b"\x00" * 100_000, "invalid_multipart"),
        (b"-" * 1_000_000, "invalid_multipart"),
    ],
)
def test_a_form_that_is_none_is_refused_and_leaves_nothing(http: httpx.Client, service: Service, body: bytes, code: str) -> None:
    before = count(service)
    answer = http.post("/v1/files", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert count(service) == before
    assert not list(service.scratch.iterdir())


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/json", "multipart/mixed; boundary=b", "multipart/form-data", f"{FORM}; boundary=",
             f"{FORM}; boundary={'b' * 300}", f"{FORM}; boundary=\xff"],
)  # fmt: skip
def test_a_body_of_another_type_is_refused(http: httpx.Client, kind: str) -> None:
    answer = http.post("/v1/files", content=GOOD, headers=[(b"content-type", kind.encode("latin-1"))])
    assert answer.status_code in (400, 415)
    assert answer.json()["error"]["code"] in ("unsupported_media", "invalid_multipart")


@pytest.mark.parametrize(
    "lines",
    [
        b"\xef\xbb\xbf" + ROW, ROW.replace(b"\n", b"\r"), ROW.replace(b"q", b"\x00"), ROW.replace(b"q", rb"\ud800"),
        b"[" * 1_000_000, b'{"a":' * 200_000, b'{"a": ' + b"9" * 900_000 + b"}", b'{"a": 1, "a": 2}', b'{"a": NaN}', b"{" * 900_000,
        b'{"messages": [' + b"{}," * 300_000, b"\n" * 1_000_000, b'"' + b"\\" * 999_999, b"{}\n" * 300_000, b"\xff\xfe" * 1000, b"",
        ('{"' + '\\"' * 400_000).encode(), b"0" * 1_000_000, b"-" * 1_000_000, b"1e" + b"9" * 100_000,
    ],
)  # fmt: skip
def test_lines_of_any_kind_are_judged_in_bounded_time(http: httpx.Client, service: Service, lines: bytes) -> None:
    for purpose in (b"fine-tune", b"batch"):
        began = time.process_time()
        answer = http.post("/v1/files", content=PURPOSE.replace(b"fine-tune", purpose) + FILE + lines + END)
        assert time.process_time() - began < 3
        assert answer.status_code == 200
        assert answer.json()["status"] in ("uploaded", "processed", "error")
    assert not list(service.scratch.iterdir())


@settings(max_examples=50, deadline=None)
@given(
    cuts=st.lists(st.tuples(st.integers(0, len(GOOD)), st.integers(0, 20), st.binary(max_size=12)), min_size=1, max_size=4),
)
def test_a_form_that_is_changed_anywhere_gets_an_answer_below_500(
    http: httpx.Client, service: Service, cuts: list[tuple[int, int, bytes]]
) -> None:
    body = GOOD
    for at, length, put in cuts:
        body = body[:at] + put + body[at + length :]
    answer = http.post("/v1/files", content=body)
    assert answer.status_code in (200, 400)
    assert not list(service.scratch.iterdir())


# --- what only a socket can do ---------------------------------------------------------------------------------------------------


def spoken(url: str, *pieces: bytes, close: bool = False) -> bytes:
    """Say the pieces on a connection; return what is answered until the server ends it, be it by a reset."""
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=10) as connection:
        for piece in pieces:
            connection.sendall(piece)
        if close:
            return b""
        answer = b""
        with suppress(ConnectionResetError):  # what a server that closes with bytes unread sends
            while piece := connection.recv(65536):
                answer += piece
        return answer


def becomes_empty(service: Service) -> None:
    """The server learns a moment later that a client has gone, and then keeps nothing of what it sent."""
    deadline = time.monotonic() + 10
    while list(service.scratch.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def head(length: int | str) -> bytes:
    lines = [
        f"{name}: {value}" for name, value in (*HEADERS.items(), ("content-length", length), ("host", "x"), ("connection", "close"))
    ]
    return ("POST /v1/files HTTP/1.1\r\n" + "\r\n".join(lines) + "\r\n\r\n").encode()


@pytest.mark.parametrize("part", [0, 1, len(PURPOSE), len(PURPOSE) + 30, len(PURPOSE + FILE), len(PURPOSE + FILE) + 2_500_000])
def test_an_upload_that_is_broken_off_at_any_point_leaves_nothing(url: str, service: Service, part: int) -> None:
    before = count(service), len(list(service.blobs.names()))
    body = PURPOSE + FILE + b"x" * 4_000_000 + END
    spoken(url, head(len(body)), body[:part], close=True)
    time.sleep(0.05)  # so that the server has begun
    becomes_empty(service)
    assert (count(service), len(list(service.blobs.names()))) == before


def test_a_length_that_lies_is_no_file(url: str, service: Service) -> None:
    before = count(service)
    short = spoken(url, head(len(GOOD) - 40), GOOD)
    assert short.startswith(b"HTTP/1.1 400 ")
    assert b"invalid_multipart" in short
    spoken(url, head(len(GOOD) + 1000), GOOD, close=True)
    for wrong in ("-1", "1e3", "99999999999999999999999", "abc"):
        answer = spoken(url, head(wrong), GOOD)
        assert answer == b"" or answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 "))
    becomes_empty(service)
    assert count(service) == before


def test_a_client_that_falls_silent_is_let_go(url: str, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    from kivnun.service import frame

    monkeypatch.setattr(frame, "PIECE_S", 0.2)
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=10) as connection:
        connection.sendall(head(len(GOOD)) + GOOD[:100])
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 ")
    becomes_empty(service)
