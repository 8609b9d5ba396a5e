"""`kivnun completion`: the script that makes a shell complete commands, options, spec files, run folders and names of ours.

click writes the scripts and asks the functions below while somebody types, so they must be quick: none loads torch, and each
imports what it needs when it is asked. Next: `main.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import CompletionItem, ShellComplete, get_completion_class

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_KIVNUN_COMPLETE"  # what click makes of the program's name
SPECS = (".yaml", ".yml", ".json")
RUN_MARK = "resolved.yaml"
DEEPEST = 4  # folders below the one that was typed
MOST_FOLDERS = 400  # looked into: somebody waits
PASSED_OVER = {"node_modules", "site-packages", "__pycache__", "checkpoints", "evaluation"}


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.option("--json", "as_json", is_flag=True, help="Print {shell, script} as one JSON object.")
def completion(shell: str, as_json: bool) -> None:
    """Print the script that makes SHELL complete `kivnun`.

    \b
    bash   kivnun completion bash > ~/.kivnun.bash    and in ~/.bashrc:  . ~/.kivnun.bash
    zsh    kivnun completion zsh > ~/.kivnun.zsh      and in ~/.zshrc:   . ~/.kivnun.zsh
    fish   kivnun completion fish > ~/.config/fish/completions/kivnun.fish
    """
    from kivnun.cli.screen import print_json

    script = _script(click.get_current_context().find_root().command, shell)
    if as_json:
        print_json({"shell": shell, "script": script})
    else:
        click.echo(script, nl=False)


def _script(command: click.Command, shell: str) -> str:
    kind = get_completion_class(shell)
    assert kind is not None
    writer = kind(command, {}, "kivnun", VARIABLE)
    # click's own `source` starts bash first, to ask for its version, and warns on stdout where there is none.
    script = ShellComplete.source(writer)
    # After `adapter.rank=` comes a value, not a space.
    return script.replace("COMPREPLY+=($value)", "COMPREPLY+=($value)\n            [[ $value == *= ]] && compopt -o nospace")


def spec_files(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem[str]]:
    """Return the specs below what was typed; where there are none, leave it to the shell's own files."""
    found = [CompletionItem(str(path)) for path in _below(typed) if path.suffix in SPECS and path.name != RUN_MARK]
    return found or [CompletionItem(typed, type="file")]


def run_folders(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem[str]]:
    """Return the run folders below what was typed: those with a resolved spec."""
    found = [CompletionItem(str(path.parent)) for path in _below(typed) if path.name == RUN_MARK]
    return found or [CompletionItem(typed, type="dir")]


def scenario_names(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem[str]]:
    from kivnun.data.scenarios import SCENARIOS

    return [CompletionItem(one.name, help=one.title) for one in SCENARIOS if one.name.startswith(typed)]


def base_names(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem[str]]:
    """Return the built-in bases and the Phi models; a folder is completed by the shell."""
    from kivnun.model.families import BUILT_IN
    from kivnun.model.phi import PHI

    names = [*BUILT_IN, *(name for name, model in PHI.items() if model.refused is None)]
    found = [CompletionItem(name) for name in names if name.lower().startswith(typed.lower())]
    return found or [CompletionItem(typed, type="dir")]


def device_names(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem[str]]:
    from kivnun.plan.devices import GPUS

    return [CompletionItem(name) for name in ("cpu", "cuda", *GPUS) if name.startswith(typed)]


def option_paths(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem[str]]:
    """Return the paths of `--set` with their equals sign, and after it the values that an option of few values takes."""
    from kivnun.spec.catalogue import options

    path, equals, value = typed.partition("=")
    if not equals:
        paths = dict.fromkeys(option.path for option in options())
        return [CompletionItem(f"{name}=") for name in paths if name.startswith(typed)]
    values = dict.fromkeys(word for option in options() if option.path == path for word in _values(option.allowed, option.kind))
    return [CompletionItem(f"{path}={word}") for word in values if word.startswith(value)]


def _values(allowed: str, kind: str | None) -> list[str]:
    """Return the words that an option takes, where what it takes is a list of words."""
    words, _, null = allowed.partition(", or null")
    if words == "true or false":
        found = ["true", "false"]
    elif words.startswith("one of "):
        found = words.removeprefix("one of ").split(", ")
    elif words == kind:  # the tag of one member of a tagged union
        found = [words]
    else:
        return []
    return [*found, "null"] if null or allowed.endswith("or null") else found


def _below(typed: str) -> Iterator[Path]:
    """Yield the files whose path begins with what was typed, nearest folders first; hidden ones where a dot was typed."""
    folder, _, name = typed.rpartition("/")
    start = Path(f"{folder}/" if folder or typed.startswith("/") else ".")
    waiting, looked = [(start, 0)], 0
    while waiting and looked < MOST_FOLDERS:
        place, depth = waiting.pop(0)
        looked += 1
        for entry in _entries(place):
            if depth == 0 and not entry.name.startswith(name):
                continue
            if entry.name.startswith(".") and not (depth == 0 and name.startswith(".")):
                continue
            path = Path(entry.path)
            if entry.is_file():
                yield path
            elif entry.is_dir() and depth < DEEPEST and entry.name not in PASSED_OVER:
                waiting.append((path, depth + 1))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []
