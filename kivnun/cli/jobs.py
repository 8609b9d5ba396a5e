"""`kivnun jobs`: fine-tuning jobs of a running service, by the calls that OpenAI's client makes. Next: `remote.py`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from kivnun.cli.keys import when
from kivnun.cli.remote import Remote, part, remote, remote_options

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATH = "/fine_tuning/jobs"
ENDED = ("succeeded", "failed", "cancelled")
JSON_HELP = "Print the job as one JSON object, as the API answers it."


def _of_a_job(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the job's ID, where its service is, and --json, which prints the job."""
    as_json = click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
    return click.argument("job_id", metavar="ID")(remote_options(as_json(command)))


@click.group(short_help="List, watch and command the jobs of a service.")
def jobs() -> None:
    """List, watch and command the fine-tuning jobs of a running service.

    The key that calls is in KIVNUN_API_KEY.
    """


@jobs.command("list", short_help="List jobs, newest first.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="How many at most.")
@remote_options
@click.option("--json", "as_json", is_flag=True, help="Print {jobs: [...]} as one JSON object.")
def list_jobs(limit: int, url: str, as_json: bool) -> None:
    """List the tenant's jobs, newest first."""
    from kivnun.cli.screen import print_json, stderr, table

    found = list(remote(url).pages(PATH, limit))
    if as_json:
        print_json({"jobs": found})
    elif found:
        heads = ("id", "status", "model", "made", "ends", "tuned model")
        table(
            heads,
            [
                (job["id"], job["status"], job["model"], when(job["created_at"]), _end(job), job["fine_tuned_model"] or "")
                for job in found
            ],
        )
    else:
        stderr().print("no jobs yet; docs/guides/service.md makes one")


@jobs.command(short_help="Show one job.")
@_of_a_job
def show(job_id: str, url: str, as_json: bool) -> None:
    """Show the job with this ID: what was asked, what was decided, where it is."""
    _show(remote(url).get(_path(job_id)), as_json=as_json)


@jobs.command(short_help="Show what happened to a job.")
@click.argument("job_id", metavar="ID")
@click.option("--limit", type=click.IntRange(1), help="How many of the newest; by default all.")
@remote_options
@click.option("--json", "as_json", is_flag=True, help="Print {events: [...]}, the oldest first, as one JSON object.")
def events(job_id: str, limit: int | None, url: str, as_json: bool) -> None:
    """Show the events of the job with this ID, the oldest first."""
    from kivnun.cli.screen import print_json, stdout

    found = list(remote(url).pages(f"{_path(job_id)}/events", limit))[::-1]
    if as_json:
        print_json({"events": found})
        return
    for event in found:
        stdout().print(_line(event))


def _commanded(kind: str, job_id: str, url: str, *, as_json: bool) -> None:
    _show(remote(url).post(f"{_path(job_id)}/{kind}"), as_json=as_json)


@jobs.command(short_help="Cancel a job.")
@_of_a_job
def cancel(job_id: str, url: str, as_json: bool) -> None:
    """Cancel the job with this ID. Its checkpoints are kept; the job itself cannot go on."""
    _commanded("cancel", job_id, url, as_json=as_json)


@jobs.command(short_help="Pause a job after the step in progress.")
@_of_a_job
def pause(job_id: str, url: str, as_json: bool) -> None:
    """Pause the job with this ID after the step in progress. It goes on from there, to the same bits, when it is resumed."""
    _commanded("pause", job_id, url, as_json=as_json)


@jobs.command(short_help="Put a paused job back into the queue.")
@_of_a_job
def resume(job_id: str, url: str, as_json: bool) -> None:
    """Put the paused job with this ID back into the queue."""
    _commanded("resume", job_id, url, as_json=as_json)


@jobs.command(short_help="Watch a job until it ends.")
@click.argument("job_id", metavar="ID")
@click.option("--every-s", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Seconds between two looks.")
@remote_options
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
def watch(job_id: str, every_s: float, url: str, as_json: bool) -> int:
    """Watch the job with this ID until it ends: its events as they come, and a bar of its steps.

    Exits with 1 unless it succeeded."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    from kivnun.cli.screen import stderr

    service, console = remote(url), stderr()
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=28), TextColumn("{task.fields[detail]}"),
        console=console, transient=True, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=None, detail="")
        seen: str | None = None
        while True:
            job = service.get(_path(job_id))
            for event in _newer(service, job_id, seen):
                seen = event["id"]
                console.print(_line(event))
                _advance(bar, task, event)
            bar.update(task, description=job["status"], detail=_end(job))
            if job["status"] in ENDED:
                break
            time.sleep(every_s)
    _show(job, as_json=as_json)
    return 0 if job["status"] == "succeeded" else 1


def _newer(service: Remote, job_id: str, seen: str | None) -> list[dict[str, Any]]:
    """Return the events after one that was seen, the oldest first."""
    found: list[dict[str, Any]] = []
    for event in service.pages(f"{_path(job_id)}/events", None):
        if event["id"] == seen:
            break
        found.append(event)
    return found[::-1]


def _advance(bar: Progress, task: TaskID, event: dict[str, Any]) -> None:
    data: dict[str, Any] = event.get("data") or {}
    if "step" in data and "total_steps" in data:
        bar.update(task, completed=data["step"], total=data["total_steps"])


def _path(job_id: str) -> str:
    return f"{PATH}/{part(job_id)}"


def _show(job: dict[str, Any], *, as_json: bool) -> None:
    from kivnun.cli.screen import print_json, table

    if as_json:
        print_json(job)
        return
    error: dict[str, Any] = job.get("error") or {}
    method: dict[str, Any] = job.get("method") or {}
    numbers: dict[str, Any] = job.get("hyperparameters") or {}
    rows = [
        ("job", job["id"]), ("status", job["status"]), ("model", job["model"]),
        ("method", method.get("type", "")),
        ("hyperparameters", ", ".join(f"{name} {value}" for name, value in numbers.items())),
        ("training file", job["training_file"]), ("seed", str(job["seed"])), ("made", when(job["created_at"])), ("ends", _end(job)),
        ("trained tokens", "" if job["trained_tokens"] is None else f"{job['trained_tokens']:,}"),
        ("tuned model", job["fine_tuned_model"] or ""), ("error", str(error.get("message") or "")),
    ]  # fmt: skip
    table(("", ""), [row for row in rows if row[1]])


def _end(job: dict[str, Any]) -> str:
    """Return when a job ended, or will by the estimate."""
    if job.get("finished_at") is not None:
        return when(job["finished_at"])
    return f"about {when(job['estimated_finish'])}" if job.get("estimated_finish") is not None else ""


def _line(event: dict[str, Any]) -> str:
    mark = "" if event["level"] == "info" else f"{event['level']}: "
    return f"{when(event['created_at'])}  {mark}{event['message']}"
