"""What is in `deploy/` fits the program: its commands are commands, its configuration one, and no secret is in it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from kivnun.cli.main import cli
from kivnun.jobs.config import read_config
from pages import save_files

DEPLOY = Path(__file__).parents[2] / "deploy"


def parsed(words: list[str]) -> dict[str, Any]:
    """Return the options that `kivnun serve` reads from a command line, which it must accept."""
    command = cli.commands[words[0]]
    assert isinstance(command, click.Command)
    return command.make_context(words[0], words[1:]).params


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]


def unit() -> dict[str, str]:
    lines = (DEPLOY / "kivnun.service").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def commands() -> list[list[str]]:
    file = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    (line,) = [line for line in file.splitlines() if line.startswith("CMD [")]
    program, *words = shlex.split(unit()["ExecStart"])
    assert program.endswith("/bin/kivnun")
    return [yaml.safe_load(line.removeprefix("CMD ")), compose()["kivnun"]["command"], words]


@pytest.mark.parametrize("words", commands(), ids=["container", "compose", "systemd"])
def test_the_command_of_each_is_one_that_serve_takes(words: list[str]) -> None:
    given = parsed(words)
    assert given["host"] == "127.0.0.1" or given["behind_proxy"]


def test_each_leaves_the_drain_the_time_that_it_has() -> None:
    drain_s = parsed(["serve"])["drain_s"]
    assert int(compose()["kivnun"]["stop_grace_period"].removesuffix("s")) > drain_s + 5
    assert int(unit()["TimeoutStopSec"]) > drain_s + 5
    assert unit()["KillMode"] == "mixed"


def test_the_configuration_is_one() -> None:
    assert read_config(DEPLOY / "service.yaml").base_id("gpt-4o-mini-2024-07-18") == "microsoft/Phi-4-mini-instruct"


def test_the_configuration_of_the_guide_is_one(tmp_path: Path) -> None:
    save_files(DEPLOY.parent / "docs" / "guides" / "service-operate.md", tmp_path)
    assert read_config(tmp_path / "service.yaml").base_id("gpt-4o-mini-2024-07-18") == "support-base"


def test_no_secret_is_written_down() -> None:
    for environment in (compose()["kivnun"]["environment"], compose()["db"]["environment"]):
        for name, value in environment.items():
            assert "KEY" not in name or value.startswith("${"), name
            assert "PASSWORD" not in name or value.startswith("${"), name
