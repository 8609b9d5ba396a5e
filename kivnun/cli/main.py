"""The `kivnun` command: its group, its exit status, and the one place where errors become text. Next: `tune.py`.

Nothing here or in the command files imports torch at the top: `kivnun --help` must answer at once. A command imports what it
needs when it runs.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import click

from kivnun import __version__
from kivnun.cli import failure
from kivnun.cli.advise import advise
from kivnun.cli.bases import bases
from kivnun.cli.chat import chat
from kivnun.cli.compare import compare
from kivnun.cli.completion import completion
from kivnun.cli.data import data
from kivnun.cli.doctor import doctor
from kivnun.cli.evaluate import evaluate
from kivnun.cli.export import export
from kivnun.cli.harness import harness
from kivnun.cli.jobs import jobs
from kivnun.cli.keys import keys
from kivnun.cli.matrix import matrix
from kivnun.cli.models import models
from kivnun.cli.plan import plan
from kivnun.cli.predict import predict
from kivnun.cli.process import keep_deepspeed_quiet
from kivnun.cli.scenario import scenario
from kivnun.cli.schema import schema
from kivnun.cli.serve import serve
from kivnun.cli.serve_run import serve_run
from kivnun.cli.showcase import showcase
from kivnun.cli.truthfulqa import truthfulqa
from kivnun.cli.tune import tune
from kivnun.cli.verify import verify
from kivnun.cli.worker import worker


def _epilog() -> str:
    lines = [f"{status:>5}  {code or '-':<16} {meaning}" for status, code, meaning in failure.exit_statuses()]
    return "\n".join(["\b", "Exit status, error code and meaning:", *lines])


class _Group(click.Group):
    """Commands in the order of a newcomer's way through them, not by alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}, epilog=_epilog())
@click.version_option(__version__, prog_name="kivnun")
def cli() -> None:
    """Fine-tune a language model: from a file of examples to a tuned model in use.

    Data goes to stdout, text for people to stderr. With --json the last line of stdout is one JSON object, also when the
    command fails: {"status": "failed", "exit_status": ..., "error": {"code", "message", "hint"}}.
    """


_COMMANDS = (
    tune, plan, data, evaluate, compare, chat, predict, export, verify, models, serve_run, serve, jobs, keys, worker, bases, doctor,
    scenario, advise, matrix, showcase, truthfulqa, harness, schema, completion,
)  # fmt: skip
for _command in _COMMANDS:
    _command.epilog = _command.epilog or "Exit statuses and error codes: kivnun --help"
    cli.add_command(_command)


def run(args: Sequence[str]) -> int:
    """Run one command line; return its exit status. Raises nothing but `SystemExit` of a closed pipe."""
    try:
        result = cli.main(args=list(args), prog_name="kivnun", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        shown = failure.describe(error)
        failure.report(shown, error, as_json=_wants_json(args))
        return shown.exit_status


def _wants_json(args: Sequence[str]) -> bool:
    # Read from the line itself: when click refuses the line, no option has been parsed yet.
    before_end = list(args)[: args.index("--")] if "--" in args else args
    return "--json" in before_end


def main() -> None:
    """Entry point of the installed script. Output is UTF-8 whatever the locale says: it is data in many scripts."""
    for stream, errors in ((sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)
    keep_deepspeed_quiet()
    sys.exit(run(sys.argv[1:]))
