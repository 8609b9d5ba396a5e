"""On which address a server listens, and what that asks of it: keys never cross a network in the clear. Next: `serve.py`."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kivnun.service.run import Tls


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises click.UsageError."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024)
    except OSError as error:
        raise click.UsageError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


def url_of(host: str, port: int, tls: Tls | None = None) -> str:
    place = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{place}:{port}"


def require_tls(host: str, certificate: Path | None, key: Path | None, *, behind_proxy: bool) -> Tls | None:
    """Return the certificate, if there is one. Raises click.UsageError where others could reach an address without TLS."""
    if (certificate is None) != (key is None):
        raise click.UsageError("--tls-cert and --tls-key belong together: give both or neither")
    if certificate is not None and key is not None:
        from kivnun.service.run import Tls

        return Tls(certificate, key)
    if not behind_proxy and not is_loopback(host):
        raise click.UsageError(
            f"--host {host} can be reached by others, who would send their keys in the clear: give --tls-cert and --tls-key, "
            "or --behind-proxy where TLS ends before this"
        )
    return None
