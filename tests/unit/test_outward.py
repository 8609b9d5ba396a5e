"""Requests to addresses that users name: nothing near the service is ever reached, however the address is written or resolved."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from kivnun.service.outward import HINT, Address, Answer, Outward, RefusedAddress, Unreachable, check_address, dial, target_of

PUBLIC = ipaddress.ip_address("93.184.216.34")
LOOPBACK = ipaddress.ip_address("127.0.0.1")

TRICKS = (Path(__file__).parents[1] / "data" / "tricky_urls.txt").read_text(encoding="utf-8").splitlines()
SPACED = [
    "https://example.com/\r\nX-Injected: 1", "https://example.com\r\n.evil.com/", "https://exa\tmple.com/", "https://example.com/\x00",
    " https://example.com/", "https://example.com/ HTTP/1.1", "https://example.com/\x7f", "https://example.com\u2028.evil.com/",
    "https://" + "a" * 64 + ".com/", "https://" + "a." * 130 + "com/", "https://example.com/" + "x" * 2100, "",
]  # fmt: skip


def test_a_trick_is_refused_before_anything_is_resolved() -> None:
    def resolve(_host: str, _port: int) -> list[Address]:
        raise AssertionError("resolved")

    outward = Outward(resolve=resolve, dial=_never)
    for url in TRICKS + SPACED:
        with pytest.raises(RefusedAddress) as refused:
            outward.send("POST", url, {}, b"")
        assert str(refused.value).endswith(HINT), url
        assert not url or url not in str(refused.value).removesuffix(HINT)


@pytest.mark.parametrize(
    ("url", "host", "path"),
    [
        ("https://Example.COM", "example.com", "/"),
        ("HTTPS://example.com./a/../b?c=d&e=%20", "example.com", "/a/../b?c=d&e=%20"),
        ("https://example.com:443?x", "example.com", "/?x"),
        ("https://xn--exmple-cua.com/hook", "xn--exmple-cua.com", "/hook"),
        ("https://8.8.8.8/", "8.8.8.8", "/"),
        ("https://[2606:4700:0:0:0:0:0:1111]/", "2606:4700::1111", "/"),
        ("https://hook_1.example.com/", "hook_1.example.com", "/"),
    ],
)
def test_a_public_url_has_one_normal_form(url: str, host: str, path: str) -> None:
    target = target_of(url)
    assert (target.scheme, target.host, target.port, target.path) == ("https", host, 443, path)


def test_public_addresses_are_allowed() -> None:
    for text in (
        "8.8.8.8",
        "1.1.1.1",
        "93.184.216.34",
        "172.32.0.1",
        "100.128.0.1",
        "2606:4700::1111",
        "2a00:1450:4001:81b::200e",
        "2001:4860:4860::8888",
    ):
        check_address(ipaddress.ip_address(text))


def test_a_trusted_host_may_be_private_and_plain_on_its_ports_alone() -> None:
    hosts = ("10.0.0.5", "hooks.internal:8080", "[::1]:9000")
    for url in (
        "http://10.0.0.5/",
        "https://10.0.0.5/x",
        "http://hooks.internal:8080/",
        "https://HOOKS.internal.:8080/",
        "http://[0::1]:9000/",
    ):
        assert target_of(url, hosts).trusted
    for url in (
        "http://10.0.0.5:6379/",
        "http://10.0.0.6/",
        "http://hooks.internal/",
        "http://hooks.internal:80/",
        "http://[::1]:9001/",
        "http://u@10.0.0.5/",
    ):
        with pytest.raises(RefusedAddress):
            target_of(url, hosts)


def _never(_address: Address, _port: int, _timeout_s: float) -> socket.socket:
    raise AssertionError("a connection was made")


@dataclass
class Peer:
    """A server on loopback that notes what it was sent, and answers with given bytes."""

    answer: bytes | Callable[[socket.socket], None] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    tls: ssl.SSLContext | None = None
    port: int = 0
    requests: list[bytes] = field(default_factory=list[bytes])
    connections: int = 0
    names: list[str | None] = field(default_factory=list[str | None])

    @contextmanager
    def serving(self) -> Iterator[Peer]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
            thread = threading.Thread(target=self._serve, args=(listener,), daemon=True)
            thread.start()
            yield self
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(5)

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                with self.tls.wrap_socket(plain, server_side=True) if self.tls else plain as connection:
                    self.requests.append(connection.recv(65536))
                    if callable(self.answer):
                        self.answer(connection)
                    else:
                        connection.sendall(self.answer)
            except OSError:
                plain.close()

    def dial(self, _address: Address, _port: int, timeout_s: float) -> socket.socket:
        """Stand for the internet: whatever address was checked, this server is there."""
        return dial(LOOPBACK, self.port, timeout_s)


def at_public(_host: str, _port: int) -> list[Address]:
    return [PUBLIC]


def test_a_name_that_resolves_to_another_address_each_time_never_leads_to_loopback() -> None:
    with Peer().serving() as peer:
        asked: list[str] = []

        def rebinding(host: str, _port: int) -> list[Address]:
            asked.append(host)
            return [PUBLIC] if len(asked) % 2 else [LOOPBACK]

        dialed: list[Address] = []

        def noted(address: Address, _port: int, _timeout_s: float) -> socket.socket:
            dialed.append(address)
            raise ConnectionRefusedError

        outward = Outward(resolve=rebinding, dial=noted)
        for n in range(6):
            with pytest.raises(RefusedAddress if n % 2 else Unreachable):
                outward.send("POST", "https://rebinding.example.com/", {}, b"{}")
        assert asked == ["rebinding.example.com"] * 6, "each request resolves once"
        assert dialed == [PUBLIC] * 3, "and connects to what it checked"
        # The same by the real dial: the only addresses are loopback's, in forms that a resolver may give.
        for addresses in (
            ["127.0.0.1"],
            ["::1"],
            ["::ffff:127.0.0.1"],
            ["93.184.216.34", "127.0.0.1"],
            ["fe80::1%lo"],
            ["64:ff9b::7f00:1"],
        ):
            found = [ipaddress.ip_address(text) for text in addresses]
            with pytest.raises(RefusedAddress):
                Outward(resolve=lambda _h, _p, found=found: found).send("POST", "https://x.example.com/", {}, b"{}")
        assert peer.connections == 0


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return a server's context for hooks.example.com, and a client's that trusts its maker."""
    folder: Path = tmp_path_factory.mktemp("certificates")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("hooks.example.com")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = folder / "both.pem"
    pem.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pem)
    return server, ssl.create_default_context(cafile=str(pem))


def test_a_request_by_https_names_the_host_to_tls_and_http_at_the_checked_address(
    certificates: tuple[ssl.SSLContext, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = certificates
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # never asked
    with Peer(tls=server).serving() as peer:
        server.sni_callback = lambda _socket, name, _context: peer.names.append(name)
        outward = Outward(resolve=at_public, dial=peer.dial, context=client)
        answer = outward.send("POST", "https://Hooks.Example.com./in?a=b", {"webhook-id": "evt_1"}, b'{"a":1}')
    assert answer == Answer(200, b"ok")
    assert peer.names == ["hooks.example.com"]
    head, _, body = peer.requests[0].partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /in?a=b HTTP/1.1"
    assert {"Host: hooks.example.com", "webhook-id: evt_1", "Content-Length: 7", "Connection: close"} <= set(lines)
    assert body == b'{"a":1}'


def test_a_certificate_for_another_name_or_from_a_stranger_ends_it_before_anything_is_sent(
    certificates: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    server, client = certificates
    server.sni_callback = None  # type: ignore[assignment]
    with Peer(tls=server).serving() as peer:
        for url, context in (("https://other.example.com/", client), ("https://hooks.example.com/", ssl.create_default_context())):
            with pytest.raises(Unreachable, match="certificate"):
                Outward(resolve=at_public, dial=peer.dial, context=context).send("POST", url, {}, b"secret")
    assert peer.requests == []


def _asked(answer: bytes | Callable[[socket.socket], None], timeout_s: float = 5.0, max_answer_bytes: int = 1000) -> Answer:
    with Peer(answer).serving() as peer:
        outward = Outward((f"127.0.0.1:{peer.port}",), timeout_s=timeout_s, max_answer_bytes=max_answer_bytes)
        return outward.send("GET", f"http://127.0.0.1:{peer.port}/", {})


def test_a_redirect_is_an_answer_and_is_not_followed() -> None:
    assert _asked(b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n").status == 302


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", "broke off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe", "broke off"),
        (b"CANARY not http\r\n\r\n", "no HTTP"),
        (b"", "broke off"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 2000, "too long"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2000, "too long"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 100, "too long"),
    ],
)
def test_an_answer_that_is_cut_off_malformed_or_endless_is_none(answer: bytes, why: str) -> None:
    with pytest.raises(Unreachable, match=why) as failed:
        _asked(answer)
    assert "CANARY" not in str(failed.value)


def test_an_answer_that_drips_ends_with_its_time() -> None:
    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        for _ in range(40):
            time.sleep(0.05)
            connection.sendall(b"X: y\r\n")

    began = time.monotonic()
    with pytest.raises(Unreachable, match="in time"):
        _asked(drip, timeout_s=0.3)
    assert time.monotonic() - began < 1.5


def test_a_resolver_that_hangs_ends_with_its_time() -> None:
    release = threading.Event()

    def hanging(_host: str, _port: int) -> list[Address]:
        release.wait(5)
        return [PUBLIC]

    with pytest.raises(Unreachable, match="in time"):
        Outward(resolve=hanging, dial=_never, timeout_s=0.1).send("GET", "https://example.com/", {})
    release.set()


def test_a_name_that_has_no_address_is_unreachable() -> None:
    for resolve in (lambda _h, _p: [], _unknown):
        with pytest.raises(Unreachable, match="cannot be resolved"):
            Outward(resolve=resolve, dial=_never).send("GET", "https://nowhere.example.com/", {})


def _unknown(_host: str, _port: int) -> list[Address]:
    raise socket.gaierror(-2, "Name or service not known")
