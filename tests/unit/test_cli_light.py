"""What must stay light: help, and the commands that look at specs and data, load no tensor library."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kivnun.cli.main import cli

HEAVY = ("torch", "transformers", "peft", "deepspeed", "onnxruntime", "matplotlib", "pydantic")
COMMANDS = [[name] for name in cli.commands] + [["data", "check"], ["data", "show"], ["scenario", "write"]]

PROGRAM = """
import sys
from kivnun.cli.main import run
try:
    status = run(sys.argv[2:])
except SystemExit as stop:
    status = stop.code
loaded = [name for name in sys.argv[1].split(",") if name in sys.modules]
print("LOADED", *loaded, file=sys.stderr)
sys.exit(status)
"""


def loaded_by(args: list[str], watched: tuple[str, ...] = HEAVY) -> tuple[int, list[str], str]:
    command = [sys.executable, "-c", PROGRAM, ",".join(watched), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("LOADED"), done.stderr
    return done.returncode, last.split()[1:], done.stdout


@pytest.mark.parametrize("args", [[], *COMMANDS], ids=lambda args: "-".join(args) or "kivnun")
def test_help_loads_no_heavy_library(args: list[str]) -> None:
    status, loaded, text = loaded_by([*args, "--help"])
    assert status == 0
    assert loaded == []
    assert text.startswith("Usage: kivnun")


def test_version_loads_no_heavy_library() -> None:
    assert loaded_by(["--version"])[:2] == (0, [])


def test_listing_bases_loads_no_torch() -> None:
    assert loaded_by(["bases", "--json"], ("torch", "transformers"))[:2] == (0, [])


def test_the_schema_is_printed_without_torch() -> None:
    assert loaded_by(["schema"], ("torch", "transformers"))[:2] == (0, [])


def test_importing_the_package_changes_nothing_of_the_process() -> None:
    program = "import os, sys; before = dict(os.environ); import kivnun, kivnun.cli.main; sys.exit(before != dict(os.environ))"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
