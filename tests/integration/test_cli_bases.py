"""The built-in bases, as the command lists them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from kivnun.cli.main import run


def test_every_listed_base_opens_with_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bases", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [base["id"] for base in listed] == ["kivnun/tiny-phi"]
    for base in listed:
        assert set(base) == {"id", "family", "parameters", "folder", "licence"}
        model = AutoModelForCausalLM.from_pretrained(base["folder"])
        assert sum(weight.numel() for weight in model.parameters()) == base["parameters"]
        assert AutoTokenizer.from_pretrained(base["folder"]).chat_template


def test_the_built_in_bases_weigh_at_most_eight_megabytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bases", "--json"]) == 0
    for base in json.loads(capsys.readouterr().out):
        assert sum(file.stat().st_size for file in Path(base["folder"]).glob("*.safetensors")) <= 8_000_000


def test_the_table_names_the_same_bases(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bases"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["id", "family", "parameters", "licence", "folder"]
    assert all(line.startswith("kivnun/") for line in lines[1:])
