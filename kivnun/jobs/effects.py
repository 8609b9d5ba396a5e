"""The points at which the service could be killed: just before and just after each durable effect.

Everything that outlives a process goes through a `Database` or a `BlobStore`, and both tell a `Watch` by name. In use it does
nothing; the crash tests give one that ends the process at the k-th point, for every k there is.
"""

from __future__ import annotations

from collections.abc import Callable

Watch = Callable[[str], None]
"""Hears `before NAME` and `after NAME` of every durable effect, in the thread that makes it."""


def unwatched(_point: str) -> None:
    """Take no notice."""
