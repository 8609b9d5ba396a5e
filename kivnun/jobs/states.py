"""The life of a job as a table: which status may follow which, and what a command does in each.

Pure; the transactions that move a job are in `tuning.py` and `running.py`, and both ask here.
"""

from __future__ import annotations

from typing import Literal, get_args

Status = Literal["validating_files", "queued", "running", "pausing", "paused", "succeeded", "failed", "cancelled"]
Command = Literal["pause", "resume", "cancel"]

STATUSES: tuple[Status, ...] = get_args(Status)
TERMINAL: frozenset[Status] = frozenset({"succeeded", "failed", "cancelled"})
ACTIVE: frozenset[Status] = frozenset({"running", "pausing"})

FOLLOWS: dict[Status, frozenset[Status]] = {
    "validating_files": frozenset({"queued", "failed", "cancelled"}),
    "queued": frozenset({"running", "paused", "failed", "cancelled"}),
    # A worker that lets go of a job (it was told to end, or it was lost) gives it back to the queue.
    "running": frozenset({"queued", "pausing", "succeeded", "failed", "cancelled"}),
    "pausing": frozenset({"paused", "succeeded", "failed", "cancelled"}),
    "paused": frozenset({"queued", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}

# What a command makes of a job; the same status means that it has no effect and is no error. Whatever is not here is refused.
COMMANDS: dict[Command, dict[Status, Status]] = {
    "pause": {"queued": "paused", "running": "pausing", "pausing": "pausing", "paused": "paused"},
    "resume": {"paused": "queued"},
    "cancel": {
        "validating_files": "cancelled", "queued": "cancelled", "running": "cancelled", "pausing": "cancelled",
        "paused": "cancelled", "cancelled": "cancelled",
    },
}  # fmt: skip


def after_command(status: Status, command: Command) -> Status | None:
    """Return the status that a command leads to; None where it is refused."""
    return COMMANDS[command].get(status)


def may_follow(status: Status, after: Status) -> bool:
    return after in FOLLOWS[status]
