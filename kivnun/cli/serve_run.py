"""`kivnun serve-run`: one run behind OpenAI's chat and completion endpoints, on this machine."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kivnun.cli.completion import run_folders
from kivnun.cli.listening import is_loopback, listen, url_of

if TYPE_CHECKING:
    from kivnun.opened import OpenedRun


@click.command("serve-run", short_help="Serve the model of a run to OpenAI's client.")
@click.argument("run", type=click.Path(path_type=Path, file_okay=False), shell_complete=run_folders)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="The port; 0 takes a free one.")
@click.option("--api-key-env", metavar="NAME", help="The environment variable that holds the key clients must send.")
@click.option("--json", "as_json", is_flag=True, help="Print {status, url, models} as one JSON object once it serves.")
def serve_run(run: Path, host: str, port: int, api_key_env: str | None, as_json: bool) -> None:
    """Serve the model of RUN until it is stopped, under two ids: the run's name, and NAME:base for its base.

    Takes /v1/chat/completions, /v1/completions, /v1/models and /health. Requests are answered one after the other. An address
    that others can reach needs a key. Needs the extra `serve` (starlette, uvicorn).
    """
    key = _key(api_key_env)
    if key is None and not is_loopback(host):
        raise click.UsageError(f"--host {host} can be reached by others: name a key with --api-key-env")
    from kivnun.cli.process import keep_freed_memory
    from kivnun.cli.screen import print_json, stderr, working

    keep_freed_memory()
    with working("loading the run"):
        app, ids = _app(run, key)
    listening = listen(host, port)
    url = url_of(host, listening.getsockname()[1])
    stderr().print(f"serving {' and '.join(ids)} at {url}/v1; Ctrl-C stops")
    if as_json:
        print_json({"status": "serving", "url": url, "models": ids})
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
    uvicorn.Server(config).run(sockets=[listening])


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise click.UsageError(f"--api-key-env {name}: this variable is not set, or empty")
    return key


def _app(run: Path, key: str | None) -> tuple[Any, list[str]]:
    """Return the application over the run's models, loaded, and their ids."""
    try:
        importlib.import_module("uvicorn")  # where it is missing, that is told before anything is loaded
        from kivnun.serve.app import make_app
    except ModuleNotFoundError as error:
        raise click.UsageError(f"{error.name} is not installed: pip install 'kivnun[serve]'") from None
    from kivnun.artifacts import code_hash
    from kivnun.model.families import longest_row
    from kivnun.opened import open_run
    from kivnun.serve.wire import Served
    from kivnun.serve.worker import Worker

    opened = open_run(run)
    name = run.resolve().name
    ids = {"tuned": name, "base": f"{name}:base"}
    chats = opened.trained_on_chats
    worker = Worker(lambda: {"tuned": opened.tuned, "base": opened.base_model}, opened.tokenizer)
    worker.start()
    served = Served(ids, opened.tokenizer, longest_row(opened.base_folder), chats)
    return make_app(worker, served, f"{_version(opened)} {code_hash()}", key), list(ids.values())


def _version(opened: OpenedRun) -> str:
    return f"{opened.base.content_hash} {opened.spec.content_hash()}"
