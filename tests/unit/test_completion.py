"""Completion: in a real bash with the script sourced, and through click's protocol for each shell; quick, and without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from kivnun.cli.completion import SHELLS, VARIABLE, run_folders, spec_files
from kivnun.cli.main import cli, run
from kivnun.spec.catalogue import options

HEAVY = ("torch", "transformers", "peft")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a spec, a run and other things, and a program `kivnun` on the path; the test works in it."""
    for name in ("shop.yaml", "rows.jsonl", "nested/deep/other.yml", "runs/shop/resolved.yaml", "runs/shop/spec.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "hidden.yaml").touch()
    program = tmp_path / "bin" / "kivnun"
    program.parent.mkdir()
    loaded = "import atexit,sys; atexit.register(lambda: open('loaded','w').write(' '.join(sys.modules)))"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{loaded}; from kivnun.cli.main import main; main()" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def completed(typed: str, shell: str = "bash") -> list[str]:
    """Return what click's protocol answers to a line that ends where the cursor stands, in this process."""
    words = typed.split(" ")
    variables = {VARIABLE: f"{shell}_complete", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    if shell == "fish":
        variables["COMP_CWORD"] = words[-1]
    program = "from kivnun.cli.main import main; main()"
    command = [sys.executable, "-c", f"import sys; sys.argv = ['kivnun']; {program}"]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_each_shell_calls_the_program_back(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"{VARIABLE}={shell}_complete" in script
    assert "kivnun" in script
    assert "%(" not in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_a_real_bash_completes_commands_specs_runs_and_options_of_the_spec(place: Path) -> None:
    """One bash sources the script and asks five times, as the key Tab does."""
    asked = (
        ("kivnun", "tun"),
        ("kivnun", "tune", "sh"),
        ("kivnun", "tune", "nes"),
        ("kivnun", "chat", "runs/"),
        ("kivnun", "tune", "shop.yaml", "--set", "adapter.ra"),
    )
    lines = ["source <(kivnun completion bash)", "compopt() { :; }"]  # the builtin works inside a completion alone
    for words in asked:
        listed = " ".join(f"'{word}'" for word in words)
        lines += [f"COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; COMPREPLY=()", "_kivnun_completion kivnun"]
        lines += ['echo "[${COMPREPLY[*]}]"']
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["[tune]", "[shop.yaml]", "[nested/deep/other.yml]", "[runs/shop]", "[adapter.rank=]"]
    loaded = (place / "loaded").read_text().split()
    assert [name for name in HEAVY if name in loaded] == []


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_the_same_names(place: Path, shell: str) -> None:
    assert any("translation" in line for line in completed("kivnun scenario write tra", shell))


def test_names_are_completed_and_values_after_the_equals_sign() -> None:
    def names(*words: str) -> list[str]:
        *before, last = words
        return [item.value for item in ShellComplete(cli, {}, "kivnun", VARIABLE).get_completions(list(before), last)]

    assert names("advise", "--base", "kiv") == ["kivnun/tiny-phi"]
    assert "microsoft/Phi-4-mini-instruct" in names("advise", "--base", "microsoft/phi-4-m")
    assert not [name for name in names("advise", "--base", "microsoft/") if "small" in name]
    assert names("advise", "--device", "h") == ["h200", "h100"]
    assert names("advise", "--scenario", "cl") == ["classification"]
    assert names("scenario", "convert", "en") == ["entities"]
    assert names("completion", "") == list(SHELLS)
    assert names("tune", "x.yaml", "--set", "base.precision=") == [
        f"base.precision={value}" for value in ("auto", "fp32", "bf16", "int8", "nf4")
    ]
    assert names("tune", "x.yaml", "--set", "adapter.kind=lo") == [f"adapter.kind={kind}" for kind in ("lora", "loha", "lokr")]
    assert names("tune", "x.yaml", "--set", "compute.packed_weights=") == [
        f"compute.packed_weights={value}" for value in ("true", "false", "null")
    ]
    assert names("tune", "x.yaml", "--set", "adapter.rank=") == []
    every = names("tune", "x.yaml", "--set", "")
    assert every == [f"{path}=" for path in dict.fromkeys(option.path for option in options())]
    assert names("data", "show", "x.yaml", "--set", "seed") == names("plan", "x.yaml", "--set", "seed") == ["seed="]


def test_files_below_are_found_without_hidden_ones_and_a_run_is_no_spec(place: Path) -> None:
    parameter = click.Argument(["spec"])
    context = click.Context(cli)
    found = [item.value for item in spec_files(context, parameter, "")]
    assert found == ["shop.yaml", "nested/deep/other.yml", "runs/shop/spec.yaml"]
    assert [item.value for item in spec_files(context, parameter, ".venv/")] == [".venv/hidden.yaml"]
    assert [item.value for item in run_folders(context, parameter, str(place / "ru"))] == [str(place / "runs/shop")]
    (nothing,) = spec_files(context, parameter, "zzz")
    assert (nothing.value, nothing.type) == ("zzz", "file"), "the shell's own files"


def test_every_spec_run_and_scenario_that_is_asked_for_is_completed() -> None:
    waiting: list[click.Command] = [cli]
    bare: list[str] = []
    while waiting:
        command = waiting.pop()
        waiting += command.commands.values() if isinstance(command, click.Group) else []
        wanted = {"spec", "run", "runs", "overrides", "scenario_name"} | (
            {"name"} if command.name in ("write", "convert") else set()
        )
        bare += [f"{command.name} {p.name}" for p in command.params if p.name in wanted and p._custom_shell_complete is None]
    assert bare == []
