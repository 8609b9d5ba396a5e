"""The built-in bases, as the command lists them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from kivnun.cli.main import run


def test_every_listed_base_with_a_folder_opens_with_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bases", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out.splitlines()[-1])
    built_in = [base for base in listed if base["folder"]]
    assert [base["id"] for base in built_in] == ["kivnun/tiny-phi"]
    for base in built_in:
        assert set(base) == {"id", "family", "parameters", "context", "folder", "licence", "refused"}
        model = AutoModelForCausalLM.from_pretrained(base["folder"])
        assert sum(weight.numel() for weight in model.parameters()) == base["parameters"]
        assert AutoTokenizer.from_pretrained(base["folder"]).chat_template


def test_the_built_in_bases_weigh_at_most_eight_megabytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bases", "--json"]) == 0
    for base in json.loads(capsys.readouterr().out)[:1]:
        assert sum(file.stat().st_size for file in Path(base["folder"]).glob("*.safetensors")) <= 8_000_000


def test_the_table_names_the_same_bases(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bases"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["id", "family", "parameters", "context", "licence", "note"]
    assert [line.partition("/")[0] for line in lines[1:]] == ["kivnun"] + ["microsoft"] * (len(lines) - 2)
