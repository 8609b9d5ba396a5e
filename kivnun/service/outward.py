"""Requests to addresses that users name (webhooks): they reach the public internet by https, and nothing that is near the service.

A name is resolved once, every address it has is checked, and the connection is made to a checked address; whoever changes the
name's records in between changes nothing. The certificate is checked against the name. Redirects are not followed, proxies of the
environment are not asked, and the whole exchange has a time and a size. Next: `delivering.py`.
"""

from __future__ import annotations

import io
import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import Literal, cast
from urllib.parse import urlsplit

TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 1 << 20
MAX_URL_LETTERS = 2048
HINT = "give an https:// URL of a public host on port 443; the operator's webhook_hosts may allow more"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], list[Address]]
Dial = Callable[[Address, int, float], socket.socket]


class RefusedAddress(ValueError):
    """A URL that is never asked: it is malformed, or it leads to where users have no business."""


class Unreachable(ConnectionError):
    """An address that is allowed did not answer as HTTP does. The text holds nothing that the other side sent."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Target:
    """A URL in its one normal form. `trusted`: the operator allows its host by name, wherever it is."""

    scheme: Literal["http", "https"]
    host: str  # an address without brackets, or a name in lower case
    port: int
    path: str  # with the query
    trusted: bool

    @property
    def authority(self) -> str:
        """Return the Host header: the port is named where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


_PORTS = {"http": 80, "https": 443}
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_HEADER_NAME = re.compile(r"[A-Za-z0-9-]+")


def target_of(url: str, hosts: tuple[str, ...] = ()) -> Target:
    """Return what a URL names. `hosts` (HOST for ports 80 and 443, or HOST:PORT) may be private and asked by http.

    Raises RefusedAddress for any URL that two programs could read differently, and for addresses that are not public."""
    if not url.isascii() or not url.isprintable() or any(letter in url for letter in ' \\"<>^`{|}'):
        raise _refused("the URL holds letters that do not belong in one; write a name in its xn-- form and encode others as %XX")
    if len(url) > MAX_URL_LETTERS:
        raise _refused(f"the URL has {len(url)} letters; at most {MAX_URL_LETTERS} are allowed")
    try:
        parts = urlsplit(url)
        given_port = parts.port
    except ValueError:
        raise _refused("the URL cannot be read: its host or its port is malformed") from None
    if parts.scheme not in ("http", "https") or not url.lower().startswith(f"{parts.scheme}://"):
        raise _refused("the URL must begin with https://")
    if "@" in parts.netloc:
        raise _refused("the URL must not hold a user name or a password")
    if parts.fragment or "#" in url:
        raise _refused("the URL must not hold a fragment (#...): it is never sent")
    if parts.netloc.endswith(":"):
        raise _refused("the URL names no port after the colon")
    scheme: Literal["http", "https"] = "http" if parts.scheme == "http" else "https"
    host, port = _host(parts.hostname or "", parts.netloc), _PORTS[scheme] if given_port is None else given_port
    target = Target(
        scheme, host, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), _is_trusted(host, port, hosts)
    )
    if not target.trusted:
        _check_untrusted(target)
    return target


def _host(host: str, netloc: str) -> str:
    """Return a host in its normal form: a name in lower case without its last dot, or an address written the usual way."""
    if netloc.startswith("["):
        try:
            return str(ipaddress.IPv6Address("" if "%" in host else host))  # no zone (%eth0): it names a link of this machine
        except ValueError:
            raise _refused("the URL's host is no IPv6 address") from None
    host = host.lower()
    labels = host.removesuffix(".").split(".")
    if _NUMBER.fullmatch(labels[-1]):  # other programs take 0x7f.1, 017700000001 and 2130706433 for addresses
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise _refused("the URL's host is no address in its usual form (four decimal numbers)") from None
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise _refused("the URL's host is no name of a host")
    return ".".join(labels)


def _is_trusted(host: str, port: int, hosts: tuple[str, ...]) -> bool:
    shown = f"[{host}]" if ":" in host else host
    return f"{shown}:{port}" in hosts or (port in (80, 443) and shown in hosts)


def _check_untrusted(target: Target) -> None:
    if target.scheme != "https":
        raise _refused("the URL must begin with https://")
    if target.port != 443:
        raise _refused(f"the URL names port {target.port}; only 443 is allowed")
    address = _address(target.host)
    if address is not None:
        check_address(address)
    elif "." not in target.host or target.host.rsplit(".", 1)[-1] in (
        "local",
        "localhost",
        "internal",
        "localdomain",
        "home",
        "lan",
    ):
        raise _refused("the URL's host is a name of a private network")


_PRIVATE_4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16", "172.16.0.0/12",
        "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    )
)  # fmt: skip
# Only 2000::/3 is given out. What it holds of IPv4 in IPv6 (6to4, Teredo) and of special purpose is left out; NAT64, mapped and
# compatible addresses, ULA, link-local and multicast are outside of it anyway.
_PUBLIC_6 = ipaddress.IPv6Network("2000::/3")
_PRIVATE_6 = tuple(
    ipaddress.IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
)
_ISATAP = (0x00005EFE, 0x02005EFE)  # the third quarter of an address that holds an IPv4 address in its last


def check_address(address: Address) -> None:
    """Raise RefusedAddress unless the address is a public one of the internet."""
    if isinstance(address, ipaddress.IPv4Address):
        public = address.is_global and not any(address in network for network in _PRIVATE_4)
    else:
        public = address in _PUBLIC_6 and not any(address in network for network in _PRIVATE_6)
        public = public and address.is_global and (int(address) >> 32) & 0xFFFFFFFF not in _ISATAP
        public = public and address.scope_id is None
    if not public:
        raise _refused("the URL's host has an address that is not a public one")


def resolve(host: str, port: int) -> list[Address]:
    """Return a name's addresses as this machine's resolver gives them. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [ipaddress.ip_address(str(entry[4][0])) for entry in found]


def dial(address: Address, port: int, timeout_s: float) -> socket.socket:
    """Return a connection to an address. Raises OSError."""
    made = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
    try:
        made.settimeout(timeout_s)
        made.connect((str(address), port))
    except BaseException:
        made.close()
        raise
    return made


@dataclass(frozen=True, slots=True)
class Outward:
    """Asks URLs that users gave. Threads may share one."""

    hosts: tuple[str, ...] = ()  # that the operator trusts
    resolve: Resolve = resolve
    dial: Dial = dial
    context: ssl.SSLContext = field(default_factory=ssl.create_default_context)
    timeout_s: float = TIMEOUT_S
    max_answer_bytes: int = MAX_ANSWER_BYTES

    def send(self, method: Literal["GET", "POST"], url: str, headers: Mapping[str, str], body: bytes = b"") -> Answer:
        """Return what a URL answers, redirects as they come. Raises RefusedAddress, Unreachable."""
        target = target_of(url, self.hosts)
        until = time.monotonic() + self.timeout_s
        try:
            connection = self._connect(target, until)
            try:
                wire = _Wire(connection, until, self.max_answer_bytes)
                wire.sendall(_request(method, target, headers, body))
                return _answer(wire, method)
            finally:
                connection.close()
        except (OSError, HTTPException, EOFError, ValueError) as error:
            if isinstance(error, RefusedAddress | Unreachable):
                raise
            raise Unreachable(_why(error)) from None

    def _connect(self, target: Target, until: float) -> socket.socket:
        failure: OSError = TimeoutError()
        for address in self._addresses(target, until):
            try:
                plain = self.dial(address, target.port, _left(until))
            except OSError as error:
                failure = error
                continue
            if target.scheme == "http":
                return plain
            try:
                plain.settimeout(_left(until))
                return self.context.wrap_socket(plain, server_hostname=target.host)
            except BaseException:
                plain.close()
                raise
        raise failure

    def _addresses(self, target: Target, until: float) -> list[Address]:
        """Return where a target is; all its addresses, or none where one of them is not allowed."""
        literal = _address(target.host)
        addresses = [literal] if literal is not None else _within(_left(until), lambda: self.resolve(target.host, target.port))
        if not addresses:
            raise socket.gaierror
        if not target.trusted:
            for address in addresses:
                check_address(address)
        return addresses


class _Wire(io.RawIOBase):
    """A connection that ends with its time and with its share of bytes, however slowly the other side drips."""

    def __init__(self, connection: socket.socket, until: float, max_bytes: int) -> None:
        super().__init__()
        self._connection, self._until, self._bytes_left = connection, until, max_bytes

    def sendall(self, content: bytes) -> None:
        self._connection.settimeout(_left(self._until))
        self._connection.sendall(content)

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Return a stream to read from, as http.client asks of a socket."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._connection.settimeout(_left(self._until))
        read = self._connection.recv_into(buffer)
        self._bytes_left -= read
        if self._bytes_left < 0:
            raise Unreachable("its answer is too long")
        return read


def _request(method: str, target: Target, headers: Mapping[str, str], body: bytes) -> bytes:
    lines = {"Host": target.authority, "User-Agent": "Kivnun", "Accept": "*/*", "Connection": "close", **headers}
    if method == "POST":
        lines["Content-Length"] = str(len(body))
    for name, value in lines.items():
        assert _HEADER_NAME.fullmatch(name), name
        assert value.isascii(), name
        assert value.isprintable(), name
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {target.path} HTTP/1.1\r\n{head}\r\n".encode("ascii") + body


def _answer(wire: _Wire, method: str) -> Answer:
    response = HTTPResponse(cast(socket.socket, wire), method=method)
    response.begin()
    return Answer(response.status, response.read())


def _address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _within(timeout_s: float, call: Callable[[], list[Address]]) -> list[Address]:
    """Return what a call gives that has no time limit of its own: it is left behind once the time is over."""
    outcome: queue.SimpleQueue[list[Address] | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put(call())
        except Exception as error:
            outcome.put(error)

    threading.Thread(target=run, name="resolve", daemon=True).start()
    try:
        found = outcome.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(found, Exception):
        raise found
    return found


def _why(error: Exception) -> str:
    """Return a reason in our own words: an error's text may quote what the other side sent."""
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    if isinstance(error, socket.gaierror | UnicodeError):
        return "its name cannot be resolved"
    if isinstance(error, ssl.SSLCertVerificationError):
        return "its certificate is not valid for the host"
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        return "no TLS connection could be made"
    if isinstance(error, ConnectionRefusedError):
        return "the connection was refused"
    return "the connection broke off, or the answer is no HTTP"


def _refused(message: str) -> RefusedAddress:
    return RefusedAddress(f"{message}; {HINT}")
