"""What can go wrong with durable records. Each is an error of the tree in `kivnun/errors.py`, so every door can tell it."""

from __future__ import annotations

from kivnun.errors import KivnunError


class DatabaseDown(KivnunError, ConnectionError):
    """The database did not answer. Nothing of the transaction was kept; the same call may be made again."""

    code = "database_unavailable"
    exit_status = 11

    __str__ = KivnunError.__str__


class StoreDown(KivnunError, ConnectionError):
    """The blob store did not answer. No part of a blob was kept under its name."""

    code = "store_unavailable"
    exit_status = 12

    __str__ = KivnunError.__str__


class SchemaError(KivnunError, RuntimeError):
    """The database was written by another version of Kivnun, and cannot be used by this one as it is."""

    code = "schema"
    exit_status = 13


class StaleLease(KivnunError, PermissionError):
    """Somebody else holds the lease by now: whatever its last holder was going to write is not written."""

    code = "stale_lease"
    exit_status = 14

    __str__ = KivnunError.__str__
